"""A signed artifact that was changed in any way is refused; another program reads the signature, too."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import vlmconvert as api
from manifests.beside import MODEL_CARD_NAME, RUN_LOG_NAME, SIGNATURE_NAME
from manifests.errors import BadInputError, CheckFailedError
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, read_manifest, write_manifest
from manifests.signing import sign, verify_signature
from tests.conftest import vlmconvert
from tests.garbage import copy, flip_bit, rehash

FP16 = ("--llm", "fp16", "--vision", "fp16")


def write_key(folder: Path, name: str, key, password: bytes | None = None) -> tuple[Path, Path]:
    """Write both halves of a key as PEM files."""
    folder.mkdir(exist_ok=True)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    private.write_bytes(key.private_bytes(*form))
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(key.public_key().public_bytes(*form))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_key(tmp_path_factory.mktemp("keys"), "own", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def signed(build, keys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed") / "artifact"
    shutil.copytree(build(*FP16), folder)
    assert sign(folder, keys[0]) == folder / SIGNATURE_NAME
    return folder


@pytest.fixture
def artifact(signed, tmp_path):
    return copy(signed, tmp_path / "artifact")


def failures(folder, public_key):
    return [check for check in api.verify(folder, run=False, public_key=public_key) if check.outcome == "failed"]


def test_a_signed_artifact_is_intact_under_any_name(artifact, keys):
    checks = api.verify(artifact, run=False, public_key=keys[1])
    assert checks[0].check == "signature"
    assert {check.outcome for check in checks} == {"passed", "skipped"}
    assert api.verify(artifact, run=False) == checks[1:]


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_other_curves(artifact, tmp_path, curve):
    private, public = write_key(tmp_path / "keys", "other", ec.generate_private_key(curve))
    sign(artifact, private)
    assert [check.outcome for check in verify_signature(artifact, public)] == ["passed"]


def test_the_program_of_the_library_reads_the_signature(signed, keys):
    tool = Path(sys.executable).with_name("model_signing")
    command = [tool, "verify", "key", signed, "--signature", signed / SIGNATURE_NAME, "--public_key", keys[1]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def change_weights(folder: Path) -> None:
    flip_bit(folder / "openvino_language_model.bin", 0.5)


def change_weights_and_manifest(folder: Path) -> None:
    change_weights(folder)
    rehash(folder)


def change_manifest_with_its_checksum(folder: Path) -> None:
    write_manifest(read_manifest(folder).model_copy(update={"validation": []}), folder)
    write_manifest(read_manifest(folder).model_copy(update={"name": "another"}), folder)


def add_to_manifest(folder: Path) -> None:
    """A file that is added, and listed as if it had always been there."""
    (folder / "added_tokens.json").write_text("{}")
    manifest = read_manifest(folder)
    empty = manifest.assets[0].model_copy(
        update={
            "path": "added_tokens.json",
            "size": 2,
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        }
    )
    write_manifest(manifest.model_copy(update={"assets": [*manifest.assets, empty]}), folder)


def remove_from_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / manifest.assets[-1].path).unlink()
    write_manifest(manifest.model_copy(update={"assets": manifest.assets[:-1]}), folder)


def change_model_card(folder: Path) -> None:
    """No runtime reads the model card, so that the manifest does not hold its hash."""
    (folder / MODEL_CARD_NAME).write_text("pip install malware")


def change_run_log(folder: Path) -> None:
    (folder / RUN_LOG_NAME).write_text("{}")


def add_results(folder: Path) -> None:
    (folder / "report.html").write_text("<script>alert(1)</script>")


def add_hidden(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")


def add_link(folder: Path) -> None:
    (folder / ".more").symlink_to(folder.parent)


def link_to_weights(folder: Path) -> None:
    path = folder / "openvino_language_model.bin"
    path.rename(folder.parent / "weights.bin")
    path.symlink_to(folder.parent / "weights.bin")


def change_signature(folder: Path) -> None:
    """The signed statement names another hash for a file."""
    path = folder / SIGNATURE_NAME
    bundle = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"].pop()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(bundle))


def empty_signature(folder: Path) -> None:
    (folder / SIGNATURE_NAME).write_text("")


def json_signature(folder: Path) -> None:
    (folder / SIGNATURE_NAME).write_text("{}")


def signature_without_key(folder: Path) -> None:
    bundle = json.loads((folder / SIGNATURE_NAME).read_text())
    bundle["verificationMaterial"] = {"tlogEntries": []}
    (folder / SIGNATURE_NAME).write_text(json.dumps(bundle))


@pytest.mark.parametrize(
    "tamper",
    [
        change_weights,
        change_weights_and_manifest,
        change_manifest_with_its_checksum,
        add_to_manifest,
        remove_from_manifest,
        change_model_card,
        change_run_log,
        add_results,
        add_hidden,
        add_link,
        link_to_weights,
        change_signature,
        empty_signature,
        json_signature,
        signature_without_key,
    ],
)
def test_tampering_is_found_and_the_graphs_are_not_opened(artifact, keys, tamper):
    tamper(artifact)
    checks = api.verify(artifact, public_key=keys[1])
    found = [check for check in checks if check.check == "signature"]
    assert found
    assert {check.outcome for check in found} == {"failed"}
    assert all(check.detail for check in found)
    assert [check.place for check in checks if check.check == "graph"] == ["."]
    assert "run" not in {check.check for check in checks}


def test_what_git_and_the_hub_add_is_no_tampering(artifact, keys):
    (artifact / ".gitattributes").write_text("*.bin filter=lfs")
    (artifact / ".cache" / "huggingface").mkdir(parents=True)
    (artifact / ".cache" / "huggingface" / "config.json.metadata").write_text("")
    assert failures(artifact, keys[1]) == []


def test_the_signature_of_another_artifact(artifact, keys, tmp_path):
    other = copy(artifact, tmp_path / "other")
    change_manifest_with_its_checksum(other)
    shutil.copy(sign(other, keys[0]), artifact)
    (found,) = failures(artifact, keys[1])
    assert found.detail == f"Hash mismatch for '{MANIFEST_NAME}'; Hash mismatch for '{CHECKSUM_NAME}'"


def test_another_key(signed, tmp_path):
    _, public = write_key(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    (found,) = failures(signed, public)
    assert "Key mismatch" in found.detail


def test_another_key_that_claims_to_be_the_right_one(artifact, keys, tmp_path, capsys):
    """The hint at the key is not signed: neither a wrong one nor a missing one makes another key's signature valid."""
    hint = json.loads((artifact / SIGNATURE_NAME).read_text())["verificationMaterial"]["publicKey"]["hint"]
    sign(artifact, write_key(tmp_path / "keys", "other", ec.generate_private_key(ec.SECP256R1()))[0])
    bundle = json.loads((artifact / SIGNATURE_NAME).read_text())
    for claimed in ({"hint": hint}, {}):
        bundle["verificationMaterial"]["publicKey"] = claimed
        (artifact / SIGNATURE_NAME).write_text(json.dumps(bundle))
        (found,) = failures(artifact, keys[1])
        assert "is not the key that signed it" in found.detail
    assert capsys.readouterr().out == ""


