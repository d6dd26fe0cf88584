"""A model that is computed block by block, for checkpoints and artifacts that are larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from passes.chain import BlockModels, Compute
from passes.checkpoint import Checkpoint
from passes.compat.torch import put_tensor
from passes.flow import run_components
from passes.tables import large_table, pieces
from passes.vocabulary import Block, Component, handed_over

__all__ = ["StreamedModel", "TorchBlocks"]

Arrays = dict[str, np.ndarray]


class TorchBlocks:
    """The blocks of a checkpoint as torch modules in float32, with the interface of `passes.chain.BlockModels`.

    Args:
        checkpoint: the opened checkpoint.
        names: in-memory tensor name -> name in the checkpoint's files.
        config: the config with every default filled in.
        keep: maximum number of bytes of weights that stay in memory between calls.
    """

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str], config: dict[str, Any], keep: int = 0) -> None:
        self._checkpoint, self._names, self.config = checkpoint, names, config
        self._left = keep
        self._kept: dict[tuple[str, str], torch.nn.Module] = {}

    def compute(self, component: Component, block: Block) -> Compute:
        """See `BlockModels`; of large embeddings only the rows are read that are looked up, and a large LM head in pieces."""
        key = (component.name, block.name)
        kind = component.kinds[block.kind]
        module = self._kept.get(key) or kind.make_module(self.config)
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        bound = block.bound(shapes).tensors
        table = large_table(block, shapes)
        if key not in self._kept:
            names = {parameter: self._names[tensor] for parameter, tensor in bound.items() if parameter != table}
            weights = {parameter: torch.from_numpy(self._checkpoint.read(name)) for parameter, name in names.items()}
            module.load_state_dict(weights, strict=False, assign=True)
            if table is None:
                self._keep(key, module, sum(weight.nbytes for weight in weights.values()))

        @torch.no_grad()
        def compute(values: Arrays) -> Arrays:
            arguments = [torch.from_numpy(np.ascontiguousarray(values[port.name])) for port in kind.inputs]
            outputs = module(*arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return {port.name: output.numpy() for port, output in zip(kind.outputs, outputs, strict=True)}

        if table is None:
            return compute

        def with_rows(values: Arrays, *ranges: tuple[int, int]) -> Arrays:
            rows = [self._checkpoint.read(self._names[bound[table]], part) for part in ranges]
            put_tensor(module, table, torch.from_numpy(np.concatenate(rows)))
            return compute(values)

        def in_pieces(values: Arrays) -> Arrays:
            parts = [with_rows(values, part) for part in pieces(shapes[table])]
            return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}

        def looked_up(values: Arrays) -> Arrays:
            ((port, ids),) = values.items()
            rows, positions = np.unique(ids, return_inverse=True)
            return with_rows({port: positions.reshape(ids.shape)}, *((int(row), int(row) + 1) for row in rows))

        return in_pieces if block.role == "head" else looked_up

    def _keep(self, key: tuple[str, str], module: torch.nn.Module, size: int) -> None:
        if size <= self._left:
            self._left -= size
            self._kept[key] = module


class StreamedModel:
    """A model of which one block at a time is in memory, with the interface of `passes.validate.model.Model`.

    Each call loads every block once for the whole batch, so large batches take little longer than small ones.

    Args:
        blocks: the blocks, of a checkpoint or of an artifact.
        config: the config with every default filled in.
        components: the components in the order of the data flow; the last one has the LM head.
        inputs: the family's function that takes processor outputs and config, and returns the components' inputs.
        next_inputs: the family's function that takes the inputs of a call and the next tokens [batch], and returns the
            inputs of the next call.
        step: called with a label after each block.
    """

    def __init__(
        self,
        blocks: BlockModels,
        config: dict[str, Any],
        components: tuple[Component, ...],
        inputs: Callable[[Arrays, dict[str, Any]], Arrays],
        next_inputs: Callable[[Arrays, np.ndarray], Arrays],
        step: Callable[[str], None] = lambda label: None,
    ) -> None:
        self._step = step
        self._blocks, self._config, self._components = blocks, config, components
        self._family_inputs, self._family_next_inputs = inputs, next_inputs
        self._handed: Arrays = {}
        self._values: Arrays = {}

    @property
    def handed(self) -> Arrays:
        """See `passes.validate.model.Model`."""
        return self._handed

    def encode_images(self, processed: Arrays) -> Arrays:
        """Compute the outputs of the vision side for the processor's outputs, by name."""
        vision = tuple(component for component in self._components if component.side == "vision")
        known = run_components(vision, self._family_inputs(processed, self._config), self._prepare, self._compute)
        made = {port.name for component in vision for port in component.outputs}
        return {name: value for name, value in known.items() if name in made}

    def prefill(self, processed: Arrays, handed: Arrays | None = None, positions: int = 1) -> np.ndarray:
        """See `passes.validate.model.Model`; the logits are those of the last `positions`."""
        self._values = self._family_inputs(processed, self._config) | (handed or {})
        logits = self._logits(positions)
        self._handed = {name: self._values[name] for name in handed_over(self._components) if name in self._values}
        return logits

    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """See `passes.validate.model.Model`.

        Args:
            tokens: [batch].
            beam_idx: [batch], the row of the last call that each row continues; by default, its own.
        """
        rows = slice(None) if beam_idx is None else beam_idx.astype(np.int64)
        state = {name: self._values[name][rows] for name in self._components[-1].state}
        self._values = self._family_next_inputs(self._values, tokens) | state
        return self._logits()

    def forget(self) -> None:
        """Free the values of the last call, which `step` can then not continue."""
        self._values = {}

    def repeat_rows(self, repeat: Callable[[Arrays], Arrays]) -> None:
        """Repeat the rows of the last call, so that more rows continue it.

        Args:
            repeat: takes values of the last component by name, and returns them with their rows repeated.
        """
        last = self._components[-1]
        kept = {*last.state, *last.reads, *(port.name for port in last.inputs)}
        self._values = repeat({name: value for name, value in self._values.items() if name in kept})

    def _logits(self, positions: int = 1) -> np.ndarray:
        def compute(component: Component, inputs: Arrays) -> Arrays:
            return self._compute(component, inputs, positions)

        self._values = run_components(self._components, self._values, self._prepare, compute)
        return self._values["logits"]

    def _prepare(self, component: Component, values: Mapping[str, np.ndarray]) -> Arrays:
        assert component.host_step is not None
        return component.host_step(values, self._config)

    def _compute(self, component: Component, inputs: Arrays, positions: int = 1) -> Arrays:
        values = inputs | {name: self._values[name] for name in component.state}
        for block in component.blocks:
            compute = self._blocks.compute(component, block)
            ports = {port.name: values[block.inputs[port.name]] for port in component.kinds[block.kind].inputs}
            made = _head(compute, ports, positions) if block.role == "head" else compute(ports)
            values |= {value: made[port] for port, value in block.outputs.items()}
            del compute  # so that no two blocks are in memory
            self._step(f"{component.name}, block {block.name}")
        return {port.name: values[port.name] for port in component.outputs} | {
            past: values[present] for past, present in component.state.items()
        }


def _head(compute: Compute, ports: Arrays, positions: int) -> Arrays:
    """Compute the LM head for the last positions only; an artifact's head may compute nothing but the last one."""
    last = {name: value[:, -positions:] for name, value in ports.items()}
    made = compute(last)
    if all(value.shape[1] == positions for value in made.values()):
        return made
    parts = []
    for end in range(1, positions + 1):
        part = compute({name: value[:, :end] for name, value in last.items()})
        parts.append({name: np.array(value) for name, value in part.items()})
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
