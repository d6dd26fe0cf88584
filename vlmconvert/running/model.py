"""A finished artifact with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from passes.checkpoint import read_config
from passes.compat.transformers import GraphState, StatefulGeneration
from vlmconvert.running.open import open_runner

__all__ = ["VisionLanguageModel"]


class VisionLanguageModel(StatefulGeneration, GenerationMixin):
    """An artifact with `generate` and `forward`, the interface of the checkpoint's own class in transformers.

    Its inputs are the outputs of the checkpoint's processor, as torch tensors; the logits are float32. An object
    generates for one sequence or one batch at a time, because the graph keeps the cache.

    Args:
        folder: the artifact.
        device: OpenVINO device name.
        ov_config: OpenVINO compile options.
        cache_dir: folder where OpenVINO keeps compiled models.

    Raises:
        BadInputError: if the folder is not an artifact, or OpenVINO refuses the device or an option.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.runner = open_runner(folder, device, ov_config, cache_dir)
        values = read_config(folder)
        values["model_type"] = self.runner.family.model_type  # GenAI may call it otherwise
        self.config = AutoConfig.for_model(**values)
        self.generation_config = (
            GenerationConfig.from_pretrained(folder, local_files_only=True)
            if (folder / "generation_config.json").exists()
            else GenerationConfig.from_model_config(self.config)
        )
        self._beams = 1
        self._beam_idx: np.ndarray | None = None

    @property
    def device(self) -> torch.device:
        """Device of the input tensors: the CPU, whatever device the graphs run on."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits."""
        return torch.float32

    def __call__(self, *arguments: Any, **options: Any) -> CausalLMOutputWithPast:
        """See `forward`."""
        return self.forward(*arguments, **options)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: GraphState | None = None,
        return_dict: bool = True,
        **processed: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model: a prefill or, with the `past_key_values` of the previous call, one step for the last tokens.

        Args:
            input_ids: [batch, sequence].
            past_key_values: the value that the previous call returned; None starts a new sequence.
            return_dict: as in transformers; only True is supported.
            processed: the other outputs of the processor, such as `attention_mask` and `pixel_values`.

        Returns:
            Logits [batch, positions, vocabulary], float32: for the last position, or for all positions if the artifact
            was converted with --logits all.
        """
        if past_key_values is None:
            arrays = {
                # NumPy has no bfloat16.
                name: (value.float() if value.is_floating_point() else value).numpy(force=True)
                for name, value in {"input_ids": input_ids, **processed}.items()
                if isinstance(value, torch.Tensor) and name in self.runner.family.processor_outputs
            }
            arrays.setdefault("attention_mask", np.ones(arrays["input_ids"].shape, np.int64))
            logits = self.runner.prefill(arrays, beams=self._beams)
            past_key_values = GraphState()
        else:
            logits = self.runner.step(np.asarray(input_ids[:, -1]), self._beam_idx)
        self._beam_idx = None
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=past_key_values)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """See `transformers.GenerationMixin.generate`."""
        self._beams = 1
        try:
            return super().generate(*arguments, **options)
        finally:
            self._beams = 1

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **model_kwargs: Any) -> dict[str, Any]:
        """Pass all inputs to the prefill, and only the new token to each later step: the graph keeps the rest."""
        if model_kwargs.get("past_key_values") is not None:
            return {"input_ids": input_ids[:, -1:], "past_key_values": model_kwargs["past_key_values"]}
        return {"input_ids": input_ids, **model_kwargs}

    def check_inputs(self, given: set[str]) -> None:
        """See `StatefulGeneration`."""
        known = set(self.runner.family.processor_outputs)
        if unknown := sorted(given - known):
            raise ValueError(
                f"generate has no option {', '.join(unknown)} for this model: the model's inputs are {', '.join(sorted(known))}"
            )

    def repeat_rows(self, times: int) -> None:
        """See `StatefulGeneration`; the beams of a sequence have the same images, which are encoded once."""
        self._beams = times

    def reorder_rows(self, rows: np.ndarray) -> None:
        """See `StatefulGeneration`."""
        self._beam_idx = rows
