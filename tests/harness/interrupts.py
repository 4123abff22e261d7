"""
Interrupt a function at each of its bytecodes, as a signal handler or finaliser may.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, ModuleType

T = TypeVar("T")


class Interrupt:
    """
    Call one function in the middle of another, at one bytecode.

    Args:
        step: Which bytecode, counted from 0, over all frames of the files.

        files: How the names of the files begin whose frames count.

    Attributes:
        place: File and line where it happened; None when it did not come to that.
    """

    def __init__(self, step: int, files: tuple[str, ...]) -> None:
        self._left = step
        self._files = files
        self.place: str | None = None

    def __call__(self, function: Callable[[], T], action: Callable[[], object]) -> T:
        """
        Call *function* and return its result; call *action* once on the way.

        Neither *action* nor any other thread is interrupted itself.
        """

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            del arg
            if not frame.f_code.co_filename.startswith(self._files):
                return None

            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            if event == "opcode" and self.place is None:
                if self._left == 0:
                    name = Path(frame.f_code.co_filename).name
                    self.place = f"{name}:{frame.f_lineno}"
                    action()
                self._left -= 1

            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return function()
        finally:
            sys.settrace(before)


def interrupts(*modules: ModuleType) -> Iterator[Interrupt]:
    """
    Give an interrupt for each bytecode in turn; the first and last do not happen.

    Before Python 3.12 these are all bytecodes; later ones tell of a code's bytecodes
    only when it runs again, hence the first, and 3.13 of some none at all.

    Args:
        modules: Modules whose code is interrupted; packages stand for all of theirs.
    """
    files = tuple(
        str(Path(str(module.__file__)).parent)
        if hasattr(module, "__path__")
        else str(module.__file__)
        for module in modules
    )
    yield Interrupt(sys.maxsize, files)
    step = 0
    while True:
        interrupt = Interrupt(step, files)
        yield interrupt
        if interrupt.place is None:
            return
        step += 1
