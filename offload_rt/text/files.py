"""What files of a model folder say about text, read as untrusted input; no torch here.

Where several say the same thing, one decides, as in transformers: generation_config.json before
config.json before the tokenizer about the end of an answer. Which file a chat template or a special
token comes from is left to transformers, which loads the tokenizer.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from offload_rt.errors import CheckpointError
from offload_rt.model.files import foreign_format, open_inside, read_json_object, shown
from offload_rt.units import format_size

# Everything transformers may open to load a tokenizer, with the most that is accepted: the largest
# vocabularies known take 40 MB, the largest templates 100 kB.
_VOCABULARY_BYTES = 256 * 2**20
_SETTINGS_BYTES = 16 * 2**20
_TEMPLATES = "additional_chat_templates"
_FILES = {
    "tokenizer.json": _VOCABULARY_BYTES,
    "tokenizer.*.json": _VOCABULARY_BYTES,
    "*.model": _VOCABULARY_BYTES,
    "tokenizer.model.*": _VOCABULARY_BYTES,
    "*.tiktoken": _VOCABULARY_BYTES,
    "tekken*.json": _VOCABULARY_BYTES,
    "vocab.*": _VOCABULARY_BYTES,
    "merges.txt": _VOCABULARY_BYTES,
    "tokenizer_config.json": _SETTINGS_BYTES,
    "special_tokens_map.json": _SETTINGS_BYTES,
    "added_tokens.json": _SETTINGS_BYTES,
    "chat_template.jinja": _SETTINGS_BYTES,
    "chat_template.json": _SETTINGS_BYTES,
    f"{_TEMPLATES}/*.jinja": _SETTINGS_BYTES,
}
_CONFIGS = ("generation_config.json", "config.json")

# Without one of these transformers may make up an empty tokenizer for a known model type. With the
# packages: one of them is needed to read it.
_VOCABULARIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tokenizer.json", ()),
    ("vocab.json", ()),
    ("vocab.txt", ()),
    ("tekken.json", ("mistral-common",)),
    ("*.model", ("sentencepiece", "tiktoken")),
    ("tokenizer.model.*", ("sentencepiece", "tiktoken")),
    ("*.tiktoken", ("tiktoken",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredSampling:
    """How the makers of a model want tokens drawn; None is what they do not say."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def check_tokenizer_files(folder: Path) -> int:
    """Look at the files a tokenizer is loaded from, before anything heavy is imported.

    Returns:
        Their bytes, all together.

    Raises:
        CheckpointError: there is no vocabulary, a package for it is not installed, or a file is
            not regular, outside of the folder, too large, or of another kind.
    """
    names = _tokenizer_files(folder)
    _check_vocabulary(folder, list(names))
    total = 0
    for name, limit_bytes in names.items():
        with open_inside(folder, name) as file:
            size = file.identity.size
            if size > limit_bytes:
                raise CheckpointError(
                    f"{folder / name} has {format_size(size)}, accepted is up to "
                    f"{format_size(limit_bytes)}: it is not what its name says"
                )
            if (kind := foreign_format(file.read(64))) and name.endswith(".json"):
                raise CheckpointError(f"{folder / name} {kind}")
            total += size
    return total


def declared_end_ids(folder: Path) -> frozenset[int] | None:
    """Tokens that end an answer, by the first file that names some; None where none does.

    transformers looks no further than a generation_config.json that is there. One that names no
    end would let answers go on for ever, so config.json is asked then; for multimodal models its
    part of the text is.

    Raises:
        CheckpointError: a file is damaged or names something that is not a token id.
    """
    for name in _CONFIGS:
        config = _read(folder, name)
        nested = config.get("text_config") if name == "config.json" else None
        for part in (config, nested):
            if isinstance(part, Mapping) and part.get("eos_token_id") is not None:
                return _token_ids(part["eos_token_id"], folder / name)
    return None


def declared_sampling(folder: Path) -> DeclaredSampling:
    """What generation_config.json says about sampling.

    Raises:
        CheckpointError: it is damaged or a value cannot be meant.
    """
    config = _read(folder, _CONFIGS[0])
    declared = {name: _checked(folder, name, config.get(name)) for name in _SAMPLING}
    return DeclaredSampling(**declared)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


# (accepted, in words)
_SAMPLING: dict[str, tuple[Callable[..., bool], str]] = {
    "do_sample": (lambda v: type(v) is bool, "true or false"),
    "temperature": (lambda v: _is_number(v) and v >= 0, "a number from 0"),
    "top_k": (lambda v: type(v) is int and v >= 0, "a whole number from 0"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "min_p": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _is_number(v) and v > 0, "a number above 0"),
}


def _checked(folder: Path, name: str, value: object) -> object:
    accepts, words = _SAMPLING[name]
    if value is not None and not accepts(value):
        raise CheckpointError(
            f"{name} in {folder / _CONFIGS[0]} is {shown(value)}, expected {words}: mend or delete "
            "it there"
        )
    return value


def _read(folder: Path, name: str) -> dict[str, object]:
    """A JSON file that need not be there."""
    if not os.path.lexists(folder / name):
        return {}
    return read_json_object(folder, name, _SETTINGS_BYTES)


def _token_ids(declared: object, path: Path) -> frozenset[int]:
    """Ids as a file names them; a negative one is how files say that there is none."""
    ids: list[Any] = declared if isinstance(declared, list) else [declared]
    for token_id in ids:
        if type(token_id) is not int:
            raise CheckpointError(
                f"eos_token_id in {path} is {shown(token_id)}, expected a token id"
            )
    return frozenset(ids) - {token_id for token_id in ids if token_id < 0}


def _tokenizer_files(folder: Path) -> dict[str, int]:
    """Names of the files that are there, dangling links too, and how large each may be."""
    found = []
    for place in ("", _TEMPLATES):
        try:
            found += [os.path.join(place, name) for name in os.listdir(folder / place)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise CheckpointError(f"{folder / place} cannot be read: {error.strerror}") from error
    return {
        name: limit_bytes
        for name in sorted(found)
        for pattern, limit_bytes in _FILES.items()
        if fnmatch(name, pattern) and not os.path.isdir(folder / name)
    }


def _check_vocabulary(folder: Path, names: list[str]) -> None:
    there = [
        (name, packages)
        for pattern, packages in _VOCABULARIES
        for name in names
        if fnmatch(name, pattern)
    ]
    if not there:
        raise CheckpointError(
            f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model there, "
            "download it next to the weights"
        )
    if any(not packages or any(map(_is_installed, packages)) for _, packages in there):
        return
    name, packages = there[0]
    raise CheckpointError(
        f"{folder} has its tokenizer as {name} only, which is read with the package "
        f"{' or '.join(packages)}: install it with `pip install {packages[0]}`, or get a "
        "tokenizer.json of the same model"
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None
