"""The rules by which Ascend runtimes load a W8A16 folder, checked without an NPU.

Each rule is a small function over the folder's metadata, named after what it requires. A rule also names the reader that
requires it: `format` is the format itself (msmodelslim's reader), `mindie` is MindIE-LLM's ATB models (as of April 2026), and
`vllm-ascend` is vllm-ascend (as of August 2026). The rules follow the public sources of these readers.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import BadInputError
from manifests.verify import Finding, failed, passed, skipped
from passes.ascend.dequantize import read_description, weight_files
from passes.ascend.family import AscendFamily
from passes.ascend.format import DESCRIPTION_NAME
from passes.ascend.w8a16 import OFFSET, SCALE, W8A16
from passes.checkpoint import Checkpoint, read_config
from passes.header import FLOAT_DTYPES, TensorInfo, read_header
from passes.tensor_pass import FLOAT

__all__ = ["RULES", "Rule", "check_folder"]

# Keys of the description that are not names of tensors.
_SETTINGS = {"model_quant_type", "version", "group_size"}
_ROPE_KEYS = {
    "type",
    "rope_type",
    "factor",
    "long_factor",
    "short_factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mrope_section",
    "mrope_interleaved",
}
# Prefix of the names of weight files and their index; the type of the weights follows.
_WEIGHTS_PREFIX = "quant_model_weight"
_ROPE_TYPES = {"dynamic", "yarn", "llama3"}
_OLD_ROPE_TYPES = {"linear", "su", "longrope", *_ROPE_TYPES}

# A place in the artifact, and a sentence that says how it breaks a rule.
Breach = tuple[str, str]


@dataclass(frozen=True)
class Folder:
    """The parts of an artifact that the rules look at: metadata, and on demand the values of scales and offsets.

    `tensors` holds a list for each name, since a faulty artifact may have a tensor of the same name in two files.
    """

    path: Path
    family: AscendFamily
    config: dict[str, Any]
    description: dict[str, Any]
    tensors: dict[str, list[TensorInfo]]

    @property
    def text(self) -> dict[str, Any]:
        """The language model's config."""
        return self.config.get("text_config") or {}

    @property
    def kinds(self) -> dict[str, str]:
        """Type of each described tensor."""
        return {name: str(kind) for name, kind in self.description.items() if name not in _SETTINGS}

    @property
    def quantized(self) -> list[str]:
        """Names of the quantized linear layers."""
        return [
            name.removesuffix(".weight")
            for name, kind in self.kinds.items()
            if kind == W8A16 and name.endswith(".weight")
        ]

    def read(self, name: str) -> np.ndarray:
        """Read a small tensor as float32."""
        first = {key: places[0] for key, places in self.tensors.items()}
        return Checkpoint(self.path.name, None, self.path, self.config, first).read(name)


@dataclass(frozen=True)
class Rule:
    """One requirement of a reader on the folder; `check` yields a `Breach` for each place that breaks it."""

    name: str
    reader: str
    check: Callable[[Folder], Iterator[Breach]]


def check_folder(folder: Path, family: AscendFamily) -> Iterator[Finding]:
    """Check an artifact of a family against every rule.

    Yields:
        A failed finding for each breach of a rule, or one that passed; its `check` is the reader and the rule's name.
    """
    try:
        opened = _open(folder, family)
    except BadInputError as error:
        yield failed("format: opens", folder.name, str(error))
        return
    yield passed("format: opens", folder.name, f"{len(opened.tensors)} tensors")
    broken = False
    group_size = opened.description.get("group_size", 0)
    for rule in RULES:
        if rule.reader == "mindie" and "mindie" not in family.runtimes:
            continue
        title = f"{rule.reader}: {rule.name}"
        if broken and rule.check in {_offsets_zero, _scales_positive}:
            yield skipped(title, folder.name, "cannot be checked while tensors are broken")
            continue
        if group_size and rule.check is _scale_per_channel:
            detail = f"scales for groups of {group_size} input channels: only msmodelslim's own reader opens them"
            yield skipped(title, DESCRIPTION_NAME, detail)
            continue
        try:
            findings = [failed(title, place, detail) for place, detail in rule.check(opened)]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # A value in config.json has a type that the rule does not expect.
            findings = [failed(title, "config.json", f"a value cannot be checked ({error})")]
        broken = broken or (bool(findings) and rule.check in {_described, _triples})
        yield from findings or [passed(title, folder.name)]


