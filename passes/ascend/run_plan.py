"""The run plan of an Ascend artifact: commands that start it, numbers of cards, and the memory that each card needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manifests.run_plan import RunPlan, RuntimePlan, WorldSize
from passes.ascend.family import AscendFamily
from passes.export.shards import Shards

__all__ = ["plan_lengths", "run_plan"]

# Numbers of cards that each runtime supports; MindIE's are those of its scripts for these models.
_MINDIE_CARDS = (1, 2, 4, 8)
_VLLM_CARDS = (1, 2, 4, 8, 16)
_HALF = 2  # bytes of a value that a runtime holds in half precision
# MindIE's throughput protocol: batches of up to 10 prompts, 256 new tokens.
_BATCH, _NEW_TOKENS = 10, 256
# Length of prompts to plan for, and of the text beside an image if the image takes most of that length.
_INPUT_TOKENS, _TEXT_TOKENS = 2048, 512
# Linear layers whose input channels are divided over the cards, so that every card needs the scales of all rows.
_ROW_PARALLEL = (".o_proj.", ".down_proj.")
_KEY_VALUE = (".k_proj.", ".v_proj.")


def plan_lengths(config: dict[str, Any], image_tokens: int) -> dict[str, int]:
    """Batch and lengths to plan for, as arguments of `run_plan`.

    Args:
        config: the artifact's config.json.
        image_tokens: maximum number of tokens that an image takes in a prompt.
    """
    longest = config["text_config"]["max_position_embeddings"]
    new_tokens = min(_NEW_TOKENS, longest // 2)
    input_tokens = min(max(_INPUT_TOKENS, image_tokens + _TEXT_TOKENS), longest - new_tokens)
    return {"batch": _BATCH, "input_tokens": input_tokens, "new_tokens": new_tokens}


def run_plan(
    weights: Shards,
    group_size: int,
    config: dict[str, Any],
    family: AscendFamily,
    batch: int,
    input_tokens: int,
    new_tokens: int,
) -> RunPlan:
    """Plan how to run an artifact.

    A runtime divides the matrices of the language model and the heads of its cache over the cards; every card holds all
    other tensors. The plan does not count the memory of activations and of the runtime itself.

    Args:
        weights: the artifact's tensors.
        group_size: number of input channels that share a scale, 0 for one scale per row.
        config: the artifact's config.json.
        family: the family of the model.
        batch: number of prompts in a batch.
        input_tokens: maximum number of tokens of a prompt, image tokens included.
        new_tokens: maximum number of tokens of an answer.
    """
    if group_size:
        runtimes = []
        notes = [
            f"scales for groups of {group_size} input channels: MindIE and vllm-ascend read W8A16 per channel only"
        ]
    else:
        lengths = (batch, input_tokens, new_tokens)
        runtimes = [_runtime(runtime, weights, config, family, lengths) for runtime in family.runtimes]
        notes = list(family.notes)
    return RunPlan(batch=batch, input_tokens=input_tokens, new_tokens=new_tokens, runtimes=runtimes, notes=notes)


def _runtime(
    runtime: str, weights: Shards, config: dict[str, Any], family: AscendFamily, lengths: tuple[int, int, int]
) -> RuntimePlan:
    batch, input_tokens, new_tokens = lengths

    def command(cards: int) -> str:
        if runtime == "mindie":
            return _mindie_command(family, cards, *lengths)
        return _vllm_command(config, cards, *lengths)

    sizes = [
        WorldSize(
            cards=cards,
            weights=_weights_per_card(weights, config, family, cards),
            cache=_cache_per_card(config, family, cards, batch, input_tokens + new_tokens),
            command=command(cards),
        )
        for cards in _world_sizes(runtime, config)
    ]
    benchmark = _mindie_benchmark(family, *lengths) if runtime == "mindie" else _vllm_benchmark(new_tokens)
    return RuntimePlan.model_validate({"runtime": runtime, "world_sizes": sizes, "benchmark": benchmark})


def _world_sizes(runtime: str, config: dict[str, Any]) -> Iterator[int]:
    """Numbers of cards that divide the attention heads evenly; key-value heads are divided evenly too, or repeated."""
    text, vision = config["text_config"], config["vision_config"]
    heads, key_values = text["num_attention_heads"], _key_value_heads(config)
    divided = [heads]
    if runtime == "vllm-ascend":
        # vllm-ascend divides the vision tower as well.
        divided += [text["intermediate_size"], *_vision_sizes(vision)]
    for cards in _MINDIE_CARDS if runtime == "mindie" else _VLLM_CARDS:
        if all(size % cards == 0 for size in divided) and (key_values % cards == 0 or cards % key_values == 0):
            yield cards


def _vision_sizes(vision: dict[str, Any]) -> tuple[int, int]:
    """Attention heads and inner channels of a vision tower; Qwen-VL's configs have names of their own."""
    heads = vision["num_attention_heads"] if "num_attention_heads" in vision else vision["num_heads"]
    inner = vision["intermediate_size"] if "intermediate_size" in vision else vision["embed_dim"] * vision["mlp_ratio"]
    return int(heads), int(inner)


