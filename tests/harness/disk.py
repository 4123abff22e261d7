"""
A disk that fails, at one system call or from one on.
"""

from __future__ import annotations

import fcntl
import io
import os
import stat
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BY_PATH = [
    *((os, name) for name in ("open", "scandir")),
    *((Path, name) for name in ("mkdir", "rename", "unlink", "rmdir")),
    *((Path, name) for name in ("lstat", "stat", "iterdir")),
]
"""What takes a path first."""

_BY_NUMBER: list[tuple[Any, str]] = [(os, name) for name in ("write", "fsync")]
_BY_NUMBER += [(fcntl, "flock")]
"""What takes a descriptor first."""


class BrokenDisk:
    """
    Have calls fail that are about a folder and what is in it.

    Args:
        root: The folder; what is elsewhere works.

        error: The number of the error.

        fails: Tells by the number of a call, from 0, whether it fails.

    Attributes:
        calls: The names of the calls so far.
    """

    def __init__(
        self,
        root: Path,
        *,
        error: int = 0,
        fails: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._root = str(root)
        self._error = error
        self._fails = fails
        self._numbers: set[int] = set()
        self.calls: list[str] = []

    @contextmanager
    def breaking(self) -> Iterator[BrokenDisk]:
        """
        Have the calls of this block go through here.
        """
        with ExitStack() as stack:
            for owner, name in _BY_PATH:
                self._patch(stack, owner, name, self._is_inside)
            for owner, name in _BY_NUMBER:
                self._patch(stack, owner, name, self._numbers.__contains__)
            stack.enter_context(mock.patch.object(os, "fdopen", self._open))
            yield self

    def _is_inside(self, path: object) -> bool:
        return str(path).startswith(self._root)

    def _patch(
        self,
        stack: ExitStack,
        owner: Any,
        name: str,
        is_ours: Callable[[Any], bool],
    ) -> None:
        original = getattr(owner, name)

        def call(first: Any, *args: Any, **options: Any) -> Any:
            if not is_ours(first):
                return original(first, *args, **options)
            self.count(name)
            result = original(first, *args, **options)
            if name == "open":
                self._numbers.add(result)
            return result

        stack.enter_context(mock.patch.object(owner, name, call))

    def count(self, name: str) -> None:
        """
        Count a call, and fail if it is one that is to fail.
        """
        self.calls.append(name)
        if self._fails(len(self.calls) - 1):
            raise OSError(self._error, os.strerror(self._error))

    def _open(self, number: int, mode: str = "r", buffering: int = -1) -> Any:
        if number not in self._numbers:
            return _fdopen(number, mode, buffering)
        raw = _File(self, number, mode)
        return io.BufferedReader(raw) if buffering else raw


_fdopen = os.fdopen


class _File(io.FileIO):
    def __init__(self, disk: BrokenDisk, number: int, mode: str) -> None:
        super().__init__(number, mode)
        self._disk = disk

    def readinto(self, buffer: Any) -> int:
        self._disk.count("read")
        return super().readinto(buffer) or 0

    def write(self, data: Any) -> int:
        self._disk.count("write")
        return super().write(bytes(data[: max(len(data) // 2, 1)])) or 0


def open_descriptors() -> set[tuple[int, int, int]]:
    """Return which files and folders descriptors of this process are open on."""
    found = set()
    for number in map(int, os.listdir("/dev/fd")):  # noqa: PTH208  they are no paths
        with suppress(OSError):  # the one that lists them
            status = os.fstat(number)
            if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                found.add((number, status.st_dev, status.st_ino))
    return found
