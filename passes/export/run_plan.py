"""The run plan of an Ascend artifact: launch lines, numbers of cards, and the memory that each card needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manifests.run_plan import RunPlan, RuntimePlan, WorldSize
from passes.export.ascend import AscendWeights

__all__ = ["run_plan"]

# What MindIE's scripts for these models offer.
_MINDIE_CARDS = (1, 2, 4, 8)
_VLLM_CARDS = (1, 2, 4, 8, 16)
_HALF = 2  # bytes of a value that a runtime holds in half precision


def run_plan(
    weights: AscendWeights, config: dict[str, Any], batch: int = 1, input_tokens: int = 2048, new_tokens: int = 256
) -> RunPlan:
    """Plan how to run an artifact.

    A runtime divides the matrices of the language model and the heads of its cache over the cards; everything else counts on
    every card. The memory of activations, and of the runtime itself, comes on top.

    Args:
        weights: the artifact's tensors.
        config: its config.json.
        batch: prompts at once.
        input_tokens: longest prompt, image tokens included.
        new_tokens: longest answer.
    """
    family = config["model_type"]
    runtimes, notes = [], []
    if weights.group_size:
        notes.append(
            f"scales for groups of {weights.group_size} input channels: MindIE and vllm-ascend read W8A16 per channel only"
        )
    else:
        lengths = (batch, input_tokens, new_tokens)
        runtimes.append(_runtime("mindie", weights, config, lengths))
        if family == "mllama":
            notes.append("mindie: it loads these weights, and its own table of models lists mllama in bfloat16 only")
            notes.append("vllm-ascend: vLLM has dropped mllama (vllm-project/vllm#24907)")
        else:
            runtimes.append(_runtime("vllm-ascend", weights, config, lengths))
    return RunPlan(batch=batch, input_tokens=input_tokens, new_tokens=new_tokens, runtimes=runtimes, notes=notes)


def _runtime(
    runtime: str, weights: AscendWeights, config: dict[str, Any], lengths: tuple[int, int, int]
) -> RuntimePlan:
    batch, input_tokens, new_tokens = lengths
    command = _mindie_command if runtime == "mindie" else _vllm_command
    sizes = [
        WorldSize(
            cards=cards,
            weights=_weights_per_card(weights, cards),
            cache=_cache_per_card(config, cards, batch, input_tokens + new_tokens),
            command=command(config, cards, batch, input_tokens, new_tokens),
        )
        for cards in _world_sizes(runtime, config)
    ]
    return RuntimePlan.model_validate({"runtime": runtime, "world_sizes": sizes})


def _world_sizes(runtime: str, config: dict[str, Any]) -> Iterator[int]:
    """Numbers of cards over which the attention heads divide; key-value heads divide too, or are repeated."""
    text, vision = config["text_config"], config["vision_config"]
    heads, key_values = text["num_attention_heads"], text.get("num_key_value_heads") or text["num_attention_heads"]
    divided = [heads]
    if runtime == "vllm-ascend":
        # It divides the vision tower as well.
        divided += [text["intermediate_size"], vision["num_attention_heads"], vision["intermediate_size"]]
    for cards in _MINDIE_CARDS if runtime == "mindie" else _VLLM_CARDS:
        if all(size % cards == 0 for size in divided) and (key_values % cards == 0 or cards % key_values == 0):
            yield cards


def _weights_per_card(weights: AscendWeights, cards: int) -> int:
    total = 0
    for part in (part for shard in weights.shards for part in shard):
        count = 1
        for length in part.entry.shape:
            count *= length
        size = count if part.entry.dtype == "I8" else _HALF * count
        shared = part.entry.name.startswith("language_model.") and len(part.entry.shape) > 1
        total += -(-size // cards) if shared else size
    return total


def _cache_per_card(config: dict[str, Any], cards: int, batch: int, tokens: int) -> int:
    text = config["text_config"]
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    crossing = len(text.get("cross_attention_layers") or [])
    positions = (text["num_hidden_layers"] - crossing) * tokens
    if crossing:
        vision = config["vision_config"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        positions += crossing * vision["max_num_tiles"] * patches
    return 2 * _HALF * -(-heads // cards) * head_dim * positions * batch


def _mindie_command(config: dict[str, Any], cards: int, batch: int, input_tokens: int, new_tokens: int) -> str:
    """A line for the folder of MindIE's ATB models; the script says itself which cards it uses, so that is changed in it."""
    llava = config["model_type"] != "mllama"
    script = f"examples/models/{'llava' if llava else 'mllama'}/run_pa.sh"
    devices = ",".join(map(str, range(cards)))
    frames = "8 " if llava else ""
    return (
        f"sed -i 's/^export ASCEND_RT_VISIBLE_DEVICES=.*/export ASCEND_RT_VISIBLE_DEVICES={devices}/' {script} && "
        f"bash {script} --run $ARTIFACT $IMAGES {frames}{batch} {input_tokens} {new_tokens}"
    )


def _vllm_command(config: dict[str, Any], cards: int, batch: int, input_tokens: int, new_tokens: int) -> str:
    return (
        f"vllm serve $ARTIFACT --quantization ascend --tensor-parallel-size {cards} --dtype {config['torch_dtype']} "
        f"--max-model-len {input_tokens + new_tokens} --max-num-seqs {batch}"
    )