def _weights_per_card(weights: Shards, config: dict[str, Any], family: AscendFamily, cards: int) -> int:
    total = 0
    for part in weights.tensors:
        count = 1
        for length in part.entry.shape:
            count *= length
        size = count if part.entry.dtype == "I8" else _HALF * count
        total += -(-size // _divisor(part.entry.name, part.entry.shape, config, family, cards))
    return total


def _divisor(name: str, shape: tuple[int, ...], config: dict[str, Any], family: AscendFamily, cards: int) -> int:
    """The number of cards over which a tensor is divided; 1 if every card holds all of it."""
    if not name.startswith((family.text_prefix, family.head)) or len(shape) < 2:
        return 1
    if any(part in name for part in _ROW_PARALLEL) and not name.endswith(".weight"):
        return 1
    if any(part in name for part in _KEY_VALUE):
        return min(cards, _key_value_heads(config))
    return cards


def _cache_per_card(config: dict[str, Any], family: AscendFamily, cards: int, batch: int, tokens: int) -> int:
    text, heads = config["text_config"], _key_value_heads(config)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    positions = text["num_hidden_layers"] * tokens
    if family.cross_attention is not None:
        # The cache of cross-attention layers holds only the features of the images.
        crossing = len(family.cross_attention.numbers(text))
        positions += crossing * (family.cross_attention.positions(config) - tokens)
    return 2 * _HALF * -(-heads // cards) * head_dim * positions * batch


def _key_value_heads(config: dict[str, Any]) -> int:
    text = config["text_config"]
    heads: int = text.get("num_key_value_heads") or text["num_attention_heads"]
    return heads


def _mindie_script(family: AscendFamily) -> str:
    return f"examples/models/{family.script}/run_pa.sh"


def _mindie_arguments(family: AscendFamily, batch: int, input_tokens: int, new_tokens: int) -> str:
    frames = f"{family.frames} " if family.frames else ""
    return f"$ARTIFACT $IMAGES {frames}{batch} {input_tokens} {new_tokens}"


def _mindie_command(family: AscendFamily, cards: int, batch: int, input_tokens: int, new_tokens: int) -> str:
    """A command for the folder of MindIE's ATB models; the cards are set in the script itself, so sed changes them there."""
    script, devices = _mindie_script(family), ",".join(map(str, range(cards)))
    return (
        f"sed -i 's/^export ASCEND_RT_VISIBLE_DEVICES=.*/export ASCEND_RT_VISIBLE_DEVICES={devices}/' {script} && "
        f"bash {script} --run {_mindie_arguments(family, batch, input_tokens, new_tokens)}"
    )


def _mindie_benchmark(family: AscendFamily, batch: int, input_tokens: int, new_tokens: int) -> str:
    """The script's own measurement, on the cards that are set in the script; $IMAGES must hold one image."""
    return (
        "ATB_LLM_BENCHMARK_ENABLE=1 ATB_LLM_BENCHMARK_FILEPATH=$PWD/benchmark.csv "
        f"bash {_mindie_script(family)} --performance {_mindie_arguments(family, batch, input_tokens, new_tokens)}"
    )


def _vllm_command(config: dict[str, Any], cards: int, batch: int, input_tokens: int, new_tokens: int) -> str:
    return (
        f"vllm serve $ARTIFACT --quantization ascend --tensor-parallel-size {cards} --dtype {config['torch_dtype']} "
        f"--max-model-len {input_tokens + new_tokens} --max-num-seqs {batch}"
    )


def _vllm_benchmark(new_tokens: int) -> str:
    return (
        f"vlmconvert bench $ARTIFACT --protocol mindie --new-tokens {new_tokens} --endpoint http://localhost:8000/v1 "
        "--csv benchmark.csv"
    )
