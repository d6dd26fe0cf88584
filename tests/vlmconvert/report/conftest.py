"""Artifacts with every record that a report reads, written by hand: no model runs in these tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.scenes import Split, draw_scene
from manifests.bench import Bench, BenchRow, Spread, write_bench
from manifests.evaluation import (
    EVALUATION_FOLDER,
    BlockError,
    DataRecord,
    Evaluation,
    Figure,
    Prediction,
    write_evaluation,
)
from manifests.io import manifest_digest, read_manifest, write_manifest
from manifests.model import Calibration, ComponentRecord, FileRecord, Manifest, Port, Source, Validation

SAMPLES = 40
CHECKPOINT_WRONG = 2  # the last ones
WEIGHTS = {
    "fp16": {"f16": 1_639_424},
    "int8": {"f16": 4864, "int8": 1_634_560},
    "int8-ptq": {"f32": 4864, "int8": 1_260_544},
    "int4": {"int4": 1_507_328, "int8": 132_096},
    "int4-awq": {"int4": 1_507_328, "int8": 132_096},
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest(llm: str, vision: str, sizes: tuple[int, int], score: float) -> Manifest:
    def component(name: str, precision: str, size: int, weights: dict[str, int], *passes: str) -> ComponentRecord:
        return ComponentRecord(
            name=name,
            role=name.replace("_", " "),
            format="openvino",
            precision=precision,
            files=[
                FileRecord(path=f"openvino_{name}.bin", size=size - 400_000, sha256=sha(name + precision)),
                FileRecord(path=f"openvino_{name}.xml", size=400_000, sha256=sha(precision)),
            ],
            inputs=[Port(name="pixel_values", dtype="f32", shape=["batch", "num_images", 4, 3, 56, 56])],
            outputs=[Port(name="logits", dtype="f32", shape=["batch", 1, 512])],
            state=["past_key_values.0.keypresent.0.key"],
            logits="last" if name == "language_model" else None,
            weights=weights,
            blocks={"layers.0": "0123abcd"},
            passes=["split", "export-openvino{dtype=f32}", *passes],
            fallbacks=["vision_encoder: 3 layers in 8 bit, no group size divides 40"] if precision == "int4" else [],
        )

    return Manifest(
        name=f"mllama-openvino-{llm}-{vision}",
        family="mllama",
        target="openvino",
        source=Source(
            model="mllama",
            revision=None,
            architecture="MllamaForConditionalGeneration",
            dtype="BF16",
            files=[FileRecord(path="model.safetensors", size=5_845_174, sha256=sha("weights"))],
        ),
        components=[
            component("vision_encoder", vision, sizes[0], WEIGHTS[vision], "stitch"),
            component(
                "language_model",
                llm,
                sizes[1],
                WEIGHTS[llm],
                "compress-int4-awq{group_size=64,symmetric=false,ratio=1.0,all_layers=false,scale_estimation=true,data_free=false}",
                "stitch",
                "make-stateful",
                "slice-lm-head",
            ),
        ],
        assets=[FileRecord(path="config.json", size=2900, sha256=sha("config"))],
        calibration=Calibration(source="scenes", revision=None, samples=100, digest=sha("samples"), seed=0),
        validation=[
            Validation(
                metric="kl",
                component="artifact",
                reference=None,
                value=0.00034,
                threshold=1.0,
                passed=True,
                samples=50,
            ),
            Validation(
                metric="exact_match",
                component="artifact",
                reference=0.985,
                value=score,
                threshold=0.975,
                passed=score >= 0.975,
                samples=200,
            ),
        ],
        environment={"nncf": "3.4.0", "openvino": "2026.4.1"},
    )


def prediction(index: int, wrong: int) -> Prediction:
    scene = draw_scene(Split.TEST, index)
    question = scene.questions[0]
    right = question.answer
    answer = "a rather different answer" if index < wrong else right
    checkpoint = right if index < SAMPLES - CHECKPOINT_WRONG else "nothing like it"
    return Prediction(
        id=f"{index}",
        image=scene.id,
        prompt=question.text,
        references=[right],
        answer=answer,
        checkpoint_answer=checkpoint,
        scores={"exact_match": float(answer == right), "kl": 0.001},
        checkpoint_scores={"exact_match": float(checkpoint == right)},
    )


def evaluation(name: str, made: Manifest, wrong: int, scale: float) -> Evaluation:
    blocks = [
        BlockError(component=component, block=block, cosine=1 - error / 50, relative_error=error)
        for component, count in (("vision_encoder", 6), ("language_model", 8))
        for index in range(count)
        for block, error in [(f"layers.{index}", scale * (1 + (index * 7) % 5) / 100)]
    ]
    return Evaluation(
        artifact=name,
        manifest_sha256=manifest_digest(made),
        data=DataRecord(source="scenes", revision=None, seed=0, samples=SAMPLES, digest=sha("test")),
        figures=[
            Figure(
                metric="exact_match",
                value=1 - wrong / SAMPLES,
                reference=1 - CHECKPOINT_WRONG / SAMPLES,
                samples=SAMPLES,
            ),
            Figure(metric="kl", value=0.0004 * scale, reference=None, samples=SAMPLES),
            Figure(metric="token_agreement", value=1 - 0.01 * scale, reference=None, samples=SAMPLES),
        ],
        blocks=blocks,
        environment={"openvino": "2026.4.1"},
    )


def bench(name: str, factor: float) -> Bench:
    def spread(value: float) -> Spread:
        return Spread(median=value, low=value * 0.94, high=value * 1.11)

    def row(label: str, batch: int, images: int, factor: float) -> BenchRow:
        return BenchRow(
            label=label,
            batch=batch,
            images=images,
            new_tokens=64,
            vision_ms=spread(11.0 * factor * images),
            first_token_ms=spread(24.0 * factor + 11 * images),
            per_token_ms=spread(2.4 * factor),
            tokens_per_s=spread(batch * 1000 / (2.4 * factor)),
        )

    def rows(label: str, factor: float) -> list[BenchRow]:
        return [row(label, 1, 1, factor), row(label, 8, 0, factor * 1.6)]

    return Bench(
        artifact=name,
        device="CPU",
        load_s=0.42,
        compile_s=1.31,
        peak_rss=412_000_000,
        rows=rows(name, factor),
        baseline_label="mllama in PyTorch",
        baseline_rows=rows("mllama in PyTorch", 3.1),
        environment={"openvino": "2026.4.1", "processor": "AMD EPYC"},
    )


@pytest.fixture(scope="session")
def write_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write an artifact's records; `alter` changes its predictions."""

    def write(
        name: str,
        llm: str,
        vision: str,
        sizes: tuple[int, int],
        wrong: int | None,
        scale: float = 1.0,
        alter: Callable[[Prediction], Prediction] = lambda item: item,
    ) -> Path:
        folder = tmp_path_factory.mktemp("report") / name
        (folder / EVALUATION_FOLDER).mkdir(parents=True)
        write_manifest(manifest(llm, vision, sizes, 0.985 - 0.01 * scale), folder)
        made = read_manifest(folder)
        if wrong is None:
            (folder / EVALUATION_FOLDER).rmdir()
            return folder
        predictions = [alter(prediction(index, wrong)) for index in range(SAMPLES)]
        write_evaluation(evaluation(name, made, wrong, scale), predictions, folder / EVALUATION_FOLDER)
        write_bench(bench(name, 0.7 + 0.1 * scale), folder)
        return folder

    return write


@pytest.fixture(scope="session")
def artifacts(write_artifact: Callable[..., Path]) -> list[Path]:
    """Five variants of one checkpoint; the last was only converted, never evaluated."""
    return [
        write_artifact("mllama-fp16", "fp16", "fp16", (2_990_000, 3_900_000), 2, 0.01),
        write_artifact("mllama-int8", "int8", "int8", (1_830_000, 2_300_000), 2, 0.2),
        write_artifact("mllama-int4-awq", "int4-awq", "int8-ptq", (1_830_000, 1_740_000), 3, 0.8),
        write_artifact("mllama-int4", "int4", "int8-ptq", (1_830_000, 1_760_000), 6, 2.0),
        write_artifact("mllama-int8-fp16", "int8", "fp16", (2_990_000, 2_300_000), None, 0.1),
    ]
