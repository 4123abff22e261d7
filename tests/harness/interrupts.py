"""
Interrupt a function at each of its bytecodes, as a signal handler or finaliser may.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType, ModuleType

    Step = Callable[[CodeType, int], None]

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
        thread = threading.get_ident()

        def step(code: CodeType, line: int) -> None:
            if self.place is None and threading.get_ident() == thread:
                if self._left == 0:
                    self.place = f"{Path(code.co_filename).name}:{line}"
                    action()
                self._left -= 1

        with _stepping(self._files, step):
            return function()


if sys.version_info >= (3, 12):
    # Tracing tells of a code's bytecodes there only when it runs again, if at all.

    @contextmanager
    def _stepping(files: tuple[str, ...], step: Step) -> Iterator[None]:
        """Have *step* called before each bytecode of *files*."""
        monitoring = sys.monitoring

        def tell(code: CodeType, offset: int) -> object:
            del offset
            if not code.co_filename.startswith(files):
                return monitoring.DISABLE
            step(code, sys._getframe(1).f_lineno)
            return None

        tool, event = monitoring.DEBUGGER_ID, monitoring.events.INSTRUCTION
        monitoring.use_tool_id(tool, __name__)
        monitoring.register_callback(tool, event, tell)
        monitoring.set_events(tool, event)
        try:
            yield
        finally:
            monitoring.set_events(tool, 0)
            monitoring.register_callback(tool, event, None)
            monitoring.free_tool_id(tool)

else:

    @contextmanager
    def _stepping(files: tuple[str, ...], step: Step) -> Iterator[None]:
        """Have *step* called before each bytecode of *files* on this thread."""

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            del arg
            if not frame.f_code.co_filename.startswith(files):
                return None

            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            if event == "opcode":
                step(frame.f_code, frame.f_lineno)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


def interrupts(*modules: ModuleType) -> Iterator[Interrupt]:
    """
    Give an interrupt for each bytecode in turn; the last does not happen.

    Args:
        modules: Modules whose code is interrupted; packages stand for all of theirs.
    """
    files = tuple(
        str(Path(str(module.__file__)).parent)
        if hasattr(module, "__path__")
        else str(module.__file__)
        for module in modules
    )
    step = 0
    while True:
        interrupt = Interrupt(step, files)
        yield interrupt
        if interrupt.place is None:
            return
        step += 1
