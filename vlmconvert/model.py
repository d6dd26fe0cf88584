"""A finished artifact behind transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmconvert.runtime import open_runner

__all__ = ["VisionLanguageModel"]


class GraphState:
    """Stands for the cache, which the language model's graph keeps as its state."""

    is_compileable = False


class VisionLanguageModel(GenerationMixin):
    """An artifact with the interface of the checkpoint's own class, as far as `generate` and a forward call go.

    Inputs are what the checkpoint's processor gives, as torch tensors; logits come back as float32. One object serves one
    sequence (or batch) at a time, because the graph keeps the cache.

    Args:
        folder: the artifact.
        device: an OpenVINO device name.
        ov_config: OpenVINO compile options.
        cache_dir: where OpenVINO keeps compiled models.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = True

    def __init__(
        self,
        folder: Path,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.runner = open_runner(folder, device, ov_config, cache_dir)
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self.generation_config = (
            GenerationConfig.from_pretrained(folder, local_files_only=True)
            if (folder / "generation_config.json").exists()
            else GenerationConfig.from_model_config(self.config)
        )
        self._beams = 1
        self._beam_idx: np.ndarray | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs are expected; the graphs run on the device that was asked for."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        """Always; `generate` asks."""
        return True

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
        """Prefill, or with `past_key_values` of the last call append the last token of each row.

        Args:
            input_ids: [batch, sequence].
            past_key_values: what the last call returned.
            return_dict: as in transformers; only True is meant.
            processed: the processor's other outputs, such as `attention_mask` and `pixel_values`.

        Returns:
            Logits [batch, 1 or sequence, vocabulary] of the last position, or of all in an artifact made with --logits all.
        """
        if past_key_values is None:
            arrays = {
                # NumPy has no bfloat16.
                name: (value.float() if value.is_floating_point() else value).numpy(force=True)
                for name, value in {"input_ids": input_ids, **processed}.items()
                if isinstance(value, torch.Tensor) and name in self.runner.family.PROCESSOR_OUTPUTS
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
        """Everything for the prefill; after it, the graph has all but the new token."""
        if model_kwargs.get("past_key_values") is not None:
            return {"input_ids": input_ids[:, -1:], "past_key_values": model_kwargs["past_key_values"]}
        return {"input_ids": input_ids, **model_kwargs}

    def get_experts_implementation(self) -> dict[str, str]:
        """None; `generate` asks it of every model, for mixtures of experts."""
        return {}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = set(self.runner.family.PROCESSOR_OUTPUTS)
        unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in known)
        if unknown:
            raise ValueError(
                f"generate has no options {', '.join(unknown)} for this model; its inputs are {sorted(known)}"
            )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> Any:
        # The images of a row's beams are the same: they are encoded once.
        self._beams = expand_size
        return super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)

    def _reorder_cache(self, past_key_values: GraphState, beam_idx: torch.Tensor) -> GraphState:
        self._beam_idx = beam_idx.numpy()
        return past_key_values