def test_a_signer_that_left_files_out(artifact, keys):
    """A valid signature over a part of the files, as the library can make it, covers no artifact."""
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=keys[0])
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[MANIFEST_NAME, CHECKSUM_NAME, SIGNATURE_NAME]))
    config.sign(artifact, artifact / SIGNATURE_NAME)
    found = failures(artifact, keys[1])
    assert [(check.place, check.detail) for check in found] == [
        (MANIFEST_NAME, "not signed"),
        (CHECKSUM_NAME, "not signed"),
    ]


def test_the_command_line(artifact, keys):
    result = vlmconvert("verify", artifact, "--no-run", "--public-key", keys[1], "--json", "-")
    assert (result.exit_code, json.loads(result.stdout)["passed"]) == (0, True)
    change_model_card(artifact)
    result = vlmconvert("verify", artifact, "--no-run", "--public-key", keys[1])
    assert result.exit_code == 1
    assert "Hash mismatch for 'README.md'" in " ".join(result.output.split())
    result = vlmconvert("sign", artifact, "--private-key", keys[0])
    assert (result.exit_code, result.stdout.strip()) == (0, str(artifact / SIGNATURE_NAME))
    assert failures(artifact, keys[1]) == []
    (artifact / SIGNATURE_NAME).unlink()
    result = vlmconvert("verify", artifact, "--no-run", "--public-key", keys[1])
    assert result.exit_code == 2
    assert f"holds no signature {SIGNATURE_NAME}: sign it with vlmconvert sign" in result.output


def bad_keys(folder: Path) -> dict[str, Path]:
    (folder / "garbage").write_text("not a key")
    curve = ec.SECP256K1()
    return {
        "missing": folder / "nowhere",
        "folder": folder,
        "garbage": folder / "garbage",
        "password": write_key(folder, "password", ec.generate_private_key(ec.SECP256R1()), b"secret")[0],
        "rsa": write_key(folder, "rsa", rsa.generate_private_key(65537, 2048))[0],
        "curve": write_key(folder, "curve", ec.generate_private_key(curve))[0],
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "garbage", "password", "rsa", "curve"])
def test_keys_that_cannot_be_used(signed, tmp_path, kind):
    private = bad_keys(tmp_path)[kind]
    public = private.with_suffix(".pub") if private.suffix == ".pem" and kind != "password" else private
    for command in (("sign", signed, "--private-key", private), ("verify", signed, "--public-key", public)):
        result = vlmconvert(*command)
        assert result.exit_code == 2, result.output
        assert "give the PEM file of an elliptic-curve key" in result.output


def test_a_private_key_in_the_artifact(artifact, keys):
    shutil.copy(keys[0], artifact / "LICENSE.pem")
    with pytest.raises(BadInputError, match="lies in the artifact: keep it in another folder"):
        sign(artifact, artifact / "LICENSE.pem")


@pytest.mark.parametrize("tamper", [change_weights, link_to_weights, add_link])
def test_what_is_not_intact_is_not_signed(artifact, keys, tamper):
    (artifact / SIGNATURE_NAME).unlink()
    tamper(artifact)
    with pytest.raises(CheckFailedError, match=r"is not intact \(.+\) and was not signed"):
        sign(artifact, keys[0])
    assert not (artifact / SIGNATURE_NAME).exists()


def test_a_folder_without_a_manifest(tmp_path, keys):
    for command in (("sign", tmp_path, "--private-key", keys[0]), ("verify", tmp_path, "--public-key", keys[1])):
        assert vlmconvert(*command).exit_code == 2


@pytest.mark.parametrize("missing", ["model_signing", "OpenSSL"])
def test_a_missing_extra_is_named(signed, keys, missing, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    for command in (("sign", signed, "--private-key", keys[0]), ("verify", signed, "--public-key", keys[1])):
        result = vlmconvert(*command)
        assert result.exit_code == 2
        assert f'signatures need {missing}: pip install "vlmconvert[sign]"' in result.output
