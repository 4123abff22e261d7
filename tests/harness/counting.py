"""
Answer requests as a ProductGraph that is quick, and remembers ids alone.
"""

from __future__ import annotations

import collections
import json
from typing import TYPE_CHECKING, Any

from .productgraph import INVALID_BODY, Element, ProductGraph, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping


class Counting(ProductGraph):
    """
    Be a ProductGraph for hundreds of thousands of events: it keeps no content.

    It takes any JSON that has events with an id and a name, each name given once.

    Attributes:
        ids: The first id that came with each name.

        duplicates: How often a name came once more with that id.

        strangers: Names that came with another id as well.

        total: Events that came, duplicates included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests = collections.deque(maxlen=0)
        self.ids: dict[str, str] = {}
        self.duplicates: collections.Counter[str] = collections.Counter()
        self.strangers: list[str] = []
        self.total = 0

    def decode(self, headers: Mapping[str, str], body: bytes) -> list[Element] | Reply:
        """
        Return the content of the `events` list, or the reply that refuses the body.
        """
        try:
            return [Element(event, 0) for event in json.loads(body)["events"]]
        except (ValueError, KeyError, TypeError):
            return INVALID_BODY

    def _ingest(self, batch: list[Element]) -> Reply:
        for event, _ in batch:
            self._count(event)
        self.total += len(batch)
        return Reply(202, {}, b'{"accepted":%d,"rejected":0}' % len(batch))

    def _count(self, event: dict[str, Any]) -> None:
        name, event_id = event["event.name"], event["event_id"]
        first = self.ids.get(name)
        if first is None:
            self.ids[name] = event_id
        elif first == event_id:
            self.duplicates[name] += 1
        else:
            self.strangers.append(name)
