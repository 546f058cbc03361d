"""The ordered table of one kind of backends; a module is imported when its backend is first asked."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar


class Named(Protocol):
    """What every backend has."""

    name: str


AnyBackend = TypeVar("AnyBackend", bound=Named)


class BackendTable(Generic[AnyBackend]):
    """``entries``: name, module and attribute of each backend, in the order in which they are asked.

    ``reference``: the definition, which comes last. ``kind``: what they are for, in messages.
    """

    def __init__(
        self, entries: Sequence[tuple[str, str, str]], reference: AnyBackend, kind: str = "a backend"
    ) -> None:
        self._places = {name: (module, attribute) for name, module, attribute in entries}
        self._kind = kind
        self._found: dict[str, AnyBackend | str] = {reference.name: reference}
        self.names = (*self._places, reference.name)

    def find(self, name: str) -> AnyBackend | str:
        """Return the backend called ``name``, or the reason why its module does not import.

        Raises:
            ValueError: no backend has this name.
        """
        if name not in self._found:
            if name not in self._places:
                raise ValueError(f"expected {self._kind} of {self.names}, got {name!r}. Choose one of these.")
            self._found[name] = self._load(*self._places[name])
        return self._found[name]

    def _load(self, module: str, attribute: str) -> Any:
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            return f"not available: {error}"
