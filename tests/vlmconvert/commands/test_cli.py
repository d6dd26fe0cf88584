import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibration.scenes import Split, draw_scene
from manifests.io import read_manifest
from tests.conftest import vlmconvert
from vlmconvert.commands import COMMANDS
from vlmconvert.families import FAMILIES

FLOAT = ("--llm", "fp16", "--vision", "fp16", "--no-validate")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from vlmconvert.commands.cli import main\n"
        "try: main(['mllama', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'openvino', 'nncf', 'transformers', 'numpy', 'datasets', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Examples:" in result.stdout


@pytest.mark.parametrize("command", [*FAMILIES.names, *COMMANDS])
def test_every_help_has_an_example_on_a_line_of_its_own(command):
    result = vlmconvert(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\n +vlmconvert {command} ", result.output), result.output


@pytest.mark.slow
def test_without_a_name_the_demo_goes_to_a_folder_named_after_what_it_is(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = vlmconvert("mllama", "--llm", "fp16", "--vision", "fp16", "--store", store, "--no-validate")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mllama-openvino-fp16-fp16"]
    assert read_manifest(tmp_path / "mllama-openvino-fp16-fp16").name == "mllama-openvino-fp16-fp16"


def test_dry_run_stops_after_the_plan(store, tmp_path):
    result = vlmconvert("mllama", "--dry-run", "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 0, result.output
    assert "compress-int4-gptq{group_size=64,symmetric=false,ratio=1.0,all_layers=false}" in result.output
    assert "quantize-int8-ptq{smooth_quant_alpha=0.6}" in result.output
    assert re.search(
        r"expected with \d workers?: up to [\d.]+ GiB of memory and [\d.]+ MB of disk space, about", result.output
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("./nowhere",), "neither a checkpoint folder nor a hub id"),
        (("--group-size", "48"), "use a power of two"),
        (("--ratio", "1.5"), "not a share"),
        (("--smooth-quant-alpha", "2"), "out of range"),
        (("--samples", "-1"), "--samples -1 is too small"),
        (("--samples", "0"), "compress-int4-gptq needs calibration samples, but there are none"),
        (("--llm", "int4-awq", "--samples", "0"), "scale estimation needs calibration samples"),
        (
            ("--samples", "0", "--no-scale-estimation", "--ratio", "0.5"),
            "needs calibration samples, but there are none",
        ),
        (("--calibration", "./nowhere"), "is neither a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(options, message, store, tmp_path):
    result = vlmconvert("mllama", *options, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_work(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 1000))
    result = vlmconvert("mllama", *FLOAT, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert result.exit_code == 2
    assert re.search(
        r"has 1 kB free, and the conversion needs about [\d.]+ MB: free some space, or choose another", result.output
    )


def test_the_folder_is_complete_and_described(build):
    folder = build("--llm", "fp16", "--vision", "fp16")
    manifest = read_manifest(folder)
    recorded = {record.path: record for component in manifest.components for record in component.files}
    recorded |= {record.path: record for record in manifest.assets}
    expected = {"manifest.json", "manifest.json.sha256", "README.md", "run.json", *recorded}
    assert {path.name for path in folder.iterdir()} == expected
    assert {
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "processor_config.json",
    } <= set(recorded)
    from manifests.files import file_record

    for record in recorded.values():
        assert file_record(folder / record.path, folder) == record
    language = manifest.components[1]
    assert [port.name for port in language.inputs][:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "cross_attention_mask",
        "full_text_row_masked_out_mask",
    ]
    assert len(language.state) == 8
    assert language.logits == "last"
    vision = manifest.components[0]
    assert [port.name for port in vision.outputs][:3] == [
        "cross_attention_states",
        "cross_attn_key_values.1.key",
        "cross_attn_key_values.1.value",
    ]
    card = (folder / "README.md").read_text()
    assert "base_model: mllama" in card
    assert "vlmconvert run" in card


@pytest.mark.slow
def test_a_different_result_is_not_overwritten_without_force(store, tmp_path):
    output = tmp_path / "out"
    first = vlmconvert("mllama", *FLOAT, "-o", output, "--store", store)
    assert first.exit_code == 0, first.output
    before = snapshot(output)
    other = ("--llm", "int8", "--vision", "fp16", "--no-validate")
    refused = vlmconvert("mllama", *other, "-o", output, "--store", store)
    assert refused.exit_code == 2
    assert "holds a different result" in refused.output
    assert snapshot(output) == before
    again = vlmconvert("mllama", *FLOAT, "-o", output, "--store", store)
    assert again.exit_code == 0, again.output
    assert {**snapshot(output), "run.json": b""} == {**before, "run.json": b""}
    forced = vlmconvert("mllama", *other, "-o", output, "--store", store, "--force")
    assert forced.exit_code == 0, forced.output
    assert read_manifest(output).components[1].precision == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_not_replaced_by_a_folder(store, tmp_path):
    (tmp_path / "out").write_text("mine")
    for options in ((), ("--force",)):
        result = vlmconvert("mllama", *FLOAT, *options, "-o", tmp_path / "out", "--store", store)
        assert result.exit_code == 2
        assert "exists and is a file" in result.output
    assert (tmp_path / "out").read_text() == "mine"


def test_a_foreign_folder_is_not_overwritten(store, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    result = vlmconvert("mllama", *FLOAT, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    assert "vlmconvert did not write it" in result.output
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_failed_run_leaves_what_was_there(store, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert vlmconvert("mllama", *FLOAT, "-o", output, "--store", store).exit_code == 0
    before = snapshot(output)
    import vlmconvert.conversion.convert as convert

    def broken(*_arguments: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(convert, "_write_model_card", broken)
    result = vlmconvert(
        "mllama", "--llm", "int8", "--vision", "fp16", "--no-validate", "-o", output, "--store", store, "--force"
    )
    assert result.exit_code == 3
    assert "the disk is on fire" in result.output
    assert snapshot(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_debug_shows_the_traceback(store, tmp_path):
    result = vlmconvert("--debug", "mllama", "./nowhere", "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    assert "Traceback" in result.output


CALIBRATED = (
    *("mllama", "--llm", "int4-awq", "--calibration", "scenes", "--samples", "2", "--no-validate"),
    "--vision",
)


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory):
    """An artifact that a process of its own made from an empty store."""
    folder = tmp_path_factory.mktemp("in-one-go")
    command = [sys.executable, "-m", "vlmconvert", *CALIBRATED, "int8-ptq", "--vision-samples", "4", "--workers", "1"]
    subprocess.run([*command, "--store", folder / "store", "-o", folder / "out"], check=True, capture_output=True)
    return folder / "out"


@pytest.mark.slow
def test_equal_runs_give_equal_bytes_whatever_the_workers(in_one_go, tmp_path, own_helpers):
    options = ("int8-ptq", "--vision-samples", "4", "--workers", "2", "--store", tmp_path / "store")
    result = vlmconvert(*CALIBRATED, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    one, two = (
        {name: data for name, data in snapshot(folder).items() if name != "run.json"}
        for folder in (in_one_go, tmp_path / "out")
    )
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(in_one_go, tmp_path):
    store, output = tmp_path / "store", tmp_path / "out"
    command = [sys.executable, "-m", "vlmconvert", *CALIBRATED, "fp16", "--workers", "1"]
    command += ["--store", str(store), "-o", str(output)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(store.glob("*/[!.]*/block.xml"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    kept = {path.parent.name for path in store.glob("*/[!.]*/block.xml")}
    assert len(kept) >= 4
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    steps = next(
        int(line.split(": ")[2].split()[0])
        for line in result.stderr.splitlines()
        if "int4-awq" in line and "steps" in line
    )
    assert steps == 11 - len(kept)
    for name in ("openvino_language_model.bin", "openvino_language_model.xml"):
        assert (output / name).read_bytes() == (in_one_go / name).read_bytes()


@pytest.mark.exhaustive
def test_changing_the_vision_encoder_leaves_the_language_model_alone(store, tmp_path):
    options = ("--llm", "int4-awq", "--samples", "4", "--vision-samples", "8", "--no-validate", "--store", store)
    for vision in ("fp16", "int8-ptq"):
        result = vlmconvert("mllama", *options, "--vision", vision, "-o", tmp_path / vision)
        assert result.exit_code == 0, result.output
    assert "language model: found in the store" in result.output
    one, two = (read_manifest(tmp_path / vision).components[1] for vision in ("fp16", "int8-ptq"))
    assert one == two


@pytest.mark.slow
def test_a_damaged_store_is_noticed_and_made_again(tmp_path):
    store = tmp_path / "store"
    first = vlmconvert("mllama", *FLOAT, "-o", tmp_path / "first", "--store", store)
    assert first.exit_code == 0, first.output
    expected = (tmp_path / "first" / "openvino_language_model.bin").read_bytes()
    stored = next(store.glob("*/*/openvino_language_model.bin"))
    stored.unlink()
    stored.write_bytes(expected[:-1] + b"?")
    again = vlmconvert("mllama", *FLOAT, "-o", tmp_path / "again", "--store", store)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "openvino_language_model.bin").read_bytes() == expected


@pytest.mark.slow
def test_validating_later_completes_the_manifest(store, tmp_path):
    output = tmp_path / "out"
    assert vlmconvert("mllama", *FLOAT, "-o", output, "--store", store).exit_code == 0
    assert read_manifest(output).validation == []
    later = vlmconvert("mllama", *FLOAT[:-1], "--validation-samples", "25", "-o", output, "--store", store)
    assert later.exit_code == 0, later.output
    assert len(read_manifest(output).validation) == 10
    assert vlmconvert("verify", output).exit_code == 0


@pytest.mark.slow
def test_a_broken_limit_is_exit_1_and_in_the_manifest(store, tmp_path):
    output = tmp_path / "out"
    options = ("--llm", "int4", "--vision", "fp16", "--validation-samples", "2", "--max-kl", "1e-12")
    result = vlmconvert("mllama", *options, "-o", output, "--store", store)
    assert result.exit_code == 1, result.output
    assert "check failed: kl of the artifact" in result.output
    figures = read_manifest(output).validation
    assert [item.passed for item in figures if item.metric == "kl" and item.component == "artifact"] == [False]


def test_run_prints_the_answer(build, tmp_path):
    folder = build("--llm", "fp16", "--vision", "fp16")
    scene = draw_scene(Split.TEST, 0)
    scene.image.save(tmp_path / "scene.png")
    question = next(item for item in scene.questions if item.kind == "count")
    result = vlmconvert("run", folder, "--image", tmp_path / "scene.png", "--prompt", question.text)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == question.answer
    assert re.search(r"vision encoder [\d.]+ ms, first token [\d.]+ ms, .*tokens/s", result.stderr)
    assert vlmconvert("run", folder, "--prompt", question.text).exit_code == 0


def test_run_reads_a_prompt_and_turns_from_standard_input(build, tmp_path):
    folder = build("--llm", "fp32", "--vision", "fp32")
    scene = draw_scene(Split.TEST, 0)
    scene.image.save(tmp_path / "scene.png")
    first, second = scene.questions[:2]
    piped = vlmconvert("run", folder, "--image", tmp_path / "scene.png", "--prompt", "-", input=first.text + "\n")
    assert piped.stdout.strip() == first.answer
    turns = vlmconvert(
        "run", folder, "--image", tmp_path / "scene.png", "--chat", input=f"{first.text}\n{second.text}\n\nnot asked\n"
    )
    assert turns.stdout.split("\n")[:2] == [first.answer, second.answer]
    timings = turns.stderr.strip().splitlines()[-2:]
    assert not timings[0].startswith("vision encoder 0.0 ms")
    assert timings[1].startswith("vision encoder 0.0 ms"), "the image was encoded twice"


def test_run_refuses_what_it_cannot_read(build, tmp_path):
    missing = vlmconvert("run", tmp_path, "--prompt", "x")
    assert missing.exit_code == 2
    assert "holds no manifest.json" in missing.output
    (tmp_path / "x.png").write_text("no image")
    folder = build("--llm", "fp32", "--vision", "fp32")
    broken = vlmconvert("run", folder, "--image", tmp_path / "x.png", "--prompt", "x")
    assert broken.exit_code == 2
    assert "cannot be read" in broken.output
    assert vlmconvert("run", folder).exit_code == 2
    unknown = vlmconvert("run", folder, "--prompt", "x", "--device", "TPU")
    assert unknown.exit_code == 2
    assert "for TPU" in unknown.output
    assert vlmconvert("run", folder, "--prompt", "x", "--ov-config", "THREADS").exit_code == 2
