"""Scenes: small images that are drawn from a seed, with questions, answers and a caption.

They are the default calibration source and the held-out test of the embedded demo models, so that a conversion can be
calibrated and checked without a network. The three splits draw from disjoint seed ranges.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from PIL import Image, ImageDraw

__all__ = ["COLOURS", "SHAPES", "Item", "Question", "Scene", "Split", "draw_scene"]

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 196, 25),
    "purple": (142, 56, 176),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COUNTS = ("one", "two", "three", "four")
CAPTION_QUESTION = "Describe the image."

_SEEDS_PER_SPLIT = 1 << 40
_TILE = 56
# Canvas sizes in tiles (wide, high): the aspect ratios that four tiles can hold.
_CANVASES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


class Split(IntEnum):
    """A split of the scenes; each split has a seed range of its own."""

    TRAIN = 0
    CALIBRATION = 1
    TEST = 2


@dataclass(frozen=True)
class Question:
    """One question about a scene. `kind` is colour, shape, count, exists or where."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Item:
    """One shape in a scene: `x` and `y` are its centre, `radius` is half its extent, in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One drawn image (RGB) with its questions (each kind at most once), its caption and the shapes in it."""

    id: str
    image: Image.Image
    questions: tuple[Question, ...]
    caption: str
    items: tuple[Item, ...]


def draw_scene(split: Split, index: int, seed: int = 0, most_items: int = 4) -> Scene:
    """Draw scene number `index` of a split.

    Args:
        split: the seed range; scenes of different splits never share a seed.
        index: position in the split, 0 or more.
        seed: shifts the whole range, so that two calibrations can use different scenes of one split.
        most_items: maximum number of shapes, 1 to 4; training starts with simple scenes.

    Returns:
        The scene; the same arguments give the same pixels and texts.

    Raises:
        ValueError: if `index` and `seed` leave the split's range.
    """
    offset = seed * 1_000_003 + index
    if not 0 <= offset < _SEEDS_PER_SPLIT or index < 0:
        raise ValueError(f"scene {index} with seed {seed} lies outside the {split.name.lower()} split")
    rng = random.Random(int(split) * _SEEDS_PER_SPLIT + offset)
    width, height = _image_size(rng)
    items = _place_items(rng, width, height, most_items)
    image = _paint(rng, width, height, items)
    makers: tuple[Callable[[random.Random, list[Item], int, int], Question | None], ...] = (
        _ask_colour,
        _ask_shape,
        _ask_count,
        _ask_exists,
        _ask_where,
    )
    questions = [question for make in makers if (question := make(rng, items, width, height)) is not None]
    rng.shuffle(questions)
    return Scene(f"{split.name.lower()}-{seed}-{index}", image, tuple(questions), _caption(items), tuple(items))


def _image_size(rng: random.Random) -> tuple[int, int]:
    columns, rows = rng.choice(_CANVASES)
    return (
        columns * _TILE - rng.randint(0, _TILE // 7),
        rows * _TILE - rng.randint(0, _TILE // 7),
    )


def _place_items(rng: random.Random, width: int, height: int, most_items: int) -> list[Item]:
    count = min(most_items, rng.randint(1, 2 if width * height < 1.5 * _TILE * _TILE else 4))
    items: list[Item] = []
    while len(items) < count:
        radius = rng.uniform(8.0, 12.0)
        # Centres keep clear of the middle lines, so that "top left" is never a matter of one pixel.
        x = _clear_of_middle(rng, radius, width)
        y = _clear_of_middle(rng, radius, height)
        if all((x - item.x) ** 2 + (y - item.y) ** 2 > (1.25 * (radius + item.radius)) ** 2 for item in items):
            items.append(Item(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), x, y, radius))
    return sorted(items, key=lambda item: item.x)


def _clear_of_middle(rng: random.Random, radius: float, side: int) -> float:
    low, high = radius + 1, side / 2 - 0.06 * side
    position = rng.uniform(min(low, high), high)
    return position if rng.random() < 0.5 else side - position


def _paint(rng: random.Random, width: int, height: int, items: list[Item]) -> Image.Image:
    background = tuple(rng.randint(205, 255) for _ in range(3))
    scale = 4  # drawn large and reduced, for smooth edges
    image = Image.new("RGB", (width * scale, height * scale), background)
    draw = ImageDraw.Draw(image)
    for item in items:
        _paint_item(draw, item, background, scale)
    return image.resize((width, height), Image.Resampling.BOX)


def _paint_item(draw: ImageDraw.ImageDraw, item: Item, background: tuple[int, ...], scale: int) -> None:
    x, y, r = item.x * scale, item.y * scale, item.radius * scale
    colour = COLOURS[item.colour]
    if item.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif item.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        draw.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=background)
    elif item.shape == "square":
        s = 0.85 * r
        draw.rectangle((x - s, y - s, x + s, y + s), fill=colour)
    elif item.shape == "triangle":
        draw.polygon(((x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)), fill=colour)
    else:
        t = 0.33 * r
        draw.rectangle((x - r, y - t, x + r, y + t), fill=colour)
        draw.rectangle((x - t, y - r, x + t, y + r), fill=colour)


def _unique(items: list[Item], attribute: str) -> list[Item]:
    values = [getattr(item, attribute) for item in items]
    return [item for item in items if values.count(getattr(item, attribute)) == 1]


def _ask_colour(rng: random.Random, items: list[Item], _width: int, _height: int) -> Question | None:
    if not (candidates := _unique(items, "shape")):
        return None
    item = rng.choice(candidates)
    return Question("colour", f"What colour is the {item.shape}?", item.colour)


def _ask_shape(rng: random.Random, items: list[Item], _width: int, _height: int) -> Question | None:
    if not (candidates := _unique(items, "colour")):
        return None
    item = rng.choice(candidates)
    return Question("shape", f"Which shape is {item.colour}?", item.shape)


def _ask_count(_rng: random.Random, items: list[Item], _width: int, _height: int) -> Question:
    return Question("count", "How many shapes are there?", COUNTS[len(items) - 1])


def _ask_exists(rng: random.Random, items: list[Item], _width: int, _height: int) -> Question:
    present = {(item.colour, item.shape) for item in items}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(present))
        return Question("exists", f"Is there a {colour} {shape}?", "yes")
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]
    # Half of the absent pairs share a colour or a shape with the image, so that a model must see the pair, not its parts.
    near = [pair for pair in absent if any(pair[0] == item.colour or pair[1] == item.shape for item in items)]
    colour, shape = rng.choice(near if rng.random() < 0.5 else absent)
    return Question("exists", f"Is there a {colour} {shape}?", "no")


def _ask_where(rng: random.Random, items: list[Item], width: int, height: int) -> Question | None:
    if not (candidates := _unique(items, "shape")):
        return None
    item = rng.choice(candidates)
    vertical = "top" if item.y < height / 2 else "bottom"
    horizontal = "left" if item.x < width / 2 else "right"
    return Question("where", f"Where is the {item.shape}?", f"{vertical} {horizontal}")


def _caption(items: list[Item]) -> str:
    names = [f"a {item.colour} {item.shape}" for item in items]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
