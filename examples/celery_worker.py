"""
A checkout that leaves the slow part to Celery, and a worker that goes on with it.

Run it with `python examples/celery_worker.py` after `pip install celery`.  It needs no
broker: messages stay in memory, and the worker runs in a thread.  Events are printed
unless `PRODUCTGRAPH_ENDPOINT` says where to send them.
"""

from __future__ import annotations

import os

from celery import Celery, chain
from celery.contrib.testing.worker import start_worker

import pgtrack
from pgtrack.integrations import celery as tracked_tasks

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.broker_transport_options = {"polling_interval": 0.05}
tracked_tasks.install()


# --- the tasks -------------------------------------------------------------------


class BankIsSlowError(Exception):
    """The bank has not answered yet."""


@app.task(bind=True, max_retries=3, default_retry_delay=0)
@pgtrack.journey_step("payment_confirmed", "Payment Confirmed")
def charge(self, card: str) -> str:  # noqa: ANN001  Celery binds the task
    """Take the money; the bank answers at the second attempt."""
    if self.request.retries == 0:
        raise self.retry(exc=BankIsSlowError())
    if card == DECLINED:
        msg = f"card {card} was declined"
        raise ValueError(msg)
    return "receipt-1"


@app.task
def send_receipt(receipt: str) -> None:
    """Write to the customer."""
    pgtrack.emit("custom", name="receipt.sent", metadata={"receipt": receipt})


@app.task
def sweep() -> None:
    """Tidy up, now and then; nobody asked for it."""
    pgtrack.emit("custom", name="carts.swept", metadata={"carts": 3})


# --- who sends them --------------------------------------------------------------

GOOD = "4242 4242 4242 4242"
DECLINED = "4000 0000 0000 0002"


def checkout(session_id: str, user_id: str, card: str) -> None:
    """Serve a request: what takes long is for the worker."""
    with (
        pgtrack.session(session_id, user_id=user_id),
        pgtrack.journey("checkout_flow") as journey,
    ):
        journey.step("cart_checked", "Cart Checked")
        paid = chain(charge.s(card), send_receipt.s()).delay()
    try:
        paid.parent.get(timeout=10)
    except ValueError as error:
        print(f"   the customer reads: {type(error).__name__}")
    else:
        paid.get(timeout=10)
    pgtrack.flush()


def main() -> None:
    """Run a worker until all is done."""
    pgtrack.configure(
        project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
        endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
    )
    with start_worker(app, perform_ping_check=False, loglevel="CRITICAL"):
        print("\nAnn pays, and gets her receipt.  (sess_frontend_ann)")
        checkout("sess_frontend_ann", "u_ann", GOOD)
        print("\nBen's card is declined, in the worker.  (sess_frontend_ben)")
        checkout("sess_frontend_ben", "u_ben", DECLINED)
        print("\nA task that no session asked for has one of its own.")
        sweep.delay().get(timeout=10)
    pgtrack.shutdown()
    stats = pgtrack.stats()
    print(f"\n{stats.emitted} events emitted, {stats.delivered} delivered.")


if __name__ == "__main__":
    main()
