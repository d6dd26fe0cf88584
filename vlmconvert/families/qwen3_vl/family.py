"""Qwen3-VL: Qwen2-VL with learned positions of patches, and features of several layers of the tower in the first text layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from manifests.errors import BadInputError
from manifests.model import Port
from passes.vocabulary import Block, Component, HostStep, Kind, kinds_by_name
from vlmconvert.families.parts.decoder import language_model, text_embeddings
from vlmconvert.families.parts.grid_tower import grid_dims, grid_tower, patch_embeddings, tower_width
from vlmconvert.families.parts.ports import float_port, int_port
from vlmconvert.families.qwen2_vl.family import FAMILY as QWEN2_VL
from vlmconvert.families.qwen2_vl.family import Qwen2VL, ascend_family

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]

__all__ = ["FAMILY", "Qwen3VL"]

_MODULES, _FEATURES = "vlmconvert.families.qwen3_vl.modules", "vlmconvert.families.qwen3_vl.features"
_GRIDS = ("image_grid_thw", "video_grid_thw")


class Qwen3VL(Qwen2VL):
    """Qwen3-VL."""

    videos: ClassVar[tuple[str, str]] = ("qwen3_vl", "Qwen3VLVideoProcessor")

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Patch embeddings, their positions, vision tower with all mergers, text embeddings and language model."""
        self.check(config)
        return (patch_embeddings(config), _position_embeddings(config), _tower(config), *self.text(config))

    def check(self, config: dict[str, Any]) -> None:
        super().check(config)
        vision = config["vision_config"]
        indexes, depth, entries = (
            vision[name] for name in ("deepstack_visual_indexes", "depth", "num_position_embeddings")
        )
        if not indexes or len(set(indexes)) < len(indexes) or not all(0 <= index < depth for index in indexes):
            raise BadInputError(
                f"config.json has deepstack_visual_indexes {list(indexes)}, and not some of the {depth} layers of the vision tower: copy "
                "config.json from the model's page"
            )
        if round(entries**0.5) ** 2 != entries:
            raise BadInputError(
                f"config.json has {entries} positions of patches (num_position_embeddings of vision_config), which is no square: copy "
                "config.json from the model's page"
            )

    def text(self, config: dict[str, Any]) -> tuple[Component, Component]:
        """Text embeddings, and a language model to whose first hidden states features are added."""
        step = HostStep(
            f"{_FEATURES}:merge_features",
            ("input_ids", "inputs_embeds", "image_features", "deepstack_features", "image_grid_thw"),
            ("inputs_embeds", "visual_pos_masks", "deepstack_visual_embeds"),
        )
        tokens = ("image_token_id", "video_token_id")
        plain = language_model(config, step, f"{_MODULES}:positions", position_axes=3)
        return text_embeddings(config, *tokens), _with_features(plain, config)

    def moments(self, processed: Arrays, config: dict[str, Any]) -> list[tuple[Any, ...]]:
        """See `Qwen2VL.moments`; each moment is a run of its own, after its time as text."""
        grids = processed["video_grid_thw"].tolist()
        return [(1, high, wide, 1) for time, high, wide in grids for _ in range(time)]

    def open_processor(self, folder: Path) -> Any:
        """See `Family.open_processor`; the moments of a video take the place of its start and end as well.

        transformers puts them between both, each with a start and an end of its own.
        """
        from passes.compat.transformers import with_texts_changed

        processor = super().open_processor(folder)
        start, video, end = processor.vision_start_token, processor.video_token, processor.vision_end_token
        return with_texts_changed(processor, lambda text: text.replace(f"{start}{video}{end}", video))

    def repeat_rows(self, inputs: Arrays, times: int) -> Arrays:
        import numpy as np

        repeated = super().repeat_rows(inputs, times)
        if "deepstack_visual_embeds" in inputs:
            features = inputs["deepstack_visual_embeds"]
            ends = inputs["visual_pos_masks"].sum(axis=1).cumsum()
            parts = [part for part in np.split(features, ends[:-1], axis=1) for _ in range(times)]
            repeated["deepstack_visual_embeds"] = np.concatenate(parts, axis=1)
        return repeated


