"""
Run a program in the background, and end it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

_TESTS = Path(__file__).resolve().parent.parent

# Seconds that a program may take to start, to do what is waited for, and to end.
_PATIENCE = 30.0

# Seconds between two looks at a foreign process, which tells nobody.
_TICK = 0.01


class Background:
    """
    Be a program that runs in a process group of its own.

    It can import what this process can, save the tests, and what is in its folder.
    Variables of this process that begin with `PRODUCTGRAPH_` do not reach it. Leaving
    the block kills what is left of it.

    Args:
        command: What follows the interpreter.

        folder: Where it runs, and keeps its log.

        env: Variables to add.
    """

    def __init__(
        self, *command: str, folder: Path, env: Mapping[str, str] | None = None
    ) -> None:
        paths = [Path(entry).resolve() for entry in sys.path]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PRODUCTGRAPH_")
        }
        inherited["PYTHONPATH"] = os.pathsep.join(
            str(path)
            for path in (folder, *paths)
            if path == folder or _TESTS not in (path, *path.parents)
        )
        self._is_asked = False
        self._log = folder / f"log-{time.monotonic_ns()}"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**inherited, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_PATIENCE)

    @property
    def log(self) -> str:
        """
        What it has printed so far.
        """
        return self._log.read_text("utf-8", "replace")

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """
        Look again and again until *condition* holds.

        Raises:
            RuntimeError: The program ended instead, or it took too long.
        """
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                msg = f"No {what}, but this:\n{self.log}"
                raise RuntimeError(msg)
            time.sleep(_TICK)

    def wait_for(self, text: str) -> None:
        """
        Wait until it has printed *text*.
        """
        self.wait_until(lambda: text in self.log, repr(text))

    def ask_to_end(self) -> None:
        """
        Send it SIGTERM, once.
        """
        if not self._is_asked:
            self._is_asked = True
            self.process.terminate()

    def end(self) -> int:
        """
        Ask it to end, and return its exit status.

        Raises:
            RuntimeError: It did not end.
        """
        self.ask_to_end()
        try:
            return self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            msg = f"It has not ended:\n{self.log}"
            raise RuntimeError(msg) from None
