"""
Functions of a library that are wrapped while an integration is installed.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import wrapt

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Patches", "Wrapper"]

Wrapper: TypeAlias = "Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]"
"""Takes the wrapped function, its instance, the arguments and the keywords."""


class Patches:
    """
    The patches of one integration: all on or all off.

    Where somebody else wrapped a function after us, taking ours off would take theirs
    off, too.  It then stays below theirs, and does nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: list[_Patch] = []

    @property
    def is_on(self) -> bool:
        """Whether the functions are wrapped."""
        return bool(self._on)

    def install(self, *places: tuple[Any, str, Wrapper]) -> None:
        """
        Wrap functions, unless that is done.

        Args:
            places: The class or module that has the function, its name, the wrapper.
        """
        with self._lock:
            if not self._on:
                self._on = [_Patch(*place) for place in places]

    def uninstall(self) -> None:
        """Undo it."""
        with self._lock:
            while self._on:
                self._on.pop().undo()


class _Patch:
    __slots__ = ("_is_on", "_name", "_owner", "_patched")

    def __init__(self, owner: Any, name: str, wrapper: Wrapper) -> None:
        self._owner = owner
        self._name = name
        self._is_on = True
        self._patched = wrapt.FunctionWrapper(
            vars(owner)[name], wrapper, enabled=lambda: self._is_on
        )
        setattr(owner, name, self._patched)

    def undo(self) -> None:
        self._is_on = False
        if vars(self._owner)[self._name] is self._patched:
            setattr(self._owner, self._name, self._patched.__wrapped__)
