"""Registries of named objects, from vlmconvert and from installed packages, that are imported when they are needed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from manifests.errors import BadInputError

__all__ = ["Registry", "load_object"]


def load_object(reference: str) -> Any:
    """Import the object `package.module:attribute`; the attribute may be a path with dots."""
    module, _, path = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@dataclass(frozen=True)
class Registry:
    """Name -> object, for objects of one kind.

    Attributes:
        kind: what error messages call such an object, such as `target`.
        group: the entry point group through which installed packages add their objects.
        base: `package.module:Class` of which every object must be an instance; its attribute `name` is its name.
        builtin: name -> `package.module:attribute`, or the object itself if importing it is cheap.
        classes: whether the objects are subclasses of `base` instead.
    """

    kind: str
    group: str
    base: str
    builtin: dict[str, Any] = field(hash=False)
    classes: bool = False

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            known = found.setdefault(point.name, [])
            if point.value not in [other.value for other in known]:
                known.append(point)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """All names, vlmconvert's own first; no object is imported for them."""
        return tuple(dict.fromkeys((*self.builtin, *self._installed)))

    def __contains__(self, name: str) -> bool:
        return name in self.builtin or name in self._installed

    def load(self, name: str) -> Any:
        """The object of that name.

        Raises:
            BadInputError: if no object has that name, two have it, or the package that adds it cannot be imported.
        """
        if name not in self:
            raise BadInputError(f"there is no {self.kind} {name}: choose from {', '.join(sorted(self.names))}")
        points = self._installed.get(name, [])
        if len(points) + (name in self.builtin) > 1:
            raise BadInputError(
                f"the installed package {_owner(points[-1])} brings a {self.kind} {name}, and there is another one of that name: "
                "uninstall one of the two"
            )
        found: Any = self.builtin.get(name)
        owner = "vlmconvert" if found is not None else _owner(points[0])
        try:
            if found is None:
                found = points[0].load()
            elif isinstance(found, str):
                found = load_object(found)
        except Exception as error:
            raise BadInputError(
                f"the {self.kind} {name} of the installed package {owner} cannot be imported ({error}): fix or uninstall it"
            ) from error
        base = load_object(self.base)
        fits = isinstance(found, type) and issubclass(found, base) if self.classes else isinstance(found, base)
        if not fits or getattr(found, "name", None) != name:
            raise BadInputError(
                f"the installed package {owner} registers a {self.kind} {name} that is not a {self.base.replace(':', '.')} of that "
                "name: fix or uninstall it"
            )
        return found


def _owner(point: EntryPoint) -> str:
    """Name of the package that adds an entry point."""
    return point.dist.name if point.dist else point.value
