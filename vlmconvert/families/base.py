"""`Family`, the interface of a family of vision-language models; `docs/extending/family.md` shows how to add one.

A family is one object. It says how its checkpoints split into components, what their graphs take and return, and how prompts
and images enter. Passes, targets and commands get that object and know nothing else about the family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from manifests.errors import BadInputError
from manifests.files import read_json
from passes.checkpoint import read_config

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from passes.ascend.family import AscendFamily
    from passes.validate.model import Model
    from passes.vocabulary import Component

    Arrays = dict[str, np.ndarray]

__all__ = ["Family", "end_tokens", "read_generation_config"]


@dataclass(frozen=True)
class Family(ABC):
    """One family of models.

    Every family is the only object of a subclass. The subclass is defined in a module that can be imported, so that the
    object can be pickled and sent to other processes.

    `config` is the checkpoint's config.json as a dictionary, with every default that transformers fills in. A method that
    works without these defaults says so. `processed` has the outputs of the processor as numpy arrays by name.

    Attributes:
        name: `model_type` of the checkpoint's config, with hyphens or dots, such as `llava-next`.
        architecture: name of transformers' class, such as `LlavaForConditionalGeneration`.
        text_models, vision_models: `model_type`s of the text models and vision towers that are converted, each with a test.
        processor_outputs: names of the processor's outputs that the model takes.
        processor_files: files of the processor that a checkpoint must have, as tuples of alternatives.
        sequence_inputs: names of the `processor_outputs` that have one entry for each token of the prompt along axis 1;
            a maximum sequence length truncates them.
        config_tensors: key of the config -> in-memory name of the tensor whose values runtimes read under that key.
        tokenizer_graphs: whether OpenVINO GenAI runs this family; GenAI needs the tokenizer and detokenizer as graphs.
        crops_for_genai: whether GenAI takes the size of this family's images from the settings of a crop alone.
        genai_config: entries of config.json that GenAI reads and transformers does not write; dictionaries in it are merged.
        ascend: names and settings of the family in runtimes for Ascend; None if these runtimes do not support the
            family.
        demo: folder of a small trained checkpoint that comes with the family; None if there is none.
    """

    name: str
    architecture: str
    processor_outputs: tuple[str, ...]
    text_models: tuple[str, ...] = ()
    vision_models: tuple[str, ...] = ()
    processor_files: tuple[tuple[str, ...], ...] = (
        ("preprocessor_config.json", "processor_config.json"),
        ("tokenizer.json",),
        ("tokenizer_config.json",),
    )
    sequence_inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    config_tensors: Mapping[str, str] = field(default_factory=dict, hash=False)
    tokenizer_graphs: bool = False
    crops_for_genai: bool = True
    genai_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ascend: AscendFamily | None = None
    demo: Path | None = None

    @property
    def model_type(self) -> str:
        """`model_type` of a checkpoint's config."""
        return self.name.replace("-", "_").replace(".", "_")

    @property
    def takes_videos(self) -> bool:
        """Whether prompts may have videos."""
        return any("video" in name for name in self.processor_outputs)

    # Components and tensors of the model.

    @abstractmethod
    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """The components of a model, in the order of the data flow; the last one has the LM head.

        Raises:
            BadInputError: if the config describes a model that cannot be converted.
        """

    def ties(self, config: dict[str, Any]) -> dict[str, str]:
        """In-memory name of each tied tensor -> in-memory name of the tensor whose values it shares."""
        tied = any(part.get("tie_word_embeddings") for part in (config, config["text_config"]))
        return {"lm_head.weight": "model.language_model.embed_tokens.weight"} if tied else {}

    # Inputs of the components.

    @abstractmethod
    def inputs(self, processed: Arrays, config: dict[str, Any]) -> Arrays:
        """The inputs that components and host steps need for a prompt, by name.

        Args:
            processed: `input_ids` and `attention_mask` [batch, sequence], int64; with images also the processor's
                outputs for them.
            config: the completed config (see `complete_config`).

        Returns:
            Arrays in the dtypes of the components' ports (float32, int64), with an empty cache for the language model.
            A prompt without images leaves the inputs for images out.
        """

    @abstractmethod
    def next_inputs(self, previous: Arrays, tokens: np.ndarray) -> Arrays:
        """The inputs for the next token of each sequence in a batch.

        Args:
            previous: inputs and outputs of the previous call by name; the cache may be missing.
            tokens: the token that each sequence is continued with, [batch].

        Returns:
            The same inputs as `inputs` returns, with `input_ids` [batch, 1] and without the cache.
        """

    def repeat_rows(self, inputs: Arrays, times: int) -> Arrays:
        """The inputs of the last component, or some of them, with each sequence of the batch repeated; copies are adjacent."""
        return {name: value.repeat(times, axis=0) for name, value in inputs.items()}

    # Prompts and images.

    @abstractmethod
    def image_token(self, config: dict[str, Any]) -> int:
        """Id of the token that marks an image, or each feature of an image, in `input_ids`.

        `config` may lack the defaults.
        """

    def video_token(self, config: dict[str, Any]) -> int | None:
        """Id of the token that marks each feature of a video in `input_ids`; None if the model takes no videos."""
        return None

    @abstractmethod
    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """Sizes (width, height) of images, one for each way in which the processor cuts images, the largest last.

        Calibration samples include images of all these sizes. `config` may lack the defaults.
        """

    @abstractmethod
    def image_tokens(self, config: dict[str, Any]) -> int:
        """Maximum number of tokens per image in a prompt."""

    def load_processor(self, folder: Path, try_template: bool = True) -> Any:
        """Load the processor of a checkpoint or an artifact from local files, without running code of the checkpoint.

        Args:
            folder: the checkpoint or artifact.
            try_template: whether the chat template must write a question; a template is a program that may take any time.

        Raises:
            BadInputError: if the processor cannot be loaded, or has no chat template.
        """
        from vlmconvert.families.parts.processor import checked_processor

        return checked_processor(folder, self.open_processor, try_template)

    def open_processor(self, folder: Path) -> Any:
        """Open the processor; `load_processor` turns every exception of this method into a `BadInputError`."""
        from vlmconvert.families.parts.processor import open_processor

        return open_processor(folder)

    def prompt(self, processor: Any, turns: Sequence[tuple[str, str | None]], images: int = 1, videos: int = 0) -> str:
        """Write a conversation as text with the chat template.

        Args:
            processor: processor of the checkpoint.
            turns: pairs (question, answer); if the last answer is None, the text ends where the model has to answer.
            images: number of images before the first question.
            videos: number of videos before the first question.
        """
        from vlmconvert.families.parts.processor import chat_prompt

        return chat_prompt(processor, turns, images, videos)

    def process(
        self,
        processor: Any,
        texts: Sequence[str],
        images: Sequence[Sequence[Image]] = (),
        videos: Sequence[Sequence[Sequence[Image]]] = (),
        tensors: Literal["np", "pt"] = "np",
    ) -> dict[str, Any]:
        """Process a batch of prompts with the processor, padded on the left.

        Args:
            processor: processor of the checkpoint.
            texts: the prompts, as `prompt` writes them.
            images: the images of each prompt.
            videos: the videos of each prompt, each video as a sequence of frames.
            tensors: whether the outputs are numpy arrays or torch tensors.

        Returns:
            The processor's outputs by name.

        Raises:
            ValueError: if the number of image tokens in a prompt is not its number of images.
        """
        from vlmconvert.families.parts.processor import process

        return process(processor, texts, images, videos, tensors)

    def prompt_inputs(self, processor: Any, images: Sequence[Sequence[Image]], prompts: Sequence[str]) -> Arrays:
        """Process a batch of questions, each with its images, with the chat template and the processor."""
        pairs = zip(prompts, images, strict=True)
        texts = [self.prompt(processor, ((prompt, None),), len(own)) for prompt, own in pairs]
        return self.process(processor, texts, images)

    # The whole model.

    def end_tokens(self, folder: Path) -> list[int]:
        """Ids of the tokens that end an answer of the checkpoint or artifact in a folder."""
        return end_tokens(folder)

    @abstractmethod
    def reference(self, folder: Path) -> Model:
        """Load the checkpoint in torch, in float32; artifacts are compared with it."""


def end_tokens(folder: Path) -> list[int]:
    """Ids of the tokens that end an answer, from the generation config or, if it has none, from config.json.

    Raises:
        BadInputError: if there are none, or they are no ids.
    """
    ends = read_generation_config(folder).get("eos_token_id")
    if not ends:
        text = read_config(folder).get("text_config")
        ends = text.get("eos_token_id") if isinstance(text, dict) else None
    ends = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise BadInputError(
            f"{folder} does not say which tokens end an answer: set eos_token_id in its generation_config.json"
        )
    return ends


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; empty if there is none.

    Raises:
        BadInputError: if it is not a JSON object.
    """
    path = folder / "generation_config.json"
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise BadInputError(f"{path} is not a JSON object: fetch the file again")
    return content
