"""Broken and hostile checkpoints, made from the embedded demos: what a mistake, a bad disk or a stranger may leave.

python -m tests.hostile.checkpoints FOLDER    writes all of them, one folder each
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.files import link_or_copy
from vlmconvert.families import demo_checkpoint

__all__ = ["BROKEN", "Broken", "read_header", "write_header"]

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LM_HEAD = "language_model.lm_head.weight"


@dataclass(frozen=True)
class Broken:
    """One checkpoint.

    Attributes:
        name: what is wrong.
        family: whose demo it is made from.
        damage: takes the folder of a copy, and damages it.
        message: a part of what must be said.
        late: whether the fault is found only when the values of the weights are read.
    """

    name: str
    family: str
    damage: Callable[[Path], None]
    message: str = ""
    late: bool = False

    def write(self, folder: Path) -> Path:
        """Make the checkpoint; its weights are a hard link, unless they are damaged."""
        source = demo_checkpoint(self.family)
        assert source is not None
        folder.mkdir(parents=True)
        for path in source.iterdir():
            (link_or_copy if path.name == WEIGHTS else shutil.copyfile)(path, folder / path.name)
        self.damage(folder)
        return folder


def replace_file(path: Path, content: bytes | str) -> None:
    """Write another file in the place of one that may be a link to the demo's."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# Files of any kind, in the place of a JSON file.


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_link(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.unlink()
        if target == "outside":
            outside = path.parent.with_name(f"{path.parent.name}-outside")
            outside.write_bytes(content)
            path.symlink_to(outside)
        else:
            path.symlink_to(target)

    return damage


def _with(content: bytes | str) -> Callable[[Path], None]:
    return lambda path: replace_file(path, content)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    replace_file(path, data[: len(data) // 2])


def _huge(path: Path) -> None:
    """A gigabyte that takes no space on the disk."""
    path.unlink()
    with path.open("wb") as stream:
        stream.truncate(1 << 30)


FILES: dict[str, Callable[[Path], None]] = {
    "is missing": Path.unlink,
    "is empty": _with(b""),
    "is cut": _cut,
    "is a list": _with("[1, 2]"),
    "is null": _with("null"),
    "is a text": _with('"text"'),
    "is no UTF-8": _with(b'{"a": "\xff\xfe"}'),
    "is a Git LFS pointer": _with("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"),
    "is nested deeply": _with('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    "is a gigabyte": _huge,
    "is a folder": _as_folder,
    "is a pipe": _as_pipe,
    "is a dangling link": _as_link("nowhere"),
    "is a link to itself": lambda path: _as_link(path.name)(path),
    "is a link that leads out": _as_link("outside"),
}


def _files() -> Iterator[Broken]:
    for file in (CONFIG, "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        for what, damage in FILES.items():
            if (file, what) != ("generation_config.json", "is missing"):
                yield Broken(f"{file} {what}", "llava", lambda folder, d=damage, f=file: d(folder / f), file)
    for what in ("is missing", "is empty", "is a folder", "is a pipe", "is a link that leads out", "is no UTF-8"):
        damage = FILES[what]
        yield Broken(f"{WEIGHTS} {what}", "llava", lambda folder, d=damage: d(folder / WEIGHTS), WEIGHTS)


# Entries of config.json.

HUGE, LARGER = 100_000_000, 10**30
NUMBERS: dict[str, dict[str, tuple[str, ...]]] = {
    "llava": {
        "": ("vision_feature_layer", "image_token_index"),
        "text_config": ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
        "vision_config": ("num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_channels"),
    },
    "mllama": {
        "text_config": ("num_hidden_layers", "cross_attention_layers", "num_attention_heads", "intermediate_size"),
        "vision_config": (
            "num_hidden_layers",
            "num_global_layers",
            "intermediate_layers_indices",
            "max_num_tiles",
            "image_size",
            "attention_heads",
        ),
    },
}
VALUES = (-7, 0, HUGE, LARGER, 1.5, "8", None, [999], {"a": 1})
# Values with which a config still describes the same model, or one that transformers makes of these tensors, too.
HARMLESS = {("llava", "vision_feature_layer", "0")}


def _entries() -> Iterator[Broken]:
    for family in NUMBERS:
        for part in ("text_config", "vision_config"):
            for value in ([999], {"a": 1}):
                yield Broken(
                    f"{family} {part}.model_type {value}",
                    family,
                    lambda folder, p=part, v=value: edit(folder, CONFIG, {"model_type": v}, p),
                )
    for family, parts in NUMBERS.items():
        for part, names in parts.items():
            for name in names:
                for value in VALUES:
                    key = f"{part}.{name}".lstrip(".")
                    text = json.dumps(value)
                    if (family, key, text) not in HARMLESS:
                        yield Broken(
                            f"{family} {key} {text}",
                            family,
                            lambda folder, p=part, n=name, v=value: edit(folder, CONFIG, {n: v}, p),
                        )
    for key, value in (
        ("model_type", ["llava"]),
        ("model_type", "bert"),
        ("model_type", "llava\nvlmconvert: done"),
        ("text_config", None),
        ("text_config", []),
        ("vision_config", "clip"),
        ("vision_config", {"model_type": "siglip_vision_model"}),
        ("image_token_index", 3),
        ("rope_theta", 0),
        ("max_position_embeddings", -7),
        ("vision_feature_select_strategy", "full"),
        ("vision_feature_select_strategy", "none"),
        ("projector_hidden_act", "__import__('os')"),
        ("transformers_weights", "../model.safetensors"),
        ("transformers_weights", "/etc/passwd"),
        ("transformers_weights", "pytorch_model.bin"),
        ("quantization_config", {"quant_method": "awq"}),
        ("attn_implementation", "kernels-community/evil"),
        ("_attn_implementation", {"text_config": "kernels-community/evil"}),
    ):
        yield Broken(f"{key} {json.dumps(value)}", "llava", lambda folder, k=key, v=value: edit(folder, CONFIG, {k: v}))
    yield Broken(
        "NaN in config.json", "llava", lambda f: edit(f, CONFIG, {"rms_norm_eps": float("nan")}, "text_config"), "NaN"
    )
    yield Broken("1e999 in config.json", "llava", _with_infinity, "infinite")


def _with_infinity(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("1e-06", "1e999"))


def edit(folder: Path, file: str, changes: dict[str, Any], part: str = "") -> None:
    """Change entries of a JSON file, or of an object in it."""
    content = json.loads((folder / file).read_text())
    (content[part] if part else content).update(changes)
    (folder / file).write_text(json.dumps(content))


# The header of a safetensors file.


def read_header(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header of the weights, and all bytes after it."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(folder: Path, text: str | bytes, rest: bytes) -> None:
    """Write the weights anew."""
    text = text.encode() if isinstance(text, str) else text
    replace_file(folder / WEIGHTS, struct.pack("<Q", len(text)) + text + rest)


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header, rest = read_header(folder)
        change(header)
        write_header(folder, json.dumps(header), rest)

    return damage


def _entry(**changes: Any) -> Callable[[Path], None]:
    return _header(lambda header: header[LM_HEAD].update(changes))


def _text(change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header, rest = read_header(folder)
        write_header(folder, change(json.dumps(header)), rest)

    return damage


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: replace_file(folder / WEIGHTS, change((folder / WEIGHTS).read_bytes()))


def _offsets(change: Callable[[int, int], list[Any]]) -> Callable[[Path], None]:
    return _header(lambda header: header[LM_HEAD].update(data_offsets=change(*header[LM_HEAD]["data_offsets"])))


def _overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name.endswith("q_proj.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


HEADERS: dict[str, Callable[[Path], None]] = {
    "8 bytes": _bytes(lambda data: data[:8]),
    "a length beyond the file": _bytes(lambda data: struct.pack("<Q", len(data)) + data[8:]),
    "a length of 2^63": _bytes(lambda data: struct.pack("<Q", 1 << 63) + data[8:]),
    "a length of 0": _bytes(lambda data: bytes(8) + data[8:]),
    "a header of 90 MB": _text(lambda text: text + " " * 90_000_000),
    "a header that is a list": _text(lambda text: f"[{text}]"),
    "a header that is cut": _text(lambda text: text[:-20]),
    "a header that is nested deeply": _text(lambda text: "[" * 100_000),
    "a header that is no UTF-8": _text(lambda text: text.encode().replace(b"lm_head", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9")),
    "a number of 10000 digits": _text(lambda text: text.replace("[576, 128]", f"[{'9' * 10_000}]")),
    "a tensor twice": _text(lambda text: text[:-1] + "," + text[1:]),
    "metadata that are numbers": _header(lambda header: header.update(__metadata__={"format": 1})),
    "metadata that are a list": _header(lambda header: header.update(__metadata__=["pt"])),
    "an entry that is null": _header(lambda header: header.update({LM_HEAD: None})),
    "an entry that is a list": _header(lambda header: header.update({LM_HEAD: [1]})),
    "an entry without dtype": _header(lambda header: header[LM_HEAD].pop("dtype")),
    "an entry without offsets": _header(lambda header: header[LM_HEAD].pop("data_offsets")),
    "an unknown dtype": _entry(dtype="F128"),
    "a dtype that is a list": _entry(dtype=["BF16"]),
    "another dtype": _entry(dtype="F32"),
    "a negative length": _entry(shape=[-576, -128]),
    "a huge length": _entry(shape=[10**18, 10**18]),
    "a length that is a text": _entry(shape=["576", 128]),
    "a length that is true": _entry(shape=[True, 73728]),
    "a fractional length": _entry(shape=[576.0, 128]),
    "a shape that is null": _entry(shape=None),
    "offsets that are null": _entry(data_offsets=None),
    "one offset": _offsets(lambda first, last: [first]),
    "reversed offsets": _offsets(lambda first, last: [last, first]),
    "negative offsets": _offsets(lambda first, last: [first - last, 0]),
    "huge offsets": _offsets(lambda first, last: [first + (1 << 62), last + (1 << 62)]),
    "offsets that are texts": _offsets(lambda first, last: [str(first), str(last)]),
    "overlapping tensors": _header(_overlap),
    "a hole": _header(lambda header: header.pop(LM_HEAD)),
    "100 bytes too few": _bytes(lambda data: data[:-100]),
    "100 bytes too many": _bytes(lambda data: data + bytes(100)),
    "a pickle": _bytes(lambda data: b"\x80\x04\x95cos\nsystem\n(S'touch pwned'\ntR."),
    "a zip archive": _bytes(lambda data: b"PK\x03\x04" + data),
    "a swapped shape": _entry(shape=[128, 576]),
}


def _headers() -> Iterator[Broken]:
    for what, damage in HEADERS.items():
        yield Broken(f"weights with {what}", "llava", damage, WEIGHTS)


# Tensors, shards and their index.


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        (folder / WEIGHTS).unlink()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def _add(name: str) -> Callable[[Path], None]:
    import torch

    return _tensors(lambda tensors: tensors.update({name: torch.ones(4, 128)}))


def _set(name: str, value: float, dtype: str = "") -> Callable[[Path], None]:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        if dtype:
            tensors[name] = tensors[name].to(getattr(torch, dtype))
        tensors[name].view(-1)[-1] = value

    return _tensors(change)


Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"
ADDED = (
    f"{Q_PROJ}.lora_A.default.weight",
    f"{Q_PROJ}.lora_magnitude_vector.default.weight",
    f"{Q_PROJ}.base_layer.weight",
    f"base_model.model.{Q_PROJ}.weight",
    f"{Q_PROJ}.ia3_l.default",
    "language_model.lm_head.modules_to_save.default.weight",
    "language_model.prompt_encoder.default.embedding.weight",
    f"{Q_PROJ}.weight_scale_inv",
    f"{Q_PROJ}.qweight",
    f"{Q_PROJ}.SCB",
    f"{Q_PROJ}.weight.absmax",
)


def _of_tensors() -> Iterator[Broken]:
    for name in ADDED:
        yield Broken(f"tensor {name}", "llava", _add(name), name)
    norm = "language_model.model.norm.weight"
    for name in (norm, LM_HEAD, "multi_modal_projector.linear_1.bias"):
        for value in (float("nan"), float("inf"), float("-inf")):
            yield Broken(f"{value} in {name}", "llava", _set(name, value), name, late=True)
    yield Broken("NaN in float16", "llava", _set(norm, float("nan"), "float16"), norm, late=True)
    yield Broken("NaN in float32", "llava", _set(norm, float("nan"), "float32"), norm, late=True)
    yield Broken("beyond float16", "llava", _set(norm, 1e5), norm, late=True)
    for dtype in ("int8", "float64", "bool", "float8_e4m3fn"):
        yield Broken(f"a weight of {dtype}", "llava", _of_dtype(dtype), LM_HEAD)
    yield Broken("a missing tensor", "llava", _tensors(lambda tensors: tensors.pop(LM_HEAD)), "lm_head")
    yield Broken(
        "two names of a weight",
        "llava",
        _tensors(lambda t: t.update({"lm_head.weight": t[LM_HEAD].clone()})),
        "lm_head",
    )
    yield Broken(
        "an adapter beside", "llava", lambda f: replace_file(f / "adapter_config.json", "{}"), "adapter_config.json"
    )
    yield Broken("pickles only", "llava", lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pytorch_model.bin")
    yield Broken(
        "a variant only",
        "llava",
        lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"),
        "model.fp16.safetensors",
    )


def _of_dtype(dtype: str) -> Callable[[Path], None]:
    import torch

    return _tensors(lambda tensors: tensors.update({LM_HEAD: tensors[LM_HEAD].to(getattr(torch, dtype))}))


def _shard(folder: Path) -> dict[str, str]:
    """Turn the weights into one shard with an index."""
    names = [name for name in read_header(folder)[0] if name != "__metadata__"]
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    return dict.fromkeys(names, "model-1.safetensors")


def _index(change: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = {"metadata": {}, "weight_map": _shard(folder)}
        made = change(folder, index["weight_map"])
        (folder / INDEX).write_text(json.dumps({"weight_map": made} if isinstance(made, list | str) else index))

    return damage


def _linked(folder: Path, weight_map: dict[str, Any]) -> None:
    outside = folder.with_name(f"{folder.name}-outside")
    (folder / "model-1.safetensors").rename(outside)
    (folder / "model-1.safetensors").symlink_to(outside)


INDEXES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "that leads up": lambda folder, names: names.update({LM_HEAD: "../model.safetensors"}),
    "with an absolute path": lambda folder, names: names.update({LM_HEAD: "/etc/passwd"}),
    "with a folder": lambda folder, names: names.update({LM_HEAD: "a/model.safetensors"}),
    "with the folder itself": lambda folder, names: names.update({LM_HEAD: "."}),
    "with an empty name": lambda folder, names: names.update({LM_HEAD: ""}),
    "with a backslash": lambda folder, names: names.update({LM_HEAD: "..\\model.safetensors"}),
    "with a zero byte": lambda folder, names: names.update({LM_HEAD: "model\0.safetensors"}),
    "with a number": lambda folder, names: names.update({LM_HEAD: 7}),
    "with a missing shard": lambda folder, names: names.update({LM_HEAD: "model-2.safetensors"}),
    "with a tensor that is not there": lambda folder, names: names.update({"other": "model-1.safetensors"}),
    "with a file of another kind": lambda folder, names: names.update({LM_HEAD: "tokenizer.json"}),
    "with a name that is too long": lambda folder, names: names.update({LM_HEAD: "x" * 5000}),
    "without names": lambda folder, names: names.clear(),
    "whose map is a list": lambda folder, names: list(names),
    "whose map is a text": lambda folder, names: "model-1.safetensors",
    "to a link that leads out": _linked,
}


def _indexes() -> Iterator[Broken]:
    for what, change in INDEXES.items():
        yield Broken(f"an index {what}", "llava", _index(change))


# Chat templates and processors.

TEMPLATES = {
    "with a syntax error": "{% for m in messages %}{{ m }",
    "that is empty": "",
    "that leaves out the question": "USER: <image> ASSISTANT:",
    "without an image": "{% for m in messages %}{% for p in m['content'] %}{{ p.get('text', '') }}{% endfor %}{% endfor %}",
    "with an unknown filter": "{{ messages | shell }}",
    "with an unknown name": "{{ os.system('id') }}",
    "that raises": "{{ raise_exception('no') }}",
    "that loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "with 10 GB of text": "{{ 'a' * 10**10 }}",
    "with a list of 10^12": "{{ ([0] * 10**12) | length }}",
    "with a large power": "{{ 9 ** (9 ** 9) }}",
    "with a wide format": "{{ '%2147483647d' % 1 }}",
    "that doubles a text": "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "that reaches for classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "that reaches for globals": "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "that reaches by attr": "{{ (messages | attr('__class__')).__base__.__subclasses__() }}",
    "that includes a file": "{% include '/etc/passwd' %}",
    "that imports": "{% import 'os' as os %}{{ os }}",
}


def _templates() -> Iterator[Broken]:
    file = "chat_template.jinja"
    for what, text in TEMPLATES.items():
        # Without an image, it is what the processor makes of the prompt that does not fit.
        part = "does not fit" if what == "without an image" else "chat template"
        yield Broken(f"a template {what}", "llava", lambda folder, t=text: replace_file(folder / file, t), part)
    for what in ("is missing", "is no UTF-8", "is a gigabyte", "is a folder", "is a pipe", "is a link that leads out"):
        damage = FILES[what]
        yield Broken(f"{file} {what}", "llava", lambda folder, d=damage: d(folder / file), "template")


PROCESSORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "patch_size 28": ("processor_config.json", "", {"patch_size": 28}),
    "patch_size 0": ("processor_config.json", "", {"patch_size": 0}),
    "another strategy": ("processor_config.json", "", {"vision_feature_select_strategy": "full"}),
    "two additional tokens": ("processor_config.json", "", {"num_additional_image_tokens": 2}),
    "a smaller image": ("processor_config.json", "image_processor", {"size": {"height": 56, "width": 56}}),
    "a huge image": ("processor_config.json", "image_processor", {"size": {"height": 999_999, "width": 999_999}}),
    "a standard deviation of 0": ("processor_config.json", "image_processor", {"image_std": [0, 0, 0]}),
    "an unknown class": ("processor_config.json", "", {"processor_class": "EvilProcessor"}),
    "an unknown image processor": ("processor_config.json", "image_processor", {"image_processor_type": "Evil"}),
    "an audio tokenizer": (
        "processor_config.json",
        "",
        {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "org/evil"}},
    ),
    "an end that is a text": ("generation_config.json", "", {"eos_token_id": "</s>"}),
    "an end beyond the embeddings": ("generation_config.json", "", {"eos_token_id": 10**6}),
    "a negative end": ("generation_config.json", "", {"eos_token_id": [-1]}),
}


def _with_more_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    last = content["added_tokens"][-1]
    first = 1 + max(token["id"] for token in content["added_tokens"])
    content["added_tokens"] += [last | {"id": first + more, "content": f"<more {more}>"} for more in range(100)]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _processors() -> Iterator[Broken]:
    for what, (file, part, changes) in PROCESSORS.items():
        yield Broken(f"{file} with {what}", "llava", lambda folder, f=file, c=changes, p=part: edit(folder, f, c, p))
    yield Broken("more tokens than embeddings", "llava", _with_more_tokens, "embeddings")
    tiles = {"max_image_tiles": 9}
    yield Broken("more tiles", "mllama", lambda f: edit(f, "processor_config.json", tiles, "image_processor"))


BROKEN = tuple(
    broken for make in (_files, _entries, _headers, _of_tensors, _indexes, _templates, _processors) for broken in make()
)


if __name__ == "__main__":
    for number, item in enumerate(BROKEN):
        print(item.write(Path(sys.argv[1]) / f"{number:03d}"), item.name)
