"""*scale-activations*: the activations of a graph stay in the range of half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import BadInputError, ConversionError
from passes.graph_pass import Graph, GraphPass

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["ScaleActivationsPass"]

_OPTION = ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]


@dataclass(frozen=True)
class ScaleActivationsPass(GraphPass):
    """Let OpenVINO divide activations by `activations_scale` where it computes in half precision."""

    name = "scale-activations"

    activations_scale: float = 8.0

    def __post_init__(self) -> None:
        if self.activations_scale <= 0:
            raise BadInputError(
                f"pass {self.name}: activations_scale={self.activations_scale} is not positive: use 8.0"
            )

    def apply(self, model: ov.Model, graph: Graph) -> ov.Model:
        model.set_rt_info(str(self.activations_scale), _OPTION)
        return model

    def ensures(self, model: ov.Model, graph: Graph) -> None:
        if model.get_rt_info(_OPTION).astype(str) != str(self.activations_scale):
            raise ConversionError("the graph does not keep its runtime options")
