"""Training a small vision-language model on scenes: batches, schedule, loop and measure.

A run is seeded, saves its state every few hundred steps and goes on from there when started again. It uses a GPU if torch
sees one.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from calibration.scenes import CAPTION_QUESTION, COLOURS, COUNTS, SHAPES, Scene, Split, draw_scene
from vlmconvert.demo.outliers import add_outlier_channels

__all__ = ["Phase", "Recipe", "build_bpe", "exact_match", "train"]

IGNORE_INDEX = -100
# How much more often a kind of question is kept, where not all are.
_WEIGHTS = {"shape": 3, "exists": 2}
# Colours, shapes and places are learnt from single shapes first, then told apart among several.
_ITEMS = ((800, 1), (1500, 2))
_WARMUP = 200


@dataclass(frozen=True)
class Phase:
    """A stretch of the training.

    Attributes:
        until: the step after its last one.
        batch_size, most_turns: scenes a step, and questions a scene.
        learning_rate, horizon: a cosine that would end `horizon` steps after the phase's start.
    """

    until: int
    batch_size: int
    most_turns: int
    learning_rate: float
    horizon: int


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        build_processor, build_model: make the checkpoint's two sides, untrained.
        phases: one after the other.
        vision_features: what the vision tower makes of pixel values, [images, patches of a square grid, width], where the
            tower is trained alone first; as LLaVA's, which knows what it sees before it meets the language model.
        vision_steps: how long that takes.
    """

    build_processor: Callable[[], Any]
    build_model: Callable[[Any], Any]
    phases: tuple[Phase, ...]
    vision_features: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    vision_steps: int = 0


def build_bpe(size: int, special_tokens: Sequence[str], words: str) -> Tokenizer:
    """A byte-level BPE tokenizer of scenes' texts.

    Args:
        size: of the vocabulary, `special_tokens` included, which take the last places.
        special_tokens: kept whole.
        words: further text to learn from, such as the roles of a chat template.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    # The splitting rule of Llama 3: contractions, words, up to three digits, punctuation, white space.
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join([*COLOURS, *SHAPES, *COUNTS, words])]
    for index in range(2000):
        scene = draw_scene(Split.TRAIN, index)
        corpus += [scene.caption, CAPTION_QUESTION]
        corpus += [text for question in scene.questions for text in (question.text, question.answer)]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    for spare in range(size - tokenizer.get_vocab_size()):
        tokenizer.add_special_tokens([f"<|reserved_special_token_{spare}|>"])
    return tokenizer


def training_batch(processor: Any, scenes: list[Scene], most_turns: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """One conversation a scene, its questions as turns in random order; labels on the answers only.

    Of more questions than `most_turns`, those that take longest to learn are kept more often.
    """
    conversations = []
    for scene in scenes:
        turns = [(rng.random() ** (1 / _WEIGHTS.get(question.kind, 1)), question) for question in scene.questions]
        kept = [question for _, question in sorted(turns, key=lambda turn: -turn[0])[:most_turns]]
        pairs = [(question.text, question.answer) for question in kept]
        if rng.random() < 0.3 and most_turns > len(pairs):
            pairs.append((CAPTION_QUESTION, scene.caption))
        elif rng.random() < 0.1:
            pairs[-1] = (CAPTION_QUESTION, scene.caption)
        rng.shuffle(pairs)
        conversations.append(pairs)
    return conversation_batch(processor, [scene.image for scene in scenes], conversations)


def conversation_batch(
    processor: Any, images: list[Image.Image], conversations: list[list[tuple[str, str]]]
) -> dict[str, torch.Tensor]:
    """Model inputs with `labels` for conversations about one image each."""
    texts = []
    for turns in conversations:
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            image = [{"type": "image"}] if number == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": answer})
        texts.append(processor.apply_chat_template(messages))
    batch = dict(
        processor(
            images=[[image] for image in images],
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
    )
    batch["labels"] = _answer_labels(processor, batch["input_ids"])
    return batch


def _answer_labels(processor: Any, input_ids: torch.Tensor) -> torch.Tensor:
    tokenizer = processor.tokenizer
    question = [{"role": "user", "content": "?"}]
    asked, opened = (
        tokenizer.encode(
            processor.apply_chat_template(question, add_generation_prompt=answer), add_special_tokens=False
        )
        for answer in (False, True)
    )
    same = next(
        (place for place, (one, other) in enumerate(zip(asked, opened, strict=False)) if one != other), len(asked)
    )
    opening = opened[same:]
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, ids in enumerate(input_ids.tolist()):
        position = 0
        while position <= len(ids) - len(opening):
            if ids[position : position + len(opening)] != opening:
                position += 1
                continue
            start = position + len(opening)
            end = ids.index(tokenizer.eos_token_id, start) + 1
            labels[row, start:end] = input_ids[row, start:end]
            position = end
    return labels


@torch.no_grad()
def exact_match(model: Any, processor: Any, count: int, blank: bool = False) -> float:
    """Share of `count` unseen questions, one a test scene, answered exactly by greedy decoding.

    Teacher forcing decides it: an answer is greedy's answer if each of its tokens is the most likely one.
    """
    model.eval()
    correct = 0
    for start in range(0, count, 50):
        scenes = [draw_scene(Split.TEST, index) for index in range(start, min(start + 50, count))]
        images = [Image.new("RGB", scene.image.size, (230, 230, 230)) if blank else scene.image for scene in scenes]
        turns = [[(scene.questions[0].text, scene.questions[0].answer)] for scene in scenes]
        batch = conversation_batch(processor, images, turns)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits[:, :-1].cpu()
        correct += int(((logits.argmax(-1) == labels) | (labels == IGNORE_INDEX)).all(-1).sum())
    model.train()
    return correct / count


def add_outliers(model: Any, processor: Any) -> None:
    """Give the trained language model outlier channels, chosen on scenes of the training split."""
    scenes = [draw_scene(Split.TRAIN, index) for index in range(64)]
    batch = training_batch(processor, scenes, 1, random.Random(0))
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    add_outlier_channels([layer.mlp for layer in model.model.language_model.layers], lambda: model(**inputs))


def train_vision(recipe: Recipe, model: Any, processor: Any, seed: int) -> None:
    """Teach the vision tower to name the shape and the colour of what every patch shows."""
    assert recipe.vision_features is not None
    batch_size, heads = 64, None
    for step in range(recipe.vision_steps):
        scenes = [draw_scene(Split.TRAIN, step * batch_size + number, seed + 1) for number in range(batch_size)]
        pixels = processor.image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
        features = recipe.vision_features(model, pixels.to(model.device))
        if heads is None:
            heads = torch.nn.ModuleList(
                torch.nn.Linear(features.shape[-1], 1 + count) for count in (len(SHAPES), len(COLOURS))
            ).to(model.device)
            parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]
            optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
        labels = torch.stack([patch_labels(scene, round(features.shape[1] ** 0.5)) for scene in scenes])
        loss = sum(
            (
                torch.nn.functional.cross_entropy(head(features).flatten(0, 1), labels[..., part].flatten())
                for part, head in enumerate(heads)
            ),
            start=torch.zeros(()),
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((Phase(recipe.vision_steps, 0, 0, 1.5e-3, recipe.vision_steps),), step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            click.echo(f"vision step {step + 1}/{recipe.vision_steps}  loss {loss.item():.4f}")


def patch_labels(scene: Scene, side: int) -> torch.Tensor:
    """Shape and colour of what each patch of a grid shows, [side * side, 2]; 0 where there is nothing, or the nearest."""
    width, height = scene.image.size
    wide, high = width / side, height / side
    labels = torch.zeros(side, side, 2, dtype=torch.long)
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) * wide, (row + 0.5) * high
            near = [
                item
                for item in scene.items
                if abs(item.x - x) <= max(item.radius, wide / 2) and abs(item.y - y) <= max(item.radius, high / 2)
            ]
            if near:
                item = min(near, key=lambda item, x=x, y=y: (item.x - x) ** 2 + (item.y - y) ** 2)  # type: ignore[misc]
                labels[row, column, 0] = 1 + SHAPES.index(item.shape)
                labels[row, column, 1] = 1 + list(COLOURS).index(item.colour)
    return labels.flatten(0, 1)


def phase_of(phases: tuple[Phase, ...], step: int) -> tuple[Phase, int]:
    """The phase of a step, and the phase's first step."""
    first = 0
    for phase in phases:
        if step < phase.until:
            return phase, first
        first = phase.until
    raise ValueError(f"step {step} is beyond the last phase")