def _open(folder: Path, family: AscendFamily) -> Folder:
    config = read_config(folder)
    description = read_description(folder)
    tensors: dict[str, list[TensorInfo]] = {}
    for file in weight_files(folder):
        for name, info in read_header(folder, file, (*FLOAT_DTYPES, "I8")).items():
            tensors.setdefault(name, []).append(info)
    if not tensors:
        raise BadInputError(f"{folder} holds no safetensors file: convert the checkpoint again")
    return Folder(folder, family, config, description, tensors)


def _version(folder: Folder) -> Iterator[Breach]:
    """If no version is given, readers assume the layout of the format's first version."""
    version = folder.description.get("version")
    if version != "1.0.0":
        yield DESCRIPTION_NAME, f"version is {version}, expected 1.0.0"


def _described(folder: Folder) -> Iterator[Breach]:
    for name in folder.tensors.keys() - folder.kinds.keys():
        yield name, f"{DESCRIPTION_NAME} does not describe it"
    for name in folder.kinds.keys() - folder.tensors.keys():
        yield name, f"described in {DESCRIPTION_NAME}, but in no safetensors file"


def _types(folder: Folder) -> Iterator[Breach]:
    for name, kind in folder.kinds.items():
        if kind not in {FLOAT, W8A16}:
            yield name, f"described as {kind}, expected {FLOAT} or {W8A16}"
        for info in folder.tensors.get(name, []):
            if (kind == FLOAT) != (info.dtype != "I8") and name.endswith(".weight"):
                yield name, f"described as {kind}, but stored as {info.dtype}"


def _triples(folder: Folder) -> Iterator[Breach]:
    for layer in folder.quantized:
        weights = folder.tensors.get(f"{layer}.weight")
        if weights is None:
            continue
        if len(weights[0].shape) != 2:
            yield f"{layer}.weight", f"shape {list(weights[0].shape)}, expected a matrix"
            continue
        for part in (SCALE, OFFSET):
            name = f"{layer}.{part}"
            if name not in folder.tensors:
                yield name, "missing"
            elif folder.kinds.get(name) != W8A16:
                yield name, f"described as {folder.kinds.get(name)}, expected {W8A16} like its weight"
            else:
                info, rows = folder.tensors[name][0], weights[0].shape[0]
                if len(info.shape) != 2 or info.shape[0] != rows or weights[0].shape[1] % max(info.shape[-1], 1):
                    yield name, f"shape {list(info.shape)}, expected [{rows}, groups]"
                elif info.dtype not in FLOAT_DTYPES:
                    yield name, f"stored as {info.dtype}, expected {', '.join(FLOAT_DTYPES)}"


def _language_layers_alone(folder: Folder) -> Iterator[Breach]:
    """Runtimes compute embeddings, head, vision tower and projector from float weights."""
    prefix = f"{folder.family.text_prefix}layers."
    for layer in folder.quantized:
        if not layer.startswith(prefix):
            yield f"{layer}.weight", f"described as {W8A16}, but only layers of {prefix}* may be"


def _offsets_zero(folder: Folder) -> Iterator[Breach]:
    """MindIE negates the offset and vllm-ascend does not, so only zero means the same to both."""
    for layer in folder.quantized:
        if folder.read(f"{layer}.{OFFSET}").any():
            yield f"{layer}.{OFFSET}", "not zero"


def _scales_positive(folder: Folder) -> Iterator[Breach]:
    for layer in folder.quantized:
        scales = folder.read(f"{layer}.{SCALE}")
        if not (np.isfinite(scales) & (scales > 0)).all():
            yield f"{layer}.{SCALE}", "a value is not finite or not positive"


def _duplicates(folder: Folder) -> Iterator[Breach]:
    for name, places in folder.tensors.items():
        if len(places) > 1:
            yield name, f"is in {' and '.join(info.file for info in places)}"


def _stray_files(folder: Folder) -> Iterator[Breach]:
    """MindIE opens every safetensors file that is not hidden, even if the index does not list it."""
    listed: set[str] = set()
    for index_file in sorted(folder.path.glob("*.safetensors.index.json")):
        if not index_file.name.startswith(_WEIGHTS_PREFIX):
            yield index_file.name, "not the index of this artifact"
            continue
        try:
            index: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            yield index_file.name, f"cannot be read ({error})"
            continue
        listed |= set(index.values())
        for name, file in index.items():
            if file not in {info.file for info in folder.tensors.get(name, [])}:
                yield name, f"{index_file.name} places it in {file}, which does not hold it"
    files = weight_files(folder.path)
    expected = listed or {file for file in files if file.startswith(_WEIGHTS_PREFIX)}
    for file in files:
        if file not in expected:
            yield file, "not a weight file of this artifact"


