"""Signing an artifact with an elliptic-curve key, and verifying its signature; both work without a network.

A signature is a file of the library `model-signing`: a Sigstore bundle over the SHA-256 of every file in the folder. So other
programs that read such signatures can verify it, too.
"""

from __future__ import annotations

import ast
import base64
import json
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from manifests.beside import SIGNATURE_NAME, entries
from manifests.errors import BadInputError, CheckFailedError
from manifests.files import write_atomically
from manifests.verify import Finding, failed, passed, verify_files, verify_manifest

if TYPE_CHECKING:
    from model_signing import hashing, signing, verifying

__all__ = ["sign", "verify_signature"]

# What git and the hub's client put beside the files of a model; model-signing leaves the first four out by itself.
_UNSIGNED = (".git", ".github", ".gitattributes", ".gitignore", ".cache/huggingface", SIGNATURE_NAME)
_MISMATCH = "Signature mismatch: "


def sign(folder: Path, private_key: Path) -> Path:
    """Sign all files of an intact artifact; an older signature is replaced.

    Args:
        folder: the artifact.
        private_key: PEM file of an elliptic-curve key (P-256, P-384 or P-521) without a password.

    Returns:
        The file of the signature, in the artifact.

    Raises:
        BadInputError: if the folder is not an artifact, the key cannot be used, or `model-signing` is not installed.
        CheckFailedError: if the artifact is not intact.
    """
    signer = _signer(private_key)
    manifest, checks = verify_manifest(folder)
    if private_key.resolve().is_relative_to(folder.resolve()):
        raise BadInputError(f"the private key {private_key} lies in the artifact: keep it in another folder")
    checks += [failed("signature", link.as_posix(), "a symbolic link") for link in _links(folder)]
    if manifest is not None:
        checks += verify_files(folder, manifest)
    if wrong := next((check for check in checks if check.outcome == "failed"), None):
        raise CheckFailedError(
            f"{folder} is not intact ({wrong.place}: {wrong.detail}) and was not signed: see vlmconvert verify {folder}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary, SIGNATURE_NAME)
        signer.set_hashing_config(_hashing()).sign(folder, written)
        write_atomically(folder / SIGNATURE_NAME, written.read_text(encoding="utf-8"))
    return folder / SIGNATURE_NAME


def verify_signature(folder: Path, public_key: Path) -> Iterator[Finding]:
    """Check that the signature was made with a key, and that the folder holds exactly the files that were signed.

    Args:
        folder: the artifact.
        public_key: PEM file of the public key.

    Raises:
        BadInputError: if there is no signature, the key cannot be used, or `model-signing` is not installed.
    """
    verifier = _verifier(public_key)
    path = folder / SIGNATURE_NAME
    if not path.is_file():
        raise BadInputError(
            f"{folder} holds no signature {SIGNATURE_NAME}: sign it with vlmconvert sign, or leave out --public-key"
        )
    if links := [
        failed("signature", link.as_posix(), "a symbolic link, which no signature covers") for link in _links(folder)
    ]:
        yield from links
        return
    try:
        with redirect_stdout(StringIO()):  # the library prints a warning about signatures of its first versions
            verifier.set_hashing_config(_hashing()).verify(folder, path)
        unsigned = sorted(set(_covered(folder)) - set(_signed(path)))
    except Exception as error:  # whatever is in the file, it is no valid signature of this folder
        reason = _reason(error) or f"{public_key} is not the key that signed it, or it was changed"
        yield failed("signature", SIGNATURE_NAME, reason)
        return
    # A signer may have left files out; the key is trusted for what it has signed alone.
    yield from [failed("signature", name, "not signed") for name in unsigned] or [
        passed("signature", SIGNATURE_NAME, f"all files are as the owner of {public_key.name} signed them")
    ]


def _reason(error: Exception) -> str:
    """The message of an error of the library; of a list of differences it keeps the files, without their digests."""
    text = str(error)
    if text.startswith(_MISMATCH):
        differences = ast.literal_eval(text.removeprefix(_MISMATCH))
        text = "; ".join(difference.partition(": Expected")[0] for difference in differences)
    return " ".join(text.split())


def _links(folder: Path) -> list[PurePath]:
    return [path for path in entries(folder) if (folder / path).is_symlink()]


def _covered(folder: Path) -> Iterator[str]:
    """The files that a signature must cover, as the library names them."""
    for path in entries(folder):
        if not any(path.is_relative_to(left_out) for left_out in _UNSIGNED):
            yield path.as_posix()


def _signed(signature: Path) -> Iterator[str]:
    """The files that a verified signature covers, from the in-toto statement in its envelope."""
    bundle: dict[str, Any] = json.loads(signature.read_text(encoding="utf-8"))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    for resource in statement["predicate"]["resources"]:
        yield resource["name"]


def _hashing() -> hashing.Config:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=_UNSIGNED)


def _signer(key: Path) -> signing.Config:
    _check_installed()
    from model_signing import signing

    try:
        return signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:
        raise _bad_key("private", key, error) from error


def _verifier(key: Path) -> verifying.Config:
    _check_installed()
    from model_signing import verifying

    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise _bad_key("public", key, error) from error


def _check_installed() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise BadInputError(f'signatures need {error.name}: pip install "vlmconvert[sign]"') from None


def _bad_key(kind: str, key: Path, error: Exception) -> BadInputError:
    reason = " ".join(str(error).split())
    if isinstance(error, AttributeError):  # the library asks every key for its curve
        reason = "it is of another kind"
    return BadInputError(
        f"{key} cannot be used as the {kind} key ({reason}): give the PEM file of an elliptic-curve key on P-256, P-384 or "
        "P-521, without a password"
    )
