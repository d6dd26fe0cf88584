"""The output folder: it is checked before any work, and gets its name when it is complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from manifests.beside import MODEL_CARD_NAME, foreign_files, foreign_results
from manifests.errors import BadInputError
from manifests.files import UNFINISHED, remove_tree, sync_tree
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, read_manifest
from manifests.leftovers import is_left, remove_leftovers, temporary_folder, temporary_prefix
from manifests.model import Manifest, Settings

__all__ = ["Planned", "check_output", "check_replaceable", "check_results", "publish", "replace_folder", "staging"]

# Beginning of the names of folders that hold a result while another one takes its place.
_REPLACED = f"{UNFINISHED}replaced-"
_CHOOSE = "choose another folder with --output"


@dataclass(frozen=True)
class Planned:
    """The artifact that a conversion will make, as far as it is known before any weight is read.

    Attributes:
        passes: name of a component -> canonical lines of its passes, in the order in which they run.
        layers: name of a component -> in-memory name of a weight -> precision of its layer, if it is not the
            component's.
        environment: library -> version, as the manifest records it.
        sizes: name -> bytes of the component files whose sizes are known before they are written.
        sources: path -> bytes of the checkpoint's files, as the manifest lists them.
        settings: settings of the recipe other than its passes.
    """

    passes: Mapping[str, Sequence[str]]
    layers: Mapping[str, Mapping[str, str]]
    environment: Mapping[str, str]
    sizes: Mapping[str, int]
    sources: Mapping[str, int]
    settings: Settings

    def fits(self, manifest: Manifest) -> bool:
        """Whether the planned artifact can be the one that a manifest describes; only hashes could prove that it is."""
        sizes = {file.path: file.size for component in manifest.components for file in component.files}
        return (
            {component.name: component.passes for component in manifest.components}
            == {name: list(lines) for name, lines in self.passes.items()}
            and {component.name: component.layers for component in manifest.components} == self.layers
            and manifest.environment == dict(self.environment)
            and {file.path: file.size for file in manifest.source.files} == dict(self.sources)
            and self.sizes.items() <= sizes.items()
            and manifest.settings in (None, self.settings)
        )


def check_output(output: Path, checkpoint_folder: Path, planned: Planned, force: bool) -> None:
    """Refuse an output folder that holds something else, before any work and without reading weights.

    Args:
        output: folder of the artifact.
        checkpoint_folder: folder of the checkpoint.
        planned: the artifact that will be made.
        force: whether to replace a different artifact of vlmconvert.

    Raises:
        BadInputError: if the output holds something else; the error says what.
    """
    check_replaceable(output, checkpoint_folder, force)
    place = _place(output)
    if not force and not _is_free(output, place) and not planned.fits(_existing(output, place)):
        raise _holds_another(output)


def check_replaceable(output: Path, checkpoint_folder: Path, force: bool) -> None:
    """Refuse an output folder that `check_output` would refuse whatever is planned; for the arguments see there.

    Raises:
        BadInputError: if the output holds something else than an artifact, or another one may not be replaced.
    """
    place = _place(output)
    if _is_free(output, place):
        return
    if force:
        _check_replaceable(output, place, checkpoint_folder)
    else:
        _existing(output, place)


def check_results(folder: Path) -> None:
    """Refuse a folder for the results of an evaluation that holds anything except earlier results.

    Raises:
        BadInputError: if the folder holds something else; the error says what.
    """
    place = _place(folder)
    if not _is_free(folder, place):
        _check_movable(folder, place)
        _check_own(folder, foreign_results(place))


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Make a temporary folder next to the output, in which the result is written.

    If the folder is not renamed, it is removed at the end, together with the parent folders that were made for it. What killed
    runs have left beside the output is removed, and an older result that one of them was replacing gets its name again.
    """
    parent = _place(output).parent
    _restore(parent)
    for prefix in (UNFINISHED, _REPLACED):
        remove_leftovers(parent, prefix)
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(parent, UNFINISHED) as folder:
            yield folder
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def publish(
    staged: Path,
    output: Path,
    checkpoint_folder: Path,
    manifest: Manifest,
    force: bool,
    say: Callable[[str], None],
) -> None:
    """Give a finished folder its name; an older artifact is removed only after the new one has its name.

    The output is checked again, because it may have changed during the work. If it already holds the same artifact,
    only the figures of a validation are taken over.

    Args:
        staged: the finished folder, which `staging` made for this output.
        output: folder of the artifact.
        checkpoint_folder: folder of the checkpoint.
        manifest: manifest of the finished folder.
        force: whether to replace a different artifact of vlmconvert.
        say: shows a line of progress.

    Raises:
        BadInputError: if the output holds something else.
        OSError: if a folder cannot be renamed; the output is left as it was before.
    """
    place = _place(output)
    sync_tree(staged)
    if _is_free(output, place):
        if place.exists():
            place.rmdir()
        _name(staged, place)
    elif force:
        _check_replaceable(output, place, checkpoint_folder)
        replace_folder(staged, output)
    else:
        existing = _existing(output, place)
        if existing.model_copy(update={"validation": manifest.validation}) != manifest:
            raise _holds_another(output)
        say(f"{output} already holds this result")
        if manifest.validation:
            for name in (MANIFEST_NAME, CHECKSUM_NAME, MODEL_CARD_NAME):
                (staged / name).replace(place / name)


