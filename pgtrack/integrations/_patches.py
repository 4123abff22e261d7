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


_patching = threading.Lock()
"""Held while functions are wrapped or not: integrations may share one."""


class Patches:
    """
    The patches of one integration: all on or all off.

    Where somebody else wrapped a function after us, taking ours off would take theirs
    off, too.  It then stays below theirs, and does nothing.
    """

    def __init__(self) -> None:
        self._on: list[_Patch] = []

    @property
    def is_on(self) -> bool:
        """Whether the functions are wrapped."""
        return bool(self._on)

    def install(self, *places: tuple[Any, str, Wrapper]) -> None:
        """
        Wrap functions, unless that is done; all of them, or none by an exception.

        Args:
            places: The class or module that has the function, its name, the wrapper.
        """
        with _patching:
            if not self._on:
                # Looked up before the first is wrapped: a version may lack one.
                found = [vars(owner)[name] for owner, name, _ in places]
                self._on = [
                    _Patch(owner, name, wrapper, function)
                    for (owner, name, wrapper), function in zip(
                        places, found, strict=True
                    )
                ]

    def uninstall(self) -> None:
        """Undo it."""
        with _patching:
            while self._on:
                self._on.pop().undo()


class _Patch:
    __slots__ = ("_name", "_owner", "_patched")

    def __init__(self, owner: Any, name: str, wrapper: Wrapper, function: Any) -> None:
        self._owner = owner
        self._name = name
        self._patched = _Patched(function, wrapper)
        setattr(owner, name, self._patched)

    def undo(self) -> None:
        self._patched._self_is_on = False  # noqa: SLF001  it is ours
        # Those below it as well that had to stay there when they were taken off.
        while type(top := vars(self._owner)[self._name]) is _Patched:
            if top._self_is_on:  # noqa: SLF001
                break
            setattr(self._owner, self._name, top.__wrapped__)


class _Patched(wrapt.FunctionWrapper):  # type: ignore[misc, type-arg, unused-ignore]
    """A function that is wrapped, until it is said to be as it was."""

    def __init__(self, function: Any, wrapper: Wrapper) -> None:
        self._self_is_on = True
        super().__init__(function, wrapper, enabled=lambda: self._self_is_on)
