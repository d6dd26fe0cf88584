from __future__ import annotations

import pytest

from passes.ascend.format import artifact_config
from passes.ascend.run_plan import plan_lengths, run_plan
from passes.ascend.w8a16 import CompressW8A16Pass
from tests.checkpoints import ascend_family, write_checkpoint
from tests.passes.ascend.conversion import in_shards, opened
from vlmconvert.families import FAMILIES, load_family


def planned(folder, group_size=0, **sizes):
    checkpoint, architecture = opened(folder)
    weights = in_shards(checkpoint, architecture, CompressW8A16Pass(group_size))
    family = ascend_family(folder)
    config = artifact_config(checkpoint, architecture, family)
    config["text_config"] |= sizes
    return run_plan(weights, group_size, config, family, batch=2, input_tokens=100, new_tokens=28), weights


def cards(plan):
    return {runtime.runtime: [size.cards for size in runtime.world_sizes] for runtime in plan.runtimes}


def test_world_sizes_divide_the_heads(tmp_path):
    write_checkpoint(tmp_path)
    plan, _ = planned(tmp_path)
    assert cards(plan) == {"mindie": [1, 2, 4], "vllm-ascend": [1, 2, 4]}
    # 6 heads with 3 for keys and values: over 2 cards 3 are neither divided nor repeated.
    plan, _ = planned(tmp_path, num_attention_heads=6, num_key_value_heads=3)
    assert cards(plan) == {"mindie": [1], "vllm-ascend": [1]}
    # Eight cards divide 8 heads, and vllm-ascend also has the 4 heads of the vision tower to divide.
    plan, _ = planned(tmp_path, num_attention_heads=8, num_key_value_heads=8)
    assert cards(plan) == {"mindie": [1, 2, 4, 8], "vllm-ascend": [1, 2, 4]}


def test_memory_is_that_of_the_tensors(tmp_path):
    write_checkpoint(tmp_path)
    plan, weights = planned(tmp_path)
    one, two, four = plan.runtimes[0].world_sizes
    # On one card all of it, in half precision where it is not int8: scales and offsets are float32 in the file.
    scales = sum(part.entry.size for part in weights.shards[0] if part.entry.dtype == "F32")
    tensors = sum(part.entry.size for part in weights.shards[0])
    assert one.weights == tensors - scales // 2
    # Scales and offsets of the layers whose input is divided are needed whole: o_proj and down_proj, 64 rows each.
    whole = 3 * 2 * 2 * 64 * 2
    layers = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert one.weights - two.weights == (2 * 2 * 512 * 64 + 3 * layers + scales // 2 - whole) // 2
    # Over four cards each of the 2 heads for keys and values is on two.
    keys_and_values = 3 * 2 * (32 * 64 + 2 * 2 * 32)
    assert one.weights - four.weights == (
        (2 * 2 * 512 * 64 + 3 * layers + scales // 2 - whole - keys_and_values) * 3 // 4 + keys_and_values // 2
    )
    # Keys and values of 3 layers, 2 heads of 16, in 2 bytes, for 2 prompts of 128 tokens.
    assert one.cache == 2 * 3 * 2 * 16 * 2 * 2 * 128
    assert two.cache == one.cache // 2
    assert four.cache == two.cache  # a head that is on two cards is there twice


@pytest.mark.parametrize(
    ("longest", "image_tokens", "lengths"),
    [(4096, 576, (2048, 256)), (4096, 2928, (3440, 256)), (2048, 64, (1792, 256)), (256, 64, (128, 128))],
)
def test_lengths_fit_the_image_and_the_model(longest, image_tokens, lengths):
    config = {"text_config": {"max_position_embeddings": longest}}
    planned_lengths = plan_lengths(config, image_tokens)
    assert (planned_lengths["input_tokens"], planned_lengths["new_tokens"]) == lengths
    assert planned_lengths["batch"] == 10


def test_launch_lines(tmp_path, demo):
    write_checkpoint(tmp_path)
    plan, _ = planned(tmp_path)
    mindie, vllm = plan.runtimes
    assert mindie.world_sizes[1].command == (
        "sed -i 's/^export ASCEND_RT_VISIBLE_DEVICES=.*/export ASCEND_RT_VISIBLE_DEVICES=0,1/' "
        "examples/models/llava/run_pa.sh && bash examples/models/llava/run_pa.sh --run $ARTIFACT $IMAGES 8 2 100 28"
    )
    assert vllm.world_sizes[2].command == (
        "vllm serve $ARTIFACT --quantization ascend --tensor-parallel-size 4 --dtype bfloat16 --max-model-len 128 "
        "--max-num-seqs 2"
    )
    assert mindie.benchmark == (
        "ATB_LLM_BENCHMARK_ENABLE=1 ATB_LLM_BENCHMARK_FILEPATH=$PWD/benchmark.csv "
        "bash examples/models/llava/run_pa.sh --performance $ARTIFACT $IMAGES 8 2 100 28"
    )
    assert vllm.benchmark.startswith("vlmconvert bench $ARTIFACT --protocol mindie --new-tokens 28 --endpoint http")
    plan, _ = planned(demo)
    assert cards(plan) == {"mindie": [1, 2, 4]}
    assert "run_pa.sh --run $ARTIFACT $IMAGES 2 100 28" in plan.runtimes[0].world_sizes[0].command
    assert any("vLLM has dropped mllama" in note for note in plan.notes)


@pytest.mark.parametrize("family", ["llava", "llava-next"])
def test_groups_have_no_runtime(tmp_path, family):
    write_checkpoint(tmp_path, family)
    plan, _ = planned(tmp_path, group_size=32)
    assert plan.runtimes == []
    assert "groups of 32" in plan.notes[0]


@pytest.mark.parametrize("family", [name for name in FAMILIES.names if load_family(name).ascend])
def test_every_runtime_opens_the_family_or_has_a_note(family):
    ascend = load_family(family).ascend
    noted = {note.partition(":")[0] for note in ascend.notes}
    assert {*ascend.runtimes} | noted == {"mindie", "vllm-ascend"}
