"""What the manifest's schema allows, and no artifact of a target can be."""

import pytest

from manifests.model import ComponentRecord, FileRecord, Manifest, Source
from manifests.run_plan import RunPlan
from vlmconvert.targets import load_target

PLAN = RunPlan(batch=1, input_tokens=1, new_tokens=1, runtimes=[], notes=[])


def manifest(target, file_format, files, plan=None):
    records = [FileRecord(path=name, size=0, sha256="0" * 64) for name in files]
    component = ComponentRecord(
        name="model",
        role="",
        format=file_format,
        precision="fp16",
        files=records,
        inputs=[],
        outputs=[],
        state=[],
        logits=None,
        weights={},
        blocks={},
        passes=[],
        fallbacks=[],
    )
    return Manifest(
        name="demo",
        family="mllama",
        target=target,
        source=Source(model="demo", revision=None, architecture="x", dtype="BF16", files=[]),
        components=[component],
        assets=[],
        calibration=None,
        validation=[],
        environment={},
        run_plan=plan,
    )


@pytest.mark.parametrize(
    ("target", "file_format", "files", "plan", "wrong"),
    [
        ("openvino", "openvino", ["a.xml", "a.bin"], None, []),
        ("onnx", "onnx", ["a.onnx", "a.onnx.data"], None, []),
        ("ascend", "ascend-w8a16", ["a.safetensors", "a.json"], PLAN, []),
        ("openvino", "openvino", ["a.xml"], None, ["one .xml file and one .bin file"]),
        ("openvino", "openvino", ["a.xml", "a.xml"], None, ["one .xml file and one .bin file"]),
        ("onnx", "onnx", ["a.onnx", "a.bin"], None, ["one .onnx file and one .onnx.data file"]),
        (
            "onnx",
            "openvino",
            ["a.xml", "a.bin"],
            None,
            ["the target is onnx, but the format of component model is openvino"],
        ),
        ("openvino", "openvino", ["a.xml", "a.bin"], PLAN, ["it has a run plan"]),
        ("ascend", "ascend-w8a16", ["a.xml", "a.bin"], None, ["does not have weights", "it has no run plan"]),
        (
            "ascend",
            "onnx",
            ["a.onnx", "a.onnx.data"],
            PLAN,
            ["the target is ascend, but the format of component model is onnx"],
        ),
    ],
)
def test_each_contradiction_is_one_sentence(target, file_format, files, plan, wrong):
    found = list(load_target(target).contradictions(manifest(target, file_format, files, plan)))
    assert len(found) == len(wrong), found
    assert all(part in sentence for part, sentence in zip(wrong, found, strict=True)), found
