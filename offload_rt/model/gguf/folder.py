"""The model folder that GGUF files stand for.

All of the package, and transformers' tokenizers, read folders. So what files say of the network and
its text is written once as the `config.json` and the tokenizer's files that the model would have
had, into the cache, beside links to the files themselves, and norms that files have otherwise
(Gemma's). All other weights are read from the files, where they lie. Files that change get another
folder; those whose files are gone are removed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.folders import cache_folder
from offload_rt.model.files import read_json_object, shown
from offload_rt.model.gguf import ENDING, MANIFEST
from offload_rt.model.gguf.network import describe, family_of
from offload_rt.model.gguf.tensors import NORMS, files_of, norms_of, read_files
from offload_rt.model.gguf.tokenizer import WANTED, describe_text

_log = logging.getLogger(__name__)

_MANIFEST_BYTES = 2**20
_VERSION = 2  # of what is written; another one is written anew
_PLACE = "gguf"
_SHOWN = 4


def gguf_folder(path: Path) -> Path:
    """The folder that stands for a GGUF file, made if it is not there.

    Args:
        path: of the file, or of one of those that a model was split into.

    Raises:
        CheckpointError: a file is missing or damaged, or its network is not read.
        ConfigError: the cache cannot be written.
    """
    path = Path(os.path.abspath(path))
    stem, names = files_of(path.name)
    if stem in {"", ".", ".."}:
        raise CheckpointError(f"{path}: a GGUF file needs a name before {ENDING}: rename it")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent / missing[0]} is missing, {len(missing)} of the {len(names)} files of "
            "the model are: download them into one folder"
        )
    place = cache_folder() / _PLACE / _key(path.parent, names) / stem
    if (place / MANIFEST).is_file():
        return place
    first, headers = read_files(path.parent, names, WANTED)
    tensors = [tensor for header in headers for tensor in header.tensors]
    config = describe(path, first.metadata, tensors)
    texts = describe_text(path, first.metadata)
    config |= texts.config
    values = {
        "config.json": config,
        **texts.files,
        MANIFEST: {"version": _VERSION, "files": names},
    }
    written = {
        name: json.dumps(value, ensure_ascii=False).encode() for name, value in values.items()
    }
    family = family_of(first.metadata)
    assert family is not None  # or it would not have been described
    if (norms := norms_of(path.parent, family, tensors)) is not None:
        written[NORMS] = norms
    return _write(place, path.parent, names, written)


def names_in(folder: Path) -> list[str] | None:
    """The GGUF files of a folder that stands for them; None for any other.

    Raises:
        CheckpointError: what names them is damaged.
    """
    if not os.path.lexists(folder / MANIFEST):
        return None
    names = read_json_object(folder, MANIFEST, _MANIFEST_BYTES).get("files")
    if not (
        isinstance(names, list)
        and names
        and all(isinstance(n, str) and n.endswith(ENDING) and "/" not in n for n in names)
    ):
        raise CheckpointError(f"{folder / MANIFEST} names no files: remove {folder}")
    return names


def refuse_gguf(folder: Path, why: str) -> None:
    """Refuse GGUF files where others than these are needed.

    Raises:
        ConfigError: the folder stands for such.
    """
    if names_in(folder) is not None:
        raise ConfigError(
            f"{shown(folder.name)} is a GGUF file, {why}: take the model it was made from"
        )


def gguf_in(folder: Path) -> Path | None:
    """The one model in GGUF files of a folder; None where there is none.

    Raises:
        CheckpointError: there are several.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(ENDING))
    except OSError:
        return None
    models = {files_of(name)[0]: name for name in reversed(names) if not name.startswith("mmproj")}
    if len(models) > 1:
        some = ", ".join(shown(name) for name in sorted(models.values())[:_SHOWN])
        raise CheckpointError(
            f"{folder} holds {len(models)} models as GGUF, such as {some}: give the file of one"
        )
    return folder / next(iter(models.values())) if models else None


def _key(folder: Path, names: Sequence[str]) -> str:
    """What the files are, in a word."""
    facts: list[object] = [_VERSION]
    for name in names:
        real = os.path.realpath(folder / name)
        status = os.stat(real)
        facts += [real, status.st_size, status.st_mtime_ns, status.st_ino]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _write(place: Path, folder: Path, names: Sequence[str], written: dict[str, bytes]) -> Path:
    """Make the folder, which appears whole."""
    from offload_rt.writing import give_names, make_folder, temporary_folder  # and safetensors

    parent = place.parent
    try:
        _forget_gone(parent.parent)
        with temporary_folder(make_folder(parent)) as temporary:
            made = temporary / place.name
            made.mkdir()
            for name in names:
                os.symlink(os.path.realpath(folder / name), made / name)
            for name, value in written.items():
                (made / name).write_bytes(value)
            give_names(temporary, parent, [place.name])
    except (OSError, ConfigError) as error:
        if (place / MANIFEST).is_file():  # another process was faster
            return place
        raise ConfigError(
            f"cannot keep what {names[0]} says of its text in {parent} ({error}): set "
            "OFFLOAD_RT_CACHE to a folder that can be written"
        ) from error
    return place


def _forget_gone(root: Path) -> None:
    """Remove folders of files that are not there any more."""
    for old in root.glob(f"*/*/{MANIFEST}"):
        try:
            links = [entry for entry in old.parent.iterdir() if entry.suffix == ENDING]
        except OSError:  # another process removes it
            continue
        if not all(os.path.exists(link) for link in links):
            _log.info("%s is removed: its files are gone", old.parent)
            shutil.rmtree(old.parent.parent, ignore_errors=True)
