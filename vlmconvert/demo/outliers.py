"""Outlier channels: training creates them in large language models, but not in models as small as the demo.

In a large model, a few channels between the MLP's projections have activations far above the others, and they matter
most for the output; 4-bit weights that are chosen without activations have the largest errors there (Lin et al., 2023,
"AWQ", section 3). Without outlier channels, compression with activations would improve nothing on the demo, and tests
could not show its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["add_outlier_channels"]

_CHANNELS = 16
_FACTOR = 16.0


@torch.no_grad()
def add_outlier_channels(mlps: Sequence[Any], run: Callable[[], object]) -> None:
    """Give every MLP outlier channels without changing what it computes.

    The channels that contribute most to the output are moved to the front, so that they are in one group of weights.
    The rows of the up projection are multiplied by a power of two, and the columns of the down projection divided by
    it, which is exact in every float dtype.

    Args:
        mlps: modules with gate_proj, up_proj and down_proj.
        run: runs the model on typical inputs, to measure the activations.
    """
    magnitudes: dict[int, torch.Tensor] = {}

    def watch(index: int) -> Callable[[Any, Any], None]:
        def hook(module: Any, inputs: tuple[torch.Tensor]) -> None:
            magnitudes[index] = inputs[0].abs().flatten(0, -2).mean(0)

        return hook

    hooks = [mlp.down_proj.register_forward_pre_hook(watch(index)) for index, mlp in enumerate(mlps)]
    run()
    for hook in hooks:
        hook.remove()
    for index, mlp in enumerate(mlps):
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        contribution = magnitudes[index] * down.norm(dim=0)
        outliers = contribution.argsort(descending=True)[:_CHANNELS]
        rest = torch.ones_like(contribution, dtype=torch.bool).index_fill_(0, outliers, False).nonzero()[:, 0]
        order = torch.cat([outliers, rest])
        gate.copy_(gate[order])
        up.copy_(up[order])
        down.copy_(down[:, order])
        up[:_CHANNELS] *= _FACTOR
        down[:, :_CHANNELS] /= _FACTOR