def _position_embeddings(config: dict[str, Any]) -> Component:
    """The four entries of the table of positions around each patch: numbers [4, patches] -> [4, patches, width]."""
    numbers = int_port("position_indices", 4, "patches")
    embeds = float_port("position_embeds", 4, "patches", tower_width(config["vision_config"]))
    kind = Kind("position_embeddings", f"{_MODULES}:position_embeddings", (numbers,), (embeds,), {"patches": 12})
    return Component(
        name="vision_embeddings_pos",
        side="vision",
        role="position embeddings",
        kinds=kinds_by_name(kind),
        blocks=(
            Block(
                "pos_embed",
                kind.name,
                {"": "model.visual.pos_embed"},
                {numbers.name: numbers.name},
                {embeds.name: embeds.name},
                role="embeddings",
            ),
        ),
        inputs=(numbers,),
        outputs=(embeds,),
        host_step=HostStep(f"{_FEATURES}:position_indices", _GRIDS, (numbers.name,)),
        aliases={numbers.name: "input", embeds.name: "last_hidden_state"},
    )


def _tower(config: dict[str, Any]) -> Component:
    vision = config["vision_config"]
    width, count = config["text_config"]["hidden_size"], len(vision["deepstack_visual_indexes"])
    hidden_states = float_port("hidden_states", 1, "patches", tower_width(vision))
    features = float_port("features", "features", width)
    dims = grid_dims(config)
    merger = Kind("deepstack_merger", f"{_MODULES}:deepstack_merger", (hidden_states,), (features,), dims)
    after = {
        layer: (
            merger,
            Block(
                f"deepstack_merger_list.{number}",
                merger.name,
                {"merger": f"model.visual.deepstack_merger_list.{number}"},
                {"hidden_states": "hidden_states"},
                {"features": f"features.{layer}"},
            ),
        )
        for number, layer in enumerate(vision["deepstack_visual_indexes"])
    }
    parts = tuple(float_port(f"features.{number}", "features", width) for number in range(count))
    joined = float_port("deepstack_features", count, "features", width)
    stack = Kind("deepstack_features", f"{_MODULES}:deepstack_features", parts, (joined,), dims)
    # In the order of the layers, as transformers collects them.
    made = {port.name: f"features.{layer}" for port, layer in zip(parts, sorted(after), strict=True)}
    last = (stack, Block("deepstack", stack.name, {}, made, {joined.name: joined.name}, role="glue"))
    step = HostStep(
        f"{_FEATURES}:tower_inputs",
        ("patch_embeds", "position_embeds", *_GRIDS),
        ("patch_embeds", "vision_attention_mask", "rotary_pos_emb"),
    )
    tower = grid_tower(config, step, after=after, last=(last,))
    return replace(tower, aliases={**tower.aliases, joined.name: "deepstack_feature_lists"})


def _with_features(model: Component, config: dict[str, Any]) -> Component:
    """The language model with a block after each of its first layers that adds features at the places of images and videos."""
    text, count = config["text_config"], len(config["vision_config"]["deepstack_visual_indexes"])
    hidden_states = float_port("hidden_states", "batch", "sequence", text["hidden_size"])
    # One column that is false stands for a prompt without images, in GenAI too.
    masks = Port(name="visual_pos_masks", dtype="boolean", shape=["batch", "visual_sequence"])
    embeds = float_port("deepstack_visual_embeds", count, "features", text["hidden_size"])
    dims = {"batch": 2, "sequence": 3, "visual_sequence": 3, "features": 4}
    kinds, blocks = dict(model.kinds), []
    for block in model.blocks:
        blocks.append(block)
        number = block.name.removeprefix("layers.")
        if number.isdigit() and int(number) < count:
            kind = Kind(
                f"deepstack.{number}",
                f"{_MODULES}:add_features",
                (hidden_states, masks, embeds),
                (hidden_states,),
                dims,
                {"level": int(number)},
            )
            kinds[kind.name] = kind
            ports = {port.name: port.name for port in kind.inputs}
            blocks.append(Block(kind.name, kind.name, {}, ports, {"hidden_states": "hidden_states"}, role="glue"))
    return replace(model, kinds=kinds, blocks=tuple(blocks), inputs=(*model.inputs, masks, embeds))


FAMILY = replace(
    Qwen3VL(**vars(QWEN2_VL)),
    name="qwen3-vl",
    architecture="Qwen3VLForConditionalGeneration",
    text_models=("qwen3_vl_text",),
    vision_models=("qwen3_vl_vision",),
    ascend=ascend_family("mlp.linear_fc1", "mlp.linear_fc2", mergers=("merger.linear_fc1", "merger.linear_fc2")),
    genai_config={},
)