def _name_prefixes(folder: Folder) -> Iterator[Breach]:
    prefixes = folder.family.name_prefixes
    for name in folder.tensors:
        if not name.startswith(prefixes):
            yield name, f"expected a name that begins with {' or '.join(prefixes)}"


def _every_linear(folder: Folder) -> Iterator[Breach]:
    for layer in _linears(folder):
        if f"{layer}.weight" not in folder.kinds:
            yield f"{layer}.weight", f"a linear layer that is not described in {DESCRIPTION_NAME}"


def _fused_layers(folder: Folder) -> Iterator[Breach]:
    """Projections that a runtime fuses into one layer must have the same type."""
    for layers in _fused(folder):
        kinds = {layer: folder.kinds.get(f"{layer}.weight") for layer in layers}
        if len(set(kinds.values())) > 1:
            yield layers[0], ", ".join(f"{layer.rpartition('.')[2]} is {kind}" for layer, kind in kinds.items())


def _shadowed_layers(folder: Folder) -> Iterator[Breach]:
    """A reader takes a quantized layer for a float one if the name of any float weight begins with the layer's name."""
    floats = sorted(name for name, kind in folder.kinds.items() if kind == FLOAT and name.endswith(".weight"))
    for layer in folder.quantized:
        for name in floats:
            if name.startswith(layer):
                yield name, f"begins with the name of the quantized layer {layer}"


def _scale_per_channel(folder: Folder) -> Iterator[Breach]:
    for layer in folder.quantized:
        places = folder.tensors.get(f"{layer}.{SCALE}", [])
        if places and places[0].shape[1:] != (1,):
            yield f"{layer}.{SCALE}", f"shape {list(places[0].shape)}, expected one scale per row"


def _config_keys(folder: Folder) -> Iterator[Breach]:
    config, text, dtypes = folder.config, folder.text, folder.family.dtypes
    token = folder.family.image_key
    wanted: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        ("quantize", config.get("quantize"), lambda value: value == W8A16.lower(), W8A16.lower()),
        ("text_config.quantize", text.get("quantize"), lambda value: value == W8A16.lower(), W8A16.lower()),
        ("torch_dtype", config.get("torch_dtype"), lambda value: value in dtypes, " or ".join(dtypes)),
        ("architectures", config.get("architectures"), bool, "the model's class"),
        (token, config.get(token), lambda value: isinstance(value, int), "a token"),
        ("vision_config", config.get("vision_config"), bool, "the vision tower's config"),
        *(
            (f"text_config.{key}", text.get(key), lambda value: isinstance(value, int) and value > 0, "a size")
            for key in (
                "vocab_size",
                "max_position_embeddings",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
        ),
    ]
    if folder.family.names_text_model:
        name = "text_config._name_or_path"
        wanted.append(
            (name, text.get("_name_or_path"), lambda value: isinstance(value, str), "a name, which may be empty")
        )
    for key, value, right, expected in wanted:
        if not right(value):
            yield f"config.json, {key}", f"is {json.dumps(value)}, expected {expected}"
    if text.get("tie_word_embeddings"):
        yield (
            "config.json, text_config.tie_word_embeddings",
            "is true, so MindIE looks for the LM head under another name",
        )


def _rope(folder: Folder) -> Iterator[Breach]:
    text = folder.text
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_theta") != text.get("rope_theta"):
        found, expected = text.get("rope_theta"), rope.get("rope_theta")
        yield "config.json, text_config.rope_theta", f"is {found}, but rope_parameters says {expected}"
    scaling = text.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" and not scaling:
        yield "config.json, text_config.rope_scaling", f"missing, but rope_parameters says {kind}"
    for key in scaling.keys() - _ROPE_KEYS:
        yield f"config.json, text_config.rope_scaling.{key}", "unknown to MindIE"
    for key, known in (("rope_type", _ROPE_TYPES), ("type", _OLD_ROPE_TYPES)):
        if key in scaling and scaling[key] not in known:
            yield (
                f"config.json, text_config.rope_scaling.{key}",
                f"is {scaling[key]}, expected {', '.join(sorted(known))}",
            )