def replace_folder(new: Path, place: Path) -> None:
    """Replace a folder by a finished folder; the old one is removed only after the new one has its name.

    Args:
        new: the finished folder, which `staging` made for this place.
        place: a folder, a link to a folder, or a path that does not exist.

    Raises:
        OSError: if a folder cannot be renamed; the old folder is left as it was before.
    """
    place = _place(place)
    if not place.exists():
        _name(new, place)
        return
    aside = Path(tempfile.mkdtemp(prefix=temporary_prefix(_REPLACED), dir=place.parent))
    old = aside / place.name
    try:
        place.rename(old)
        try:
            _name(new, place)
        except BaseException:
            old.rename(place)
            raise
    except BaseException:
        with suppress(OSError):  # not empty, if the old folder could not be renamed back
            aside.rmdir()
        raise
    remove_tree(aside)


def _restore(parent: Path) -> None:
    """Give results their names again that killed runs have moved aside to replace them; see `replace_folder`."""
    for aside in parent.glob(f"{_REPLACED}*"):
        for old in aside.iterdir():
            if not (parent / old.name).exists() and is_left(aside, _REPLACED):
                old.rename(parent / old.name)


def _name(folder: Path, place: Path) -> None:
    folder.chmod(0o755)  # only the owner can read a temporary folder
    folder.rename(place)


def _place(output: Path) -> Path:
    """The folder that a path points to; a link is kept, and the folder that it points to is filled or replaced."""
    try:
        return output.resolve()
    except FileNotFoundError:  # a relative path, in a working directory that has been removed
        raise BadInputError(
            f"{output} cannot be made, as the working directory does not exist any more: change it"
        ) from None
    except (OSError, RuntimeError) as error:  # links that lead to each other
        raise BadInputError(f"{output} is a link that cannot be followed ({error}): {_CHOOSE}") from None


def _is_free(output: Path, place: Path) -> bool:
    """Whether the output does not exist, or is an empty folder.

    Raises:
        BadInputError: if no folder can be made or replaced there.
    """
    try:
        if place.exists() and not place.is_dir():
            raise BadInputError(f"{output} exists and is a file: {_CHOOSE}")
        above = next((folder for folder in place.parents if folder.exists()), place)
        filled = place.is_dir() and any(place.iterdir())
    except OSError as error:
        raise BadInputError(f"{output} cannot be used ({error.strerror}): {_CHOOSE}") from None
    if not above.is_dir():
        raise BadInputError(f"{output} cannot be made, as {above} is a file: {_CHOOSE}")
    _try_writing(output, above)
    if place.is_dir() and not filled:
        _check_movable(output, place)
    return not filled


def _try_writing(output: Path, above: Path) -> None:
    """Refuse an output in a folder in which no folder can be made, for whatever reason: only the attempt tells."""
    try:
        with temporary_folder(above, UNFINISHED):
            pass
    except OSError as error:
        raise BadInputError(
            f"{output} cannot be made, as nothing can be written into {above} ({error.strerror}): {_CHOOSE}"
        ) from None


def _existing(output: Path, place: Path) -> Manifest:
    if not (place / MANIFEST_NAME).exists():
        raise BadInputError(f"{output} exists and vlmconvert did not write it: {_CHOOSE}")
    try:
        return read_manifest(place)
    except BadInputError as error:
        raise BadInputError(f"{output} holds a {MANIFEST_NAME} that this vlmconvert cannot read: {_CHOOSE}") from error


def _holds_another(output: Path) -> BadInputError:
    return BadInputError(f"{output} holds a different result: {_CHOOSE}, or replace it with --force")


def _check_movable(output: Path, place: Path) -> None:
    """Refuse a folder that holds the working directory or the home directory, or that cannot be renamed."""
    if os.path.ismount(place):
        raise BadInputError(
            f"{output} is a mount point, which cannot be replaced: give a folder inside it with --output"
        )
    for name, find in (("working", Path.cwd), ("home", Path.home)):
        with suppress(OSError, RuntimeError):  # the directory does not exist any more, or is not known
            folder = find().resolve()
            if folder.is_relative_to(place):
                what = f"is the {name} directory" if folder == place else f"holds the {name} directory {folder}"
                raise BadInputError(f"{output} {what}, which is never replaced: {_CHOOSE}")


def _check_replaceable(output: Path, place: Path, checkpoint_folder: Path) -> None:
    """Refuse to replace a folder that has other files than an artifact of vlmconvert, or that holds the checkpoint."""
    _check_movable(output, place)
    checkpoint = checkpoint_folder.resolve()
    mend = f"which --force does not replace: {_CHOOSE}"
    if place == checkpoint:
        raise BadInputError(f"{output} is the folder of the checkpoint, {mend}")
    if place.is_relative_to(checkpoint):
        raise BadInputError(f"{output} lies in the folder of the checkpoint, {mend}")
    if checkpoint.is_relative_to(place):
        raise BadInputError(f"{output} holds the folder of the checkpoint {checkpoint_folder}, {mend}")
    # The files of a checkpoint may be links, as in the hub's cache.
    for file in checkpoint.iterdir() if checkpoint.is_dir() else ():
        if Path(os.path.realpath(file)).is_relative_to(place):
            raise BadInputError(f"{output} holds the file to which {file} of the checkpoint is a link, {mend}")
    _check_own(output, foreign_files(place, _existing(output, place)))


def _check_own(output: Path, foreign: Sequence[PurePath]) -> None:
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise BadInputError(
            f"{output} also holds {foreign[0]}{more}, which vlmconvert did not write: move it elsewhere, or {_CHOOSE}"
        )
