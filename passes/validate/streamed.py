"""The checkpoint in torch, one block at a time: a reference for checkpoints larger than memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from passes.checkpoint import Checkpoint
from passes.flow import run_components
from passes.split import Block, Component, handed_over

__all__ = ["StreamedModel"]

Arrays = dict[str, np.ndarray]
Values = dict[str, torch.Tensor]


class StreamedModel:
    """The family's blocks in float32, with the interface of `passes.validate.protocol.Model`.

    A call reads every block's weights once and computes the whole batch with them, so large batches cost little more than
    small ones.

    Args:
        checkpoint: the opened checkpoint.
        names: in-memory tensor name -> name in the checkpoint's files.
        config: the completed config.
        components: in the order of the data flow; the last one has the LM head.
        inputs: the family's way from processor outputs and config to the components' inputs.
        next_inputs: the family's way from one call's inputs and its tokens [batch] to the next call's.
        keep: bytes of weights that may stay in memory between calls.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: dict[str, str],
        config: dict[str, Any],
        components: tuple[Component, ...],
        inputs: Callable[[Arrays, dict[str, Any]], Arrays],
        next_inputs: Callable[[Arrays, np.ndarray], Arrays],
        keep: int = 0,
    ) -> None:
        self._checkpoint = checkpoint
        self._config, self._names = config, names
        self._components = components
        self._family_inputs, self._family_next_inputs = inputs, next_inputs
        self._left = keep
        self._kept: dict[tuple[str, str], torch.nn.Module] = {}
        self._handed: Values = {}
        self._values: Values = {}

    @property
    def handed(self) -> Arrays:
        """See `passes.validate.protocol.Model`."""
        return _arrays(self._handed)

    @torch.no_grad()
    def encode_images(self, processed: Arrays) -> Arrays:
        """What the vision side makes of processor outputs with images, by name."""
        values = _tensors(self._family_inputs(processed, self._config))
        vision = tuple(component for component in self._components if component.side == "vision")
        known = run_components(vision, values, self._prepare, self._compute)
        made = {port.name for component in vision for port in component.outputs}
        return {name: value.numpy() for name, value in known.items() if name in made}

    @torch.no_grad()
    def prefill(self, processed: Arrays, handed: Arrays | None = None) -> np.ndarray:
        """See `passes.validate.protocol.Model`; the logits are those of the last position."""
        self._values = _tensors(self._family_inputs(processed, self._config))
        if handed is not None:
            self._values |= _tensors(handed)
        logits = self._logits()
        self._handed = {name: self._values[name] for name in handed_over(self._components) if name in self._values}
        return logits

    @torch.no_grad()
    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """See `passes.validate.protocol.Model`.

        Args:
            tokens: [batch].
            beam_idx: [batch], the row that each row goes on from; its own by default.
        """
        rows = slice(None) if beam_idx is None else torch.from_numpy(beam_idx.astype(np.int64))
        state = {name: self._values[name][rows] for name in self._components[-1].state}
        self._values = _tensors(self._family_next_inputs(_arrays(self._values), tokens)) | state
        return self._logits()

    def repeat_rows(self, times: int) -> None:
        """Go on from every row of the last call `times` times, one after the other."""
        self._values = {name: value.repeat_interleave(times, dim=0) for name, value in self._values.items()}

    def _logits(self) -> np.ndarray:
        self._values = run_components(self._components, self._values, self._prepare, self._compute)
        return self._values["logits"].numpy()

    def _prepare(self, component: Component, values: Mapping[str, torch.Tensor]) -> Values:
        assert component.host_step is not None
        return _tensors(component.host_step(_arrays(values), self._config))

    def _compute(self, component: Component, inputs: Values) -> Values:
        made = self._run(component, inputs | {name: self._values[name] for name in component.state})
        return {port.name: made[port.name] for port in component.outputs} | {
            past: made[present] for past, present in component.state.items()
        }

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


def _arrays(values: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in values.items()}


def _tensors(arrays: Arrays) -> Values:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