def _processor_files(folder: Folder) -> Iterator[Breach]:
    """MindIE reads these files by transformers 4, which expects a separate file for the image processor."""
    for alternatives in (
        ("tokenizer.json", "tokenizer.model"),
        ("tokenizer_config.json",),
        ("preprocessor_config.json",),
    ):
        if not any((folder.path / name).is_file() for name in alternatives):
            yield " or ".join(alternatives), "missing"
    contents = {}
    for name in ("tokenizer_config.json", "processor_config.json"):
        path = folder.path / name
        try:
            contents[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            yield name, f"cannot be read ({error})"
            contents[name] = {}
    tokenizer, processor = contents.values()
    for key in ("image_processor", "video_processor"):
        if key in processor:
            yield f"processor_config.json, {key}", "transformers 4 refuses this key here"
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        yield "tokenizer_config.json, tokenizer_class", "is TokenizersBackend, which transformers 4 does not know"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        yield "tokenizer_config.json, extra_special_tokens", "is a list, which transformers 4 cannot read"


def _permissions(folder: Folder) -> Iterator[Breach]:
    if os.name == "nt":  # Windows has no permissions for others
        return
    for path in sorted(folder.path.iterdir()):
        if path.is_file() and path.stat().st_mode & stat.S_IWOTH:
            yield path.name, "users other than its owner and group may write it"


RULES = (
    Rule("version", "format", _version),
    Rule("every tensor described", "format", _described),
    Rule("types", "format", _types),
    Rule("scale and offset", "format", _triples),
    Rule("language model's layers alone", "mindie and vllm-ascend", _language_layers_alone),
    Rule("offsets zero", "format", _offsets_zero),
    Rule("scales positive", "format", _scales_positive),
    Rule("no duplicate key", "mindie", _duplicates),
    Rule("no stray file", "mindie", _stray_files),
    Rule("name prefixes", "mindie", _name_prefixes),
    Rule("config keys", "mindie", _config_keys),
    Rule("rope keys", "mindie", _rope),
    Rule("processor files", "mindie", _processor_files),
    Rule("not writable by others", "mindie", _permissions),
    Rule("one scale a channel", "mindie and vllm-ascend", _scale_per_channel),
    Rule("every linear described", "vllm-ascend", _every_linear),
    Rule("fused layers of one type", "vllm-ascend", _fused_layers),
    Rule("no shadowed layer", "vllm-ascend", _shadowed_layers),
)


def _layers(folder: Folder) -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """Every transformer layer that the config implies, but for those of towers that name their linear layers themselves.

    Yields:
        Prefix of the layer, name of its attention, the projections of the attention, the linear layers of the MLP.
    """
    text, vision = folder.text, folder.config.get("vision_config") or {}
    crossing = folder.family.cross_attention
    numbers = crossing.numbers(text) if crossing else []
    for index in range(text.get("num_hidden_layers") or 0):
        attention = crossing.name if crossing and index in numbers else "self_attn"
        yield (
            f"{folder.family.text_prefix}layers.{index}",
            attention,
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            ("gate_proj", "up_proj", "down_proj"),
        )
    for stack in folder.family.vision_stacks:
        if not stack.linears and (not stack.model_types or vision.get("model_type") in stack.model_types):
            for index in range(vision.get(stack.count) or 0):
                projections = ("q_proj", "k_proj", "v_proj", stack.output)
                yield f"{stack.prefix}.{index}", "self_attn", projections, ("fc1", "fc2")


def _linears(folder: Folder) -> Iterator[str]:
    for prefix, attention, projections, feed_forward in _layers(folder):
        for part, names in ((attention, projections), ("mlp", feed_forward)):
            yield from (f"{prefix}.{part}.{name}" for name in names)
    for stack in folder.family.vision_stacks:
        for index in range((folder.config.get("vision_config") or {}).get(stack.count) or 0):
            yield from (f"{stack.prefix}.{index}.{name}" for name in stack.linears)
    yield folder.family.head
    yield f"{folder.family.text_prefix}embed_tokens"
    yield from folder.family.projector


def _fused(folder: Folder) -> Iterator[list[str]]:
    for prefix, attention, projections, feed_forward in _layers(folder):
        yield [f"{prefix}.{attention}.{name}" for name in projections[:3]]
        if "gate_proj" in feed_forward:
            yield [f"{prefix}.mlp.{name}" for name in feed_forward[:2]]
