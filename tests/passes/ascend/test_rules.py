"""Every loading rule, on a folder that keeps them all and on folders that each break one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from passes.ascend.rules import RULES, check_folder
from passes.ascend.w8a16 import CompressW8A16Pass
from tests.checkpoints import CLASSES, ascend_family, write_checkpoint
from tests.passes.ascend import conversion
from tests.passes.ascend.conversion import PER_CHANNEL
from vlmconvert.targets.ascend.sidecars import write_sidecars

LAYER = "language_model.model.layers.0.mlp.up_proj"


def convert(source, folder, item=PER_CHANNEL, shard_size=10**9):
    """A whole folder, with the files of the processor."""
    conversion.convert(source, folder, item, shard_size)
    write_sidecars(source, folder)
    return folder


def checked(folder):
    return list(check_folder(folder, ascend_family(folder)))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, demo):
    """One artifact of each family."""
    root = tmp_path_factory.mktemp("artifacts")
    folders = {"mllama": convert(demo, root / "mllama")}
    for family in CLASSES:
        source = write_checkpoint(root / f"{family}-in", family)
        folders[family] = convert(source, root / family)
    return folders


@pytest.mark.parametrize("family", ["mllama", *CLASSES])
def test_an_artifact_keeps_every_rule(artifacts, family):
    checks = checked(artifacts[family])
    assert [check for check in checks if check.outcome != "passed"] == []
    assert len(checks) == len(RULES) + 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_so_does_every_kind_of_checkpoint(tmp_path, dtype, tied):
    source = write_checkpoint(tmp_path / "in", dtype=dtype, tied=tied)
    folder = convert(source, tmp_path / "out", shard_size=50_000)
    assert [check for check in checked(folder) if check.outcome != "passed"] == []


def test_so_do_other_vision_towers_and_text_models(tmp_path):
    folder = convert(write_checkpoint(tmp_path / "in", "llava-next", "mistral", "siglip"), tmp_path / "out")
    assert [check for check in checked(folder) if check.outcome != "passed"] == []


def test_groups_are_said_to_be_for_no_runtime(tmp_path):
    source = write_checkpoint(tmp_path / "in")
    folder = convert(source, tmp_path / "out", CompressW8A16Pass(group_size=32))
    (check,) = (check for check in checked(folder) if check.outcome != "passed")
    assert (check.outcome, check.check) == ("skipped", "mindie and vllm-ascend: one scale a channel")


def weights_of(folder):
    return folder / "quant_model_weight_w8a16.safetensors"


def edit(folder, file, change):
    path = folder / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def describe(change):
    return lambda folder: edit(folder, "quant_model_description.json", change)


def configure(change):
    return lambda folder: edit(folder, "config.json", change)


def tensors(change):
    def apply(folder):
        content = load_file(weights_of(folder))
        change(content)
        save_file({name: value.contiguous() for name, value in content.items()}, weights_of(folder))

    return apply


def both(*changes):
    def apply(folder):
        for change in changes:
            change(folder)

    return apply


def float_layer(content, layer=LAYER):
    """One of the fused layers left in float, consistently."""
    content[f"{layer}.weight"] = content[f"{layer}.weight"].float()
    for part in ("scale", "offset"):
        del content[f"{layer}.weight_{part}"]


def undescribe(content, layer=LAYER):
    content[f"{layer}.weight"] = "FLOAT"
    for part in ("scale", "offset"):
        del content[f"{layer}.weight_{part}"]


def quantized(*layers):
    """Float linears described and stored as quantized ones."""

    def store(content):
        for layer in layers:
            rows = len(content[f"{layer}.weight"])
            content[f"{layer}.weight"] = content[f"{layer}.weight"].to(torch.int8)
            content[f"{layer}.weight_scale"] = torch.ones(rows, 1)
            content[f"{layer}.weight_offset"] = torch.zeros(rows, 1)

    def tell(content):
        for layer in layers:
            content |= {f"{layer}.{part}": "W8A16" for part in ("weight", "weight_scale", "weight_offset")}

    return both(tensors(store), describe(tell))


def renamed(content):
    for name in list(content):
        if name.startswith("vision_tower."):
            content["model." + name] = content.pop(name)


BROKEN = {
    "format: version": describe(lambda content: content.pop("version")),
    "format: every tensor described": describe(lambda content: content.pop("language_model.model.norm.weight")),
    "format: types": describe(lambda content: content.update({"language_model.model.norm.weight": "W8A8"})),
    "format: scale and offset": both(
        tensors(lambda content: content.pop(f"{LAYER}.weight_offset")),
        describe(lambda content: content.pop(f"{LAYER}.weight_offset")),
    ),
    "mindie and vllm-ascend: language model's layers alone": quantized(
        "multi_modal_projector.linear_1", "language_model.lm_head"
    ),
    "format: offsets zero": tensors(lambda content: content[f"{LAYER}.weight_offset"][3].fill_(1)),
    "format: scales positive": tensors(lambda content: content[f"{LAYER}.weight_scale"][3].fill_(0)),
    "mindie: no duplicate key": lambda folder: shutil.copyfile(
        weights_of(folder), folder / "quant_model_weight_again.safetensors"
    ),
    "mindie: no stray file": lambda folder: save_file({}, folder / "model.safetensors"),
    "mindie: name prefixes": both(tensors(renamed), describe(renamed)),
    "mindie: config keys": configure(lambda content: content.pop("quantize")),
    "mindie: rope keys": configure(lambda content: content["text_config"].pop("rope_theta")),
    "mindie: processor files": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "mindie: not writable by others": lambda folder: (folder / "config.json").chmod(0o666),
    "mindie and vllm-ascend: one scale a channel": tensors(
        lambda content: content.update(
            {f"{LAYER}.weight_{part}": content[f"{LAYER}.weight_{part}"].repeat(1, 4) for part in ("scale", "offset")}
        )
    ),
    "vllm-ascend: every linear described": configure(
        lambda content: content["text_config"].update({"num_hidden_layers": 4})
    ),
    "vllm-ascend: fused layers of one type": both(tensors(float_layer), describe(undescribe)),
    "vllm-ascend: no shadowed layer": both(
        tensors(lambda content: content.update({f"{LAYER}_norm.weight": torch.ones(4)})),
        describe(lambda content: content.update({f"{LAYER}_norm.weight": "FLOAT"})),
    ),
}


def test_every_rule_is_broken_below():
    assert BROKEN.keys() == {f"{rule.reader}: {rule.name}" for rule in RULES}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_folder_is_told_which_rule(artifacts, tmp_path, rule):
    folder = shutil.copytree(artifacts["llava"], tmp_path / "broken")
    BROKEN[rule](folder)
    findings = {check.check for check in checked(folder) if check.outcome == "failed"}
    # A name under which a reader would not look is, to the next reader, a layer that is missing.
    allowed = {"vllm-ascend: every linear described"} if rule == "mindie: name prefixes" else set()
    assert rule in findings
    assert findings - allowed == {rule}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda content: content.update({"torch_dtype": "float32"}), "config.json, torch_dtype"),
        (lambda content: content["text_config"].pop("quantize"), "config.json, text_config.quantize"),
        (lambda content: content["text_config"].pop("vocab_size"), "config.json, text_config.vocab_size"),
        (
            lambda content: content["text_config"].update({"tie_word_embeddings": True}),
            "config.json, text_config.tie_word_embeddings",
        ),
        (lambda content: content["text_config"].pop("_name_or_path"), "config.json, text_config._name_or_path"),
    ],
)
def test_a_missing_key_is_named(artifacts, tmp_path, change, place):
    folder = shutil.copytree(artifacts["llava-next"], tmp_path / "broken")
    configure(change)(folder)
    (finding,) = (check for check in checked(folder) if check.outcome == "failed")
    assert (finding.check, finding.place) == ("mindie: config keys", place)


ATTENTION = "language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (
            "vllm-ascend: fused layers of one type",
            both(
                tensors(lambda content: float_layer(content, ATTENTION)),
                describe(lambda content: undescribe(content, ATTENTION)),
            ),
        ),
        (
            "mindie: processor files",
            lambda folder: edit(
                folder, "tokenizer_config.json", lambda content: content.update(extra_special_tokens=[])
            ),
        ),
        (
            "mindie: processor files",
            lambda folder: edit(
                folder, "tokenizer_config.json", lambda content: content.update(tokenizer_class="TokenizersBackend")
            ),
        ),
        (
            "mindie: processor files",
            lambda folder: edit(folder, "processor_config.json", lambda content: content.update(image_processor={})),
        ),
        (
            "mindie: no stray file",
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        ),
        (
            "format: scale and offset",
            tensors(
                lambda content: content.update(
                    {f"{LAYER}.weight_offset": content[f"{LAYER}.weight_offset"].to(torch.int8)}
                )
            ),
        ),
        (
            "format: scale and offset",
            tensors(lambda content: content.update({f"{LAYER}.weight": content[f"{LAYER}.weight"].reshape(-1)})),
        ),
        (
            "mindie and vllm-ascend: language model's layers alone",
            quantized(*(f"vision_tower.vision_model.encoder.layers.0.self_attn.{part}_proj" for part in "qkv")),
        ),
    ],
)
def test_another_way_to_break_a_rule(artifacts, tmp_path, rule, change):
    folder = shutil.copytree(artifacts["llava"], tmp_path / "broken")
    change(folder)
    assert {check.check for check in checked(folder) if check.outcome == "failed"} == {rule}


@pytest.mark.parametrize(
    "change",
    [
        configure(lambda content: content["text_config"].update(num_hidden_layers="2")),
        configure(lambda content: content.update(text_config=[1])),
        configure(lambda content: content["text_config"].update(rope_parameters=[1])),
        describe(lambda content: content.update(optional={})),
    ],
)
def test_what_no_rule_expects_is_a_finding(artifacts, tmp_path, change):
    folder = shutil.copytree(artifacts["llava"], tmp_path / "broken")
    change(folder)
    assert [check for check in checked(folder) if check.outcome == "failed"]


def test_a_key_that_stands_in_two_files_is_named_with_both(artifacts, tmp_path):
    folder = shutil.copytree(artifacts["llava"], tmp_path / "broken")
    save_file({f"{LAYER}.weight_scale": torch.ones(128, 1)}, folder / "quant_model_weight_extra.safetensors")
    (finding,) = (check for check in checked(folder) if check.outcome == "failed")
    assert finding.place == f"{LAYER}.weight_scale"
    assert "quant_model_weight_extra.safetensors and quant_model_weight_w8a16.safetensors" in finding.detail


def test_a_folder_that_cannot_be_opened_is_one_finding(artifacts, tmp_path):
    folder = shutil.copytree(artifacts["llava"], tmp_path / "broken")
    weights_of(folder).write_bytes(weights_of(folder).read_bytes()[:-1])
    (check,) = checked(folder)
    assert (check.check, check.outcome) == ("format: opens", "failed")
