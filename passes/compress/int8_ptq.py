"""*quantize-int8-ptq*: weights and activations of a whole component in 8 bit, with SmoothQuant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration.activations import BlockInputs, read_activations
from manifests.errors import BadInputError
from passes.base import Pass
from passes.compress.weights import quiet_nncf
from passes.export.ir import number_names

__all__ = ["QuantizeInt8PtqPass"]


@dataclass(frozen=True)
class QuantizeInt8PtqPass(Pass):
    """`nncf.quantize` with the transformer preset; SmoothQuant (Xiao et al., 2022) moves outliers into the weights.

    Attributes:
        smooth_quant_alpha: 0 leaves the activations as they are, 1 moves everything into the weights.
    """

    name = "quantize-int8-ptq"

    smooth_quant_alpha: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.smooth_quant_alpha <= 1:
            raise BadInputError(f"smooth-quant alpha {self.smooth_quant_alpha} is out of range: use 0 to 1")

    def run(self, source: Path, samples: tuple[BlockInputs, ...], output: Path) -> None:
        """Quantize the float32 IR `source` on the samples and write the IR `output`; other weights become float16."""
        import nncf
        import openvino as ov

        model = ov.Core().read_model(source)
        with quiet_nncf():
            quantized = nncf.quantize(
                model,
                nncf.Dataset(samples, read_activations),
                subset_size=len(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=self.smooth_quant_alpha)
                ),
            )
        ov.save_model(quantized, output, compress_to_fp16=True)
        number_names(output)
