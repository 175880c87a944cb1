"""What the installed transformers says of a family, read from its source: nothing is imported.

A plan needs the names a family's modules have, which of their tensors stay in fp32, and what old
files may carry besides. transformers keeps that in class attributes; to import the classes is to
import torch, for seconds. The network checks what is said here against the classes themselves.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offload_rt.model.config_class import other_folder

_STRICT, _LOOSE = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
_IGNORED, _TIED = "_keys_to_ignore_on_load_unexpected", "_tied_weights_keys"
_ATTRIBUTES = {_STRICT, _LOOSE, _IGNORED, _TIED}
_REGISTERS = {"register_buffer", "register_parameter", "add_module"}
_TORCH_NAMES = {"weight", "bias", "in_proj_weight", "in_proj_bias"}  # of torch's own modules
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Family:
    """A family's names and rules; all empty for one that transformers does not have.

    Attributes:
        keys: the family's name and those of its classes; empty when transformers has none.
        names: names of its modules and tensors; in files they may have others (`knows`).
        heads: names of output heads that it can tie to the embedding.
        fp32: patterns of names that stay in fp32 in a bf16 or fp16 model.
        fp32_in_fp16: patterns of names that stay in fp32 in an fp16 model only.
        ignored: patterns of names that may be left over.
    """

    keys: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    heads: frozenset[str] = frozenset()
    fp32: tuple[str, ...] = ()
    fp32_in_fp16: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def knows(self, word: str) -> bool:
        """Whether a module or tensor may be called that, in the network or before it is renamed."""
        return not self.keys or word in self.names or word in _renamed_words(self.keys)

    def ignores(self, name: str) -> bool:
        """Whether the family says itself that a tensor of that name may be left over."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def stays_fp32(self, dtype: str) -> re.Pattern[str] | None:
        """What names of tensors that stay in fp32 match in a model of that format, if there are.

        Args:
            dtype: torch's name of it.
        """
        patterns = () if dtype == "float32" else self.fp32
        if dtype == "float16":
            patterns += self.fp32_in_fp16
        return any_of(patterns)


def any_of(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all, as transformers reads them: a star matches anything."""
    return re.compile("|".join(p.replace("*", r".*") for p in patterns)) if patterns else None


@lru_cache(maxsize=32)
def read_family(model_type: str) -> Family:
    """Read the source of a family, the modules of its own and the activations all share."""
    root = _root()
    if root is None or not _MODEL_TYPE.fullmatch(model_type):
        return Family()
    tree = _parsed(_modeling_file(root, model_type))
    if tree is None:
        return Family()
    found: dict[str, list[str]] = {name: [] for name in _ATTRIBUTES}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in classes:
        for name, value in _class_attributes(node):
            found[name] += value
    names = set(_assigned(tree)) | _TORCH_NAMES
    if shared := _parsed(root / "activations.py"):
        names |= set(_assigned(shared))
    keys = frozenset({model_type, *(node.name for node in classes)})
    strict = found[_STRICT] + (_renamed_to(keys, found[_STRICT]) if found[_STRICT] else [])
    return Family(
        keys=keys,
        names=frozenset(names),
        heads=frozenset(key.removesuffix(".weight") for key in found[_TIED]),
        fp32=(*strict, *_made_in_fp32(tree)),
        fp32_in_fp16=tuple(found[_LOOSE]),
        ignored=tuple(found[_IGNORED]),
    )


def _root() -> Path | None:
    spec = find_spec("transformers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _modeling_file(root: Path, model_type: str) -> Path:
    """The file that has the family's classes; a text part often lies in the whole's folder."""
    plain = model_type.replace("-", "_")
    folder = root / "models" / plain
    if not folder.is_dir():
        other = other_folder(model_type) or plain.removesuffix("_text")
        folder = root / "models" / other.replace("-", "_")
    return folder / f"modeling_{folder.name}.py"


def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _class_attributes(node: ast.ClassDef) -> Iterator[tuple[str, list[str]]]:
    for statement in node.body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        name = next((t.id for t in targets if isinstance(t, ast.Name)), "")
        value = getattr(statement, "value", None)
        if name in _ATTRIBUTES and value is not None:
            yield name, [text for text in _literal(value) if isinstance(text, str)]


def _literal(node: ast.expr) -> list[Any]:
    """What a list, a set, the keys of a dict, or `OrderedDict([...])` is written out to hold."""
    if isinstance(node, ast.Call) and node.args:
        node = node.args[0]
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return []
    return list(value) if isinstance(value, list | tuple | set | frozenset | dict) else []


def _made_in_fp32(tree: ast.Module) -> Iterator[str]:
    """Patterns of names that are made in fp32 whatever the model's format."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            formats = [word.value for word in node.value.keywords if word.arg == "dtype"]
            if [ast.unparse(each) for each in formats] == ["torch.float32"]:
                targets = [t.attr for t in node.targets if isinstance(t, ast.Attribute)]
                yield from (rf"\.{name}(\.|$)" for name in targets)


def _assigned(tree: ast.Module) -> Iterator[str]:
    """Every `self.x = ...` and every name that is registered."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            first = node.args[0]
            if node.func.attr in _REGISTERS and isinstance(first, ast.Constant):
                yield str(first.value)


@lru_cache(maxsize=32)
def _renamed_words(keys: frozenset[str]) -> frozenset[str]:
    """Every word in what transformers renames for a family or one of its classes."""
    return frozenset(
        word
        for entry in _entries(keys)
        for text in _texts(entry)
        for word in _WORD.findall(text.replace(r"\.", " "))
    )


def _renamed_to(keys: frozenset[str], patterns: list[str]) -> list[str]:
    """Patterns of names in files that are renamed to what these patterns match."""
    return [
        found[0]
        for entry in _entries(keys)
        for node in ast.walk(entry)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "WeightRenaming"
        and len(found := _texts(node)) == 2
        and any(re.search(pattern, found[1]) for pattern in patterns)
    ]


@lru_cache(maxsize=32)
def _entries(keys: frozenset[str]) -> tuple[ast.expr, ...]:
    """What transformers renames for a family and its classes, and where it refers to."""
    root = _root()
    entries = {} if root is None else _renamings(root)
    found: list[ast.expr] = []
    waiting, done = [*keys, "legacy"], set[str]()
    while waiting:
        key = waiting.pop()
        if key not in done and key in entries:
            done.add(key)
            found += entries[key]
            waiting += [text for entry in entries[key] for text in _texts(entry)]
    return tuple(found)


def _texts(node: ast.AST) -> list[str]:
    """All texts in it, in order."""
    values = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return [value for value in values if isinstance(value, str)]


def _renamings(root: Path) -> dict[str, list[ast.expr]]:
    """What is written for each family or class, in a dict or by `mapping[...] = ...`."""
    entries: dict[str, list[ast.expr]] = {}
    for node in ast.walk(_parsed(root / "conversion_mapping.py") or ast.Module([], [])):
        pairs: list[tuple[ast.expr | None, ast.expr]] = []
        if isinstance(node, ast.Dict):
            pairs += zip(node.keys, node.values, strict=True)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            pairs += [(target.slice, node.value)] if isinstance(target, ast.Subscript) else []
        for key, value in pairs:
            if isinstance(key, ast.Constant):
                entries.setdefault(str(key.value), []).append(value)
    return entries
