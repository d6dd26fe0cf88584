"""The checkpoint in torch, one block at a time: a reference for checkpoints larger than memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from passes.checkpoint import Checkpoint
from passes.export.template import Templates
from passes.split import Block, Component

__all__ = ["StreamedModel"]

Arrays = dict[str, np.ndarray]
Values = dict[str, torch.Tensor]


class StreamedModel:
    """The family's blocks in float32, with the interface of `passes.validate.protocol.Model`.

    A call reads every block's weights once and computes the whole batch with them, so large batches cost little more than
    small ones.

    Args:
        checkpoint: the opened checkpoint.
        templates: its config and tensor names.
        components: in the order of the data flow; the last one has the LM head.
        inputs: the family's way from processor outputs and config to the components' inputs.
        next_inputs: the family's way from one call's inputs and its tokens [batch] to the next call's.
        keep: bytes of weights that may stay in memory between calls.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        templates: Templates,
        components: tuple[Component, ...],
        inputs: Callable[[Arrays, dict[str, Any]], Arrays],
        next_inputs: Callable[[Arrays, np.ndarray], Arrays],
        keep: int = 0,
    ) -> None:
        self._checkpoint = checkpoint
        self._config, self._names = templates.config, templates.names
        self._components = components
        self._family_inputs, self._family_next_inputs = inputs, next_inputs
        self._left = keep
        self._kept: dict[tuple[str, str], torch.nn.Module] = {}
        made = {port.name for component in components[:-1] for port in component.outputs}
        self._shared = sorted(made & {port.name for port in components[-1].inputs})
        self._inputs: Arrays = {}
        self._carried: Values = {}

    @property
    def key_values(self) -> Arrays:
        """See `passes.validate.protocol.Model`."""
        return {name: self._carried[name].numpy() for name in self._shared}

    @torch.no_grad()
    def prefill(self, processed: Arrays, key_values: Arrays | None = None) -> np.ndarray:
        """See `passes.validate.protocol.Model`; the logits are those of the last position."""
        self._inputs = self._family_inputs(processed, self._config)
        values = _tensors(self._inputs)
        if key_values is not None:
            values |= _tensors(key_values)
        elif "pixel_values" in values:
            for component in self._components[:-1]:
                outputs = self._run(component, dict(values))
                values |= {port.name: outputs[port.name] for port in component.outputs}
        return self._logits(values)

    @torch.no_grad()
    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `passes.validate.protocol.Model`."""
        self._inputs = self._family_next_inputs(self._inputs, tokens)
        return self._logits({**_tensors(self._inputs), **self._carried})

    def _logits(self, values: Values) -> np.ndarray:
        language = self._components[-1]
        values = self._run(language, values)
        self._carried = {past: values[present] for past, present in language.state.items()}
        self._carried |= {name: values[name] for name in self._shared}
        return values["logits"].numpy()

    def _run(self, component: Component, values: Values) -> Values:
        for block in component.blocks:
            kind = component.kinds[block.kind]
            arguments = [values[block.inputs[port.name]] for port in kind.inputs]
            if block.role == "head":
                arguments = [argument[:, -1:] for argument in arguments]
            outputs = self._module(component, block)(*arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for port, output in zip(kind.outputs, outputs, strict=True):
                if port.name in block.outputs:
                    values[block.outputs[port.name]] = output
        return values

    def _module(self, component: Component, block: Block) -> torch.nn.Module:
        key = (component.name, block.name)
        if key in self._kept:
            return self._kept[key]
        kind = component.kinds[block.kind]
        package, _, attribute = kind.module.partition(":")
        module: torch.nn.Module = getattr(importlib.import_module(package), attribute)(self._config, **kind.options)
        weights = {
            parameter: torch.from_numpy(self._checkpoint.read(self._names[tensor]))
            for parameter, tensor in block.tensors.items()
        }
        module.load_state_dict(weights, strict=False, assign=True)
        size = sum(weight.nbytes for weight in weights.values())
        if size <= self._left:
            self._left -= size
            self._kept[key] = module.eval()
        return module.eval()


def _tensors(arrays: Arrays) -> Values:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
