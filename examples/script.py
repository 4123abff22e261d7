"""
A plain script: a session, a journey, an error, and the ledger.

Run it with `python examples/script.py`; it needs nothing but pgtrack.  Events are
printed unless `PRODUCTGRAPH_ENDPOINT` says where to send them.
"""

from __future__ import annotations

import os

import pgtrack


@pgtrack.track_api("/api/v1/checkout", method="POST")
def checkout(items: list[str], card: str) -> dict[str, int]:
    """Sell *items*: two steps of a journey, and its goal."""
    with pgtrack.journey("checkout_flow") as flow:
        flow.step("cart_checked", "Cart Checked")
        pay(card)
        flow.convert()
    return {"items": len(items)}


@pgtrack.journey_step("payment_confirmed", "Payment Confirmed")
def pay(card: str) -> None:
    """Take the money, unless the bank says no."""
    if card == "4000 0000 0000 0002":
        msg = f"card {card} declined, receipt goes to ann@example.com"
        raise ValueError(msg)


def main() -> None:
    """Show what pgtrack sees of a small shop."""
    pgtrack.configure(
        project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
        endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
    )

    say("\n1  A session. All that happens inside belongs to it, and to its user.")
    with pgtrack.session("sess_frontend_ann", user_id="u_ann"):
        pgtrack.emit("custom", name="invoice.sent", metadata={"pages": 3})

        say("\n2  A journey. Decorators tell its steps and the time of the call.")
        checkout(["book", "lamp"], card="4242 4242 4242 4242")

    say("\n3  An error. It reaches the caller as ever, and its secrets reach nobody:")
    with pgtrack.session("sess_frontend_ben", user_id="u_ben"):
        try:
            checkout(["book"], card="4000 0000 0000 0002")
        except ValueError as error:
            say(f"   what the caller caught:  {error}")

    say("\n4  The ledger. Each event ends in exactly one of these counters:")
    stats = pgtrack.stats()
    print(
        f"   {stats.emitted} emitted = {stats.delivered} delivered"
        f" + {sum(stats.rejected.values())} rejected"
        f" + {sum(stats.dropped.values())} dropped + {stats.pending} pending"
    )


def say(line: str) -> None:
    """Print a line below the events that came before it."""
    pgtrack.flush()
    print(line)


if __name__ == "__main__":
    main()
