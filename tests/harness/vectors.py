"""
Read the examples in `tests/vectors`.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_DIRECTORY = Path(__file__).parent.parent / "vectors"


def load_vectors(name: str) -> Any:
    """
    Return the content of `tests/vectors/<name>.json`.
    """
    return json.loads((_DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))


def body_of(case: Mapping[str, Any]) -> bytes:
    """
    Return the body that a case of `requests.json` describes.

    It is written out as `body` or `body_base64`, or `generate` says which event to
    repeat, how often, and which of its members must differ each time. A case without
    any of them has an empty body.
    """
    if "body_base64" in case:
        return base64.b64decode(case["body_base64"])

    if "generate" in case:
        recipe = case["generate"]
        events = [
            {**recipe["repeat"], recipe["vary"]: f"generated-{i}"}
            for i in range(recipe["times"])
        ]
        return json.dumps({"events": events}).encode()

    return str(case.get("body", "")).encode()
