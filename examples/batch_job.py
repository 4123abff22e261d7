"""
A batch job: one session and one journey for each row of a file.

Run it with `python examples/batch_job.py [FILE]`; it needs nothing but pgtrack.  Events
are printed unless `PRODUCTGRAPH_ENDPOINT` says where to send them.

The rows are orders.  Each has the session in which the browser made it, so that its
invoice shows up in the same timeline.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path

import pgtrack

ORDERS = Path(__file__).parent / "data" / "orders.csv"
CURRENCIES = {"EUR": "€", "GBP": "£", "USD": "$"}


@pgtrack.journey_step("order_checked", "Order Checked")
def check(row: dict[str, str]) -> str:
    """Return the amount as it will be printed."""
    amount = float(row["amount"].replace(",", ""))
    if amount <= 0:
        msg = f"the amount must be positive (got {amount:.2f})"
        raise ValueError(msg)
    return f"{CURRENCIES[row['currency']]}{amount:,.2f}"


@pgtrack.journey_step("invoice_sent", "Invoice Sent")
def send(row: dict[str, str], amount: str) -> None:
    """Hand the invoice to the mail service."""
    if not row["email"]:
        msg = f"no address to send an invoice of {amount} to"
        raise LookupError(msg)
    with pgtrack.api_call("POST", "/mail/messages") as call:
        time.sleep(0.002)  # the network
        call.status_code = 202


def handle(row: dict[str, str]) -> bool:
    """Send the invoice of one order; False if that failed, which pgtrack has told."""
    metadata = {"order": row["order"]}
    try:
        with (
            pgtrack.session(
                row["session_id"] or None, user_id=row["customer"], metadata=metadata
            ),
            pgtrack.journey("invoicing") as journey,
        ):
            send(row, check(row))
            journey.convert()
    except (ValueError, LookupError):
        return False
    return True


def main() -> None:
    """Invoice each order of the file, and tell how it went."""
    pgtrack.configure(
        project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
        endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
    )
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ORDERS
    started = time.perf_counter()
    with path.open(encoding="utf-8", newline="") as file:
        outcomes = [handle(row) for row in csv.DictReader(file)]

    # Outside of any session: goes out under the session of this process.
    pgtrack.emit(
        "custom",
        name="batch.finished",
        duration_ms=1000 * (time.perf_counter() - started),
        metadata={"rows": len(outcomes), "failed": outcomes.count(False)},
    )

    pgtrack.shutdown()
    stats = pgtrack.stats()
    print(f"\n{len(outcomes)} orders, {outcomes.count(False)} of them failed.")
    print(f"{stats.emitted} events emitted, {stats.delivered} delivered.")
    print(f"Adjusted on the way: {dict(stats.adjusted)}")


if __name__ == "__main__":
    main()
