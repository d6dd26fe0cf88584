"""Graph passes, which turn a component's OpenVINO graph into another while its weights stay on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from manifests.model import FileRecord
from passes.base import Context, Form, Intermediate, TransformPass, named_failure
from passes.export.ir import write
from passes.store import digest
from passes.vocabulary import Component

if TYPE_CHECKING:
    import openvino as ov

    from passes.export.ir import Detached

__all__ = ["Graph", "GraphPass"]


class Graph(Intermediate):
    """A component as one OpenVINO graph, whose weights are put in when it is saved.

    Args:
        component: describes what the graph computes.
        key: see `Intermediate`.
        before: the blocks that the graph is made of.
        build: returns the graph without its weights, and the places of their bytes.
        exact: whether the weights are those of the checkpoint in float32.
        done: names of the passes that `build` runs.
    """

    def __init__(
        self,
        component: Component,
        key: str,
        before: Intermediate,
        build: Callable[[], Detached],
        exact: bool,
        done: tuple[str, ...],
    ) -> None:
        self.component, self.key, self.exact, self.done = component, key, exact, done
        self.build, self._before = build, before

    def prepare(self) -> None:
        """See `Intermediate`."""
        self._before.prepare()

    def discard(self) -> None:
        """See `Intermediate`."""
        self._before.discard()

    def save(self, xml: Path) -> list[FileRecord]:
        """Write the graph as `xml` and its weights beside it.

        Returns:
            Records of the files that were hashed while they were written.
        """
        model, weights = self.build()
        return [write(model, weights, xml)]

    def followed_by(self, item: GraphPass) -> Graph:
        """The same graph after one more pass."""

        def build() -> Detached:
            model, weights = self.build()
            with named_failure(item, self.component.name, after=self.done):
                item.requires(model, self)
                model = item.apply(model, self)
                item.ensures(model, self)
            return model, weights

        key = digest(self.key, str(item), item.version)
        return Graph(self.component, key, self, build, self.exact, (*self.done, item.name))


@dataclass(frozen=True)
class GraphPass(TransformPass, ABC):
    """A pass over a whole component's graph."""

    takes: ClassVar[tuple[Form, ...]] = (Form.GRAPH,)

    @property
    def makes(self) -> Form:
        return Form.GRAPH

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, Graph)
        return before.followed_by(self)

    def requires(self, model: ov.Model, graph: Graph) -> None:
        """Raise `ConversionError` if the pass cannot work on `model`."""

    @abstractmethod
    def apply(self, model: ov.Model, graph: Graph) -> ov.Model:
        """Transform the graph.

        Args:
            model: the graph; its large constants are inputs, see `passes.export.ir`.
            graph: facts about the graph, above all its component.
        """

    def ensures(self, model: ov.Model, graph: Graph) -> None:
        """Raise `ConversionError` if `model`, the transformed graph, lacks what the pass promises."""
