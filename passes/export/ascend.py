"""Writing what Ascend runtimes open: int8 weights in safetensors files, `quant_model_description.json`, and `config.json`.

The format is msmodelslim's ascendV1, read from its sources and from those of its readers, MindIE-LLM (ATB models, as of
April 2026) and vllm-ascend (as of August 2026): a quantized linear layer X has `X.weight` (int8), `X.weight_scale` and
`X.weight_offset` ([rows, groups]); everything else keeps its name and dtype; the description names a type for every tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manifests.files import file_record, write_atomically
from manifests.model import FileRecord
from passes.architecture import Architecture
from passes.checkpoint import Checkpoint
from passes.compress.equalize import Equalizer, equalizers
from passes.compress.w8a16 import CompressW8A16Pass, QuantizedTensor, check_finite
from passes.export.ascend_family import AscendFamily
from passes.export.safetensors import CHUNK, Entry, file_size, raw_chunks, ring, split_into_shards, write_safetensors

__all__ = [
    "DESCRIPTION_NAME",
    "FLOAT",
    "OFFSET",
    "SCALE",
    "W8A16",
    "AscendWeights",
    "Part",
    "artifact_config",
    "plan_weights",
    "write_config",
]

DESCRIPTION_NAME = "quant_model_description.json"
WEIGHTS_STEM = "quant_model_weight_w8a16"
W8A16, FLOAT = "W8A16", "FLOAT"
SCALE, OFFSET = "weight_scale", "weight_offset"
_VERSION = "1.0.0"

Chunks = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class Part:
    """One tensor of the artifact, and how its bytes are made when its turn has come."""

    entry: Entry
    kind: str
    chunks: Callable[[], Chunks]


@dataclass(frozen=True)
class AscendWeights:
    """All tensors of an artifact, divided into files; only metadata has been read.

    Attributes:
        shards: the tensors of each file, in the order of their bytes.
        group_size: input channels that share a scale, 0 for one scale a row.
    """

    shards: tuple[tuple[Part, ...], ...]
    group_size: int = 0

    @classmethod
    def packed(cls, items: list[list[Part]], shard_size: int, group_size: int = 0) -> AscendWeights:
        """Divide tensors over files of at most `shard_size` bytes; parts that belong together stay together."""
        runs = split_into_shards([sum(part.entry.size for part in item) for item in items], shard_size)
        shards = tuple(tuple(_aligned(part for item in items[run] for part in item)) for run in runs)
        return cls(shards, group_size)

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(self.file_sizes.values())

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of each weight file."""
        sizes = (file_size([part.entry for part in shard]) for shard in self.shards)
        return dict(zip(self.files, sizes, strict=True))

    @property
    def weights(self) -> dict[str, int]:
        """Count of weight values by dtype, as in a manifest; scales and offsets are no weights."""
        names = {"I8": "int8", "F16": "f16", "BF16": "bf16", "F32": "f32"}
        counts: dict[str, int] = {}
        for part in self._parts():
            if not part.entry.name.endswith((SCALE, OFFSET)):
                dtype = names[part.entry.dtype]
                counts[dtype] = counts.get(dtype, 0) + int(np.prod(part.entry.shape, dtype=np.int64))
        return dict(sorted(counts.items()))

    @property
    def files(self) -> list[str]:
        """Names of the weight files, in order."""
        count = len(self.shards)
        if count == 1:
            return [f"{WEIGHTS_STEM}.safetensors"]
        return [f"{WEIGHTS_STEM}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def description(self) -> dict[str, Any]:
        """What `quant_model_description.json` says."""
        head: dict[str, Any] = {"model_quant_type": W8A16, "version": _VERSION}
        if self.group_size:
            head["group_size"] = self.group_size
        return head | {part.entry.name: part.kind for part in self._parts()}

    def write(self, folder: Path, workers: int = 1) -> list[FileRecord]:
        """Write the weight files, the index if there are several, and the description.

        Args:
            folder: an existing folder.
            workers: files that are made at once.

        Returns:
            The files' records, hashed while they were written.

        Raises:
            BadInputError: if a weight is NaN or infinite and that is not allowed, or a file of the checkpoint has changed.
        """
        from joblib import Parallel, delayed

        # Threads are enough: numpy computes, reads and hashes without the interpreter's lock.
        records: list[FileRecord] = Parallel(n_jobs=workers, prefer="threads")(
            delayed(_write_shard)(folder / name, shard) for name, shard in zip(self.files, self.shards, strict=True)
        )
        if len(self.shards) > 1:
            weight_map = {
                part.entry.name: name for name, shard in zip(self.files, self.shards, strict=True) for part in shard
            }
            total = sum(part.entry.size for part in self._parts())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            records.append(_write_json(folder / f"{WEIGHTS_STEM}.safetensors.index.json", index))
        records.append(_write_json(folder / DESCRIPTION_NAME, self.description()))
        return records

    def _parts(self) -> Iterator[Part]:
        for shard in self.shards:
            yield from shard


def plan_weights(
    checkpoint: Checkpoint, architecture: Architecture, options: CompressW8A16Pass, shard_size: int
) -> AscendWeights:
    """Lay out the artifact of a checkpoint.

    The linear layers of the language model are quantized; embeddings, LM head, vision tower and projector stay as they are,
    which is what the runtimes expect. A tied LM head is written out: both runtimes and msmodelslim's reader look for it.

    Args:
        checkpoint: the float checkpoint.
        architecture: its tensors' names and linear layers; it has been checked against the checkpoint.
        options: how to quantize.
        shard_size: bytes that a file may have; a single larger layer stands alone.

    Raises:
        BadInputError: if a linear layer's rows do not divide into groups.
    """
    weights = {f"{name}.weight" for name in architecture.linears}
    equalized = equalizers(checkpoint, architecture) if options.outlier_suppression == "equalize" else {}
    items = []
    for name in architecture.in_file_order(checkpoint):
        source, on_hub = architecture.source(name), architecture.on_hub[name]
        equalizer = equalized.get(name)
        if name in weights:
            items.append(_quantized_parts(checkpoint, source, on_hub, options, equalizer))
        else:
            items.append([_float_part(checkpoint, source, on_hub, options, equalizer)])
    return AscendWeights.packed(items, shard_size, options.group_size)


def artifact_config(checkpoint: Checkpoint, architecture: Architecture, family: AscendFamily) -> dict[str, Any]:
    """The artifact's config.json: the checkpoint's own with every default written out, and the keys that MindIE reads.

    MindIE reads the config with an older transformers and with classes of its own, whose defaults are not the checkpoint's;
    what transformers has renamed since is there under both names. vllm-ascend needs no key.
    """
    config = _with_own_keys(architecture.config, checkpoint.config)
    text = config["text_config"]
    dtype = {"BF16": "bfloat16", "F16": "float16"}.get(checkpoint.main_dtype)
    if dtype not in family.dtypes:
        dtype = family.dtypes[0]
    for part in (config, text):
        part |= {"dtype": dtype, "torch_dtype": dtype, "quantize": W8A16.lower()}
        # The LM head is always there, and where a config says that it is tied, MindIE looks for a name that is not there.
        part["tie_word_embeddings"] = False
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = _rope_scaling(rope)
    # Some families' chat template is chosen by this name.
    text["_name_or_path"] = text.get("_name_or_path") or ("mistral" if text["model_type"] == "mistral" else "")
    return config


def write_config(config: dict[str, Any], folder: Path) -> FileRecord:
    """Write config.json."""
    return _write_json(folder / "config.json", config)


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_parameters` without the base, in the words that transformers 4 had for them."""
    kind = rope.pop("rope_type", "default")
    if kind == "default":
        return None
    # MindIE knows linear scaling by the older of the two keys only.
    return {"type" if kind == "linear" else "rope_type": kind, **rope}


def _with_own_keys(completed: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The completed config with the keys that only the checkpoint's file has."""
    merged = dict(completed)
    for key, value in own.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = _with_own_keys(merged[key], value)
    return merged


def _quantized_parts(
    checkpoint: Checkpoint, source: str, on_hub: str, options: CompressW8A16Pass, equalizer: Equalizer | None
) -> list[Part]:
    info = checkpoint.tensors[source]
    rows = info.shape[0]
    shape = (rows, options.groups(checkpoint, source))
    # The scales, which need all weights, go before the codes; so the weights are read twice, the second time from memory.
    made: list[QuantizedTensor] = []

    def scales() -> Chunks:
        factors = equalizer.of(source) if equalizer else {}
        made.append(options.quantize(checkpoint, source, **factors))
        yield made[0].scales.reshape(-1).data.cast("B")

    def offsets() -> Chunks:
        yield bytes(4 * shape[0] * shape[1])

    def codes() -> Chunks:
        yield from made.pop().codes()

    prefix = on_hub.removesuffix("weight")
    size = 4 * shape[0] * shape[1]
    return [
        Part(Entry(f"{prefix}{SCALE}", "F32", shape, size), W8A16, scales),
        Part(Entry(f"{prefix}{OFFSET}", "F32", shape, size), W8A16, offsets),
        Part(Entry(on_hub, "I8", info.shape, info.size), W8A16, codes),
    ]


def _float_part(
    checkpoint: Checkpoint, source: str, on_hub: str, options: CompressW8A16Pass, equalizer: Equalizer | None
) -> Part:
    info = checkpoint.tensors[source]

    def chunks() -> Chunks:
        for chunk in raw_chunks(checkpoint.folder, info, ring(CHUNK)):
            if not options.allow_nonfinite:
                check_finite(checkpoint, source, chunk)
            if not equalizer:
                yield chunk.data
        if equalizer:
            yield equalizer.bias(source)

    return Part(Entry(on_hub, info.dtype, info.shape, info.byte_size), FLOAT, chunks)


def _aligned(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts in an order in which every tensor starts at a multiple of its values' size, as readers need it.

    Only tensors of odd sizes move, to the end, those of the larger values first; scales are always before their codes.
    """
    odd = []
    for part in parts:
        if part.entry.size % 4:
            odd.append(part)
        else:
            yield part
    yield from sorted(odd, key=lambda part: part.entry.size % 2)


def _write_shard(path: Path, shard: tuple[Part, ...]) -> FileRecord:
    return write_safetensors(path, [part.entry for part in shard], (chunk for part in shard for chunk in part.chunks()))


def _write_json(path: Path, content: dict[str, Any]) -> FileRecord:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return file_record(path, path.parent)