def learning_rate(phases: tuple[Phase, ...], step: int) -> float:
    """Cosine decay in each phase to 2 % of its start, after a warm-up at the very beginning."""
    phase, first = phase_of(phases, min(step, phases[-1].until - 1))
    decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - first) / phase.horizon))
    return phase.learning_rate * decay * min(1.0, (step + 1) / _WARMUP)


def train(recipe: Recipe, work: Path, output: Path, seed: int) -> None:
    """Train, write the Hugging Face folder, and print the accuracy on unseen scenes, with the image and without.

    Args:
        recipe: what is trained.
        work: folder for the state.
        output: folder of the finished checkpoint.
        seed: of weights and scenes.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = recipe.build_processor()
    model = recipe.build_model(processor).train()
    torch.nn.Module.to(model, device)  # transformers narrows the signature of `to`
    decay = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    no_decay = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": no_decay, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    steps = recipe.phases[-1].until
    state_file = work / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        click.echo(f"going on from step {first}")
    elif recipe.vision_features is not None:
        train_vision(recipe, model, processor, seed)
    average = 0.0
    for step in range(first, steps):
        phase, _ = phase_of(recipe.phases, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.phases, step)
        rng = random.Random((seed << 32) + step)
        most_items = next((items for until, items in _ITEMS if step < until), 4)
        scenes = [
            draw_scene(Split.TRAIN, step * phase.batch_size + number, seed, most_items)
            for number in range(phase.batch_size)
        ]
        batch = training_batch(processor, scenes, phase.most_turns, rng)
        # Right padding and labels on answers make an attention mask superfluous.
        batch.pop("attention_mask")
        loss = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            click.echo(f"step {step + 1}/{steps}  loss {average:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, work / "state.tmp")
            os.replace(work / "state.tmp", state_file)
            click.echo(f"step {step + 1}/{steps}  exact match {exact_match(model, processor, 200):.3f}")
    torch.nn.Module.to(model, torch.bfloat16)
    add_outliers(model, processor)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    model = type(model).from_pretrained(output, dtype=torch.float32)
    click.echo(f"exact match on 500 unseen questions: {exact_match(model, processor, 500):.3f}")
    click.echo(f"the same with the image blanked: {exact_match(model, processor, 500, blank=True):.3f}")
