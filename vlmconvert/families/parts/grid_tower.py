"""The components of a vision tower that takes grids of any size, as Qwen-VL's: patch embeddings, and layers with the merger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Block, Component, HostStep, Kind, kinds_by_name
from vlmconvert.families.parts.decoder import cache_shape
from vlmconvert.families.parts.ports import float_port, int_port, renamed

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = ["ROPE_THETA", "check_grid_tower", "grid_dims", "grid_tower", "patch_embeddings", "tower_width"]

# Base of the frequencies of the patches' rotary positions; OpenVINO GenAI knows no other one.
ROPE_THETA = 10000.0

_MODULES = "vlmconvert.families.parts.grid_tower_modules"
_TOWER = "model.visual"
_FULL, _WINDOW = "vision_attention_mask", "window_attention_mask"


def patch_embeddings(config: dict[str, Any]) -> Component:
    """`pixel_values` [patches, channels * time * height * width] -> `patch_embeds` [patches, width]."""
    vision = config["vision_config"]
    size = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    pixel_values = float_port("pixel_values", "patches", size)
    patch_embeds = _patch_embeds(config)
    kind = Kind("patch_embeddings", f"{_MODULES}:patch_embeddings", (pixel_values,), (patch_embeds,), grid_dims(config))
    return Component(
        name="vision_embeddings",
        side="vision",
        role="patch embeddings",
        kinds=kinds_by_name(kind),
        blocks=(
            Block(
                "patch_embed",
                kind.name,
                {"patch_embed": f"{_TOWER}.patch_embed"},
                {"pixel_values": "pixel_values"},
                {"patch_embeds": "patch_embeds"},
                role="embeddings",
            ),
        ),
        inputs=(pixel_values,),
        outputs=(patch_embeds,),
        aliases={"pixel_values": "hidden_states", "patch_embeds": "last_hidden_state"},
    )


def grid_tower(
    config: dict[str, Any],
    host_step: HostStep,
    *,
    full: Sequence[int] | None = None,
    after: Mapping[int, tuple[Kind, Block]] = MappingProxyType({}),
    last: tuple[tuple[Kind, Block], ...] = (),
) -> Component:
    """`patch_embeds` [patches, width], masks and positions -> `image_features` [features, width of the language model].

    Args:
        config: the completed config.
        host_step: host step that makes masks and positions.
        full: numbers of the layers in which patches attend to all patches of their image or frame; in the others they attend to
            those of their window. None if there are no windows.
        after: number of a layer -> a block that follows it.
        last: blocks after the merger; the outputs of the last one are outputs of the component.
    """
    vision, dims = config["vision_config"], grid_dims(config)
    width = tower_width(vision)
    head_dim = width // vision["num_heads"]
    patch_embeds = _patch_embeds(config)
    rotary_pos_emb = float_port("rotary_pos_emb", "patches", head_dim // 2)
    cos, sin = (float_port(name, "patches", head_dim) for name in ("cos", "sin"))
    hidden_states = float_port("hidden_states", 1, "patches", width)
    mask = float_port(_FULL, 1, "patches", "patches")
    features = float_port("image_features", "features", config["text_config"]["hidden_size"])
    window_index = () if full is None else (int_port("window_index", "features"),)
    windows = () if full is None else (renamed(mask, _WINDOW),)
    placed = (patch_embeds, rotary_pos_emb, *window_index)
    positions = Kind("grid_positions", f"{_MODULES}:grid_positions", placed, (hidden_states, cos, sin), dims)
    layer = Kind("vision_layer", f"{_MODULES}:grid_layer", (hidden_states, mask, cos, sin), (hidden_states,), dims)
    merger = Kind("merger", f"{_MODULES}:grid_merger", (hidden_states, *window_index), (features,), dims)
    blocks = [_block("positions", positions, {})]
    for index in range(vision["depth"]):
        own = {} if full is None or index in full else {_FULL: _WINDOW}
        weights = {"layer": f"{_TOWER}.blocks.{index}"}
        blocks.append(_block(f"blocks.{index}", layer, weights, own, role="layer"))
        if index in after:
            blocks.append(after[index][1])
    blocks.append(_block("merger", merger, {"merger": f"{_TOWER}.merger"}, role="layer"))
    more = [*after.values(), *last]
    ends = tuple(port for kind, _ in last[-1:] for port in kind.outputs)
    return Component(
        name="vision_embeddings_merger",
        side="vision",
        role="vision tower with the merger",
        kinds=kinds_by_name(positions, layer, merger, *(kind for kind, _ in more)),
        blocks=(*blocks, *(block for _, block in last)),
        inputs=(patch_embeds, mask, *windows, *window_index, rotary_pos_emb),
        outputs=(features, *ends),
        host_step=host_step,
        aliases={"patch_embeds": "hidden_states", _FULL: "attention_mask", "image_features": "last_hidden_state"},
    )


def check_grid_tower(config: dict[str, Any]) -> None:
    """Refuse a vision tower over grids whose config is contradictory.

    Raises:
        BadInputError: with the entry of the config.
    """
    vision, text = config["vision_config"], config["text_config"]
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size", "depth", "num_heads"):
        if not isinstance(vision[name], int) or vision[name] < 1:
            raise BadInputError(
                f"config.json has {name} {vision[name]} in its vision_config, and not a number from 1 on: copy config.json from the "
                "model's page"
            )
    if tower_width(vision) % (4 * vision["num_heads"]):
        raise BadInputError(
            f"config.json has {vision['num_heads']} attention heads for {tower_width(vision)} channels (num_heads of vision_config), and a "
            "head has a multiple of 4: copy config.json from the model's page"
        )
    channels = vision.get("out_hidden_size", vision["hidden_size"])
    if channels != text["hidden_size"]:
        raise BadInputError(
            f"config.json gives features {channels} channels (vision_config), and the text model has {text['hidden_size']}: copy "
            "config.json from the model's page"
        )
    theta = (vision.get("rope_parameters") or {}).get("rope_theta", ROPE_THETA)
    if theta != ROPE_THETA:
        raise BadInputError(
            f"config.json has rope_theta {theta} in its vision_config, and runtimes know {ROPE_THETA:g} alone: copy config.json from the "
            "model's page"
        )
    rope = text.get("rope_parameters") or {}
    sections, half = rope.get("mrope_section"), cache_shape(text)[1] // 2
    if not isinstance(sections, list | tuple) or len(sections) != 3 or sum(sections) != half:
        raise BadInputError(
            f"config.json has mrope_section {sections} in its text_config, and not three numbers of frequencies that add up to {half}: "
            "copy config.json from the model's page"
        )


def tower_width(vision: dict[str, Any]) -> int:
    """Number of channels of the tower's hidden states."""
    return int(vision["embed_dim"] if "embed_dim" in vision else vision["hidden_size"])


def _block(
    name: str, kind: Kind, weights: dict[str, str], other: Mapping[str, str] | None = None, role: str = "glue"
) -> Block:
    """A block whose ports read the values of their own names, but for `other` (port -> value)."""
    inputs = {port.name: port.name for port in kind.inputs} | dict(other or {})
    return Block(name, kind.name, weights, inputs, {port.name: port.name for port in kind.outputs}, role=role)


def _patch_embeds(config: dict[str, Any]) -> Port:
    return float_port("patch_embeds", "patches", tower_width(config["vision_config"]))


def grid_dims(config: dict[str, Any]) -> dict[str, int]:
    """Sizes with which blocks of the tower are traced."""
    return {"features": 3, "patches": 3 * config["vision_config"]["spatial_merge_size"] ** 2}
