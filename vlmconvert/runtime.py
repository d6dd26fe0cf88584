"""Running a finished artifact: compile its graphs, prefill, decode, generate greedily."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import passes  # noqa: F401  keeps telemetry off before openvino is imported
from manifests.io import read_manifest
from vlmconvert.families import family_module

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Runner"]


class Runner:
    """An artifact in OpenVINO.

    Args:
        folder: the artifact; its manifest says what it holds.
        device: an OpenVINO device name.
        ov_config: OpenVINO compile options. By default graphs compute in the precision that they are stored in
            (`EXECUTION_MODE_HINT` ACCURACY), so that figures do not depend on what the processor supports.
    """

    def __init__(self, folder: Path, device: str = "CPU", ov_config: dict[str, Any] | None = None) -> None:
        import openvino as ov

        self.manifest = read_manifest(folder)
        self.family = family_module(self.manifest.family)
        self.config = _read_json(folder / "config.json")
        # A generation config may name several tokens that end an answer, the model's config only one.
        generation = (
            _read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
        )
        ends = generation.get("eos_token_id", self.config["text_config"]["eos_token_id"])
        self.ends = ends if isinstance(ends, list) else [ends]
        self._pad = generation.get("pad_token_id", self.ends[0])
        options = {"EXECUTION_MODE_HINT": "ACCURACY", **(ov_config or {})}
        core = ov.Core()
        self._compiled: dict[str, ov.CompiledModel] = {}
        for component in self.manifest.components:
            xml = next(folder / record.path for record in component.files if record.path.endswith(".xml"))
            self._compiled[component.name] = core.compile_model(xml, device, options)
        self._vision = self._compiled["vision_encoder"].create_infer_request()
        self._language = self._compiled["language_model"].create_infer_request()
        self._inputs: dict[str, np.ndarray] = {}

    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The vision encoder's outputs by name, for processor outputs with `pixel_values`."""
        values = self.family.inputs(processed, self.config)
        ports = self._compiled["vision_encoder"].inputs
        results = self._vision.infer({port.get_any_name(): values[port.get_any_name()] for port in ports})
        return {port.get_any_name(): np.array(value) for port, value in results.items()}

    @property
    def key_values(self) -> dict[str, np.ndarray]:
        """The vision encoder's outputs of the last prefill that the language model takes."""
        taken = {port.get_any_name() for port in self._compiled["language_model"].inputs}
        made = {port.get_any_name() for port in self._compiled["vision_encoder"].outputs}
        return {name: self._inputs[name] for name in taken & made}

    def prefill(self, processed: dict[str, np.ndarray], key_values: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Start a sequence from processor outputs.

        Args:
            processed: as the checkpoint's processor gives them, as numpy arrays.
            key_values: vision encoder outputs to use instead of running it.

        Returns:
            Logits [batch, 1 or sequence, vocabulary], float32.
        """
        self._inputs = self.family.inputs(processed, self.config)
        if key_values is not None:
            self._inputs |= key_values
        elif "pixel_values" in self._inputs:
            self._inputs |= self.encode_images(processed)
        batch = self._inputs["input_ids"].shape[0]
        self._inputs["beam_idx"] = np.arange(batch, dtype=np.int32)
        self._language.reset_state()
        return self._infer()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token to every row; tokens [batch]; returns logits [batch, 1, vocabulary]."""
        self._inputs = self.family.next_inputs(self._inputs, tokens)
        return self._infer()

    def generate(self, processed: dict[str, np.ndarray], max_new_tokens: int) -> Iterator[np.ndarray]:
        """Greedy decoding: yields tokens [batch] until every row has ended; rows that ended get their padding token."""
        logits = self.prefill(processed)
        ended = np.zeros(logits.shape[0], bool)
        for position in range(max_new_tokens):
            tokens = logits[:, -1].argmax(axis=-1)
            tokens[ended] = self._pad
            yield tokens
            ended |= np.isin(tokens, self.ends)
            if ended.all() or position == max_new_tokens - 1:
                return
            logits = self.step(tokens)

    def _infer(self) -> np.ndarray:
        ports = self._compiled["language_model"].inputs
        results = self._language.infer({port.get_any_name(): self._inputs[port.get_any_name()] for port in ports})
        return np.array(results["logits"])


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
