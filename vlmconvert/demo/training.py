"""Training of a small vision-language model on scenes: batches, learning rate, training loop and accuracy.

A run is seeded, saves its state every 250 steps, and continues from the saved state when it is started again. It uses a
GPU if torch finds one.
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
# Kind of question -> how much more often it is kept, if a scene has more questions than a conversation.
_WEIGHTS = {"shape": 3, "exists": 2}
# (step, maximum number of shapes in a scene until that step): the model first learns from single shapes.
_ITEMS = ((800, 1), (1500, 2))
_WARMUP = 200


@dataclass(frozen=True)
class Phase:
    """A phase of the training.

    Attributes:
        until: the step after the last step of the phase.
        batch_size: number of scenes in each step.
        most_turns: maximum number of questions about each scene.
        learning_rate: learning rate at the start of the phase.
        horizon: number of steps after which the cosine decay of the learning rate would end.
    """

    until: int
    batch_size: int
    most_turns: int
    learning_rate: float
    horizon: int


@dataclass(frozen=True)
class Recipe:
    """The model to train, and how it is trained.

    Attributes:
        build_processor: makes the processor.
        build_model: makes the untrained model for a processor.
        phases: phases of the training, one after the other.
        vision_features: computes the features [images, patches of a square grid, width] of pixel values, if the vision
            tower is first trained alone, as LLaVA's is; None trains it only with the language model.
        vision_steps: number of steps in which the vision tower is trained alone.
    """

    build_processor: Callable[[], Any]
    build_model: Callable[[Any], Any]
    phases: tuple[Phase, ...]
    vision_features: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    vision_steps: int = 0


def build_bpe(size: int, special_tokens: Sequence[str], words: str) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the texts of scenes.

    Args:
        size: size of the vocabulary, which ends with the `special_tokens`.
        special_tokens: tokens that are never split.
        words: further text to train on, such as the roles of a chat template.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    # Llama 3's rule for splitting text: contractions, words, up to three digits, punctuation, white space.
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
    """Make a batch with one conversation about each scene, whose turns are the scene's questions in random order.

    If a scene has more questions than `most_turns`, the kinds that take longest to learn are kept more often.

    Returns:
        Inputs of the model, and `labels` for the tokens of the answers.
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
    """Inputs of the model with `labels`, for conversations about one image each."""
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
    """Share of unseen questions that the model answers exactly with greedy decoding.

    Teacher forcing finds it in one pass: greedy decoding gives the correct answer if each of its tokens is the most
    likely one.

    Args:
        model: the model.
        processor: its processor.
        count: number of questions, one about each test scene.
        blank: whether the images are replaced by grey ones.
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
    """Give the trained language model outlier channels; scenes of the training split decide which."""
    scenes = [draw_scene(Split.TRAIN, index) for index in range(64)]
    batch = training_batch(processor, scenes, 1, random.Random(0))
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    add_outlier_channels([layer.mlp for layer in model.model.language_model.layers], lambda: model(**inputs))


def train_vision(recipe: Recipe, model: Any, processor: Any, seed: int) -> None:
    """Train the vision tower alone to classify the shape and the colour in every patch."""
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
    """Classes of the shape and the colour in each patch of a grid.

    Args:
        scene: the scene.
        side: number of patches in each row and column.

    Returns:
        [side * side, 2]: classes of the nearest shape in each patch and of its colour, 0 without a shape.
    """
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
    """The phase that a step belongs to, and the first step of that phase."""
    first = 0
    for phase in phases:
        if step < phase.until:
            return phase, first
        first = phase.until
    raise ValueError(f"step {step} is beyond the last phase")


def learning_rate(phases: tuple[Phase, ...], step: int) -> float:
    """Learning rate of a step: cosine decay to 2 % in each phase, and a warm-up at the start of the training."""
    phase, first = phase_of(phases, min(step, phases[-1].until - 1))
    decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - first) / phase.horizon))
    return phase.learning_rate * decay * min(1.0, (step + 1) / _WARMUP)


def train(recipe: Recipe, work: Path, output: Path, seed: int) -> None:
    """Train a model, save it as a Hugging Face folder, and print its accuracy with and without images.

    Args:
        recipe: the model to train, and how it is trained.
        work: folder for the state of an unfinished run.
        output: folder of the finished checkpoint.
        seed: seed of the initial weights and of the scenes.
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
        click.echo(f"continuing from step {first}")
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
        # No attention mask is needed: the padding is on the right, and only answers have labels.
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
    click.echo(f"exact match with grey images: {exact_match(model, processor, 500, blank=True):.3f}")
