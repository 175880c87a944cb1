"""What transformers' configuration class of a family says, read from its source as data.

Importing such a class imports torch (3 s), and `plan` answers before that. Defaults and renamed
fields are literals of the class body, or of its `__init__` in older versions, so the syntax tree
has them (25 ms for the first family). It does not have what a class computes from other fields:
`config.py` knows the two rules that count (key-value heads, size of a head), and the network
compares what was read with the class itself.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CONFIGS, _MODULES = "CONFIG_MAPPING_NAMES", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"
_GENERATES = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_MULTIMODAL = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)
_PARTS = ("sub_configs_defaults", "sub_configs")
_BASES = ("PreTrainedConfig", "PretrainedConfig")


@dataclass(frozen=True, slots=True)
class ConfigClass:
    """A configuration class.

    Attributes:
        defaults: literal ones, by field; a field whose default is computed is in `computed`.
        renamed: the field that holds what has a standard name elsewhere (`attribute_map`).
        computed: fields with a default that is no literal.
        never_null: fields that None is refused for.
    """

    defaults: Mapping[str, object]
    renamed: Mapping[str, str]
    computed: frozenset[str]
    never_null: frozenset[str]

    def has(self, name: str) -> bool:
        """Whether the class has a field of this name, or an alias of it."""
        return name in self.defaults or name in self.computed or name in self.renamed

    def names(self, standard: str) -> tuple[str, ...]:
        """What a file may call a number; the first of them that is there counts.

        The class sets its fields first and what else is there afterwards, by `attribute_map`.
        """
        field = self.renamed.get(standard, standard)
        return (standard,) if field == standard else (standard, field)


@cache
def find_config_class(model_type: str) -> ConfigClass | None:
    """The configuration class of `model_type`; None where transformers has none."""
    class_name = _pairs(_CONFIGS).get(model_type)
    if class_name is None:
        return None
    shared = [name for name, theirs in _pairs(_CONFIGS).items() if theirs == class_name]
    for name in (model_type, *shared):  # the class may be that of another family
        module = other_folder(name) or name.replace("-", "_")
        for path in sorted((_models() / module).glob("configuration_*.py")):
            if made := _read_class(path, class_name):
                return made
    return _NOTHING


def other_folder(model_type: str) -> str | None:
    """The folder of a family that lies in one of another name."""
    return _pairs(_MODULES).get(model_type)


def generates_text(model_type: str) -> bool:
    """Whether transformers has a class of this family for `AutoModelForCausalLM`."""
    return model_type in _pairs(_GENERATES)


def reads_more_than_text(model_type: str) -> bool:
    """Whether transformers has a class of this family that answers in text to pictures, sound..."""
    return any(model_type in _pairs(table) for table in _MULTIMODAL)


def text_type_of(model_type: str) -> str | None:
    """The family of a whole's text part where its configuration does not say; None if unknown."""
    class_name = _pairs(_CONFIGS).get(model_type, "")
    module = other_folder(model_type) or model_type.replace("-", "_")
    for path in sorted((_models() / module).glob("configuration_*.py")):
        found = _find_class(path, class_name)
        for name, value, _ in () if found is None else _stated(found[1]):
            if name in _PARTS and isinstance(value, ast.Dict):
                parts = dict(
                    zip(map(_literal, filter(None, value.keys)), value.values, strict=True)
                )
                return _family_named(parts.get("text_config"))
    return None


def _family_named(spec: ast.expr | None) -> str | None:
    """The family of a configuration class, or of `SubConfigSpec(..., model_type=...)`."""
    if isinstance(spec, ast.Call):
        names = [_literal(word.value) for word in spec.keywords if word.arg == "model_type"]
        return next((name for name in names if isinstance(name, str)), None)
    name = spec.id if isinstance(spec, ast.Name) else ""
    return next((family for family, made in _pairs(_CONFIGS).items() if made == name), None)


_NOTHING = ConfigClass({}, {}, frozenset(), frozenset())
_COMPUTED = object()


@cache
def _models() -> Path:
    """Where the families' modules are; nothing is imported to find out."""
    spec = importlib.util.find_spec("transformers")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0] if places else "/nonexistent") / "models"


@cache
def _pairs(table: str) -> Mapping[str, str]:
    """A table of texts of transformers' `auto` modules, with what is added to it later."""
    files = ["modeling_auto.py"]
    if table in (_CONFIGS, _MODULES):
        files = ["auto_mappings.py", "configuration_auto.py"]
    pairs: dict[str, str] = {}
    for path in (_models() / "auto" / name for name in files):
        for node in _tree(path).body if path.is_file() else ():
            if _changed(node) == table:
                for part in ast.walk(node):
                    value = _literal(part)
                    one = isinstance(value, tuple) and len(value) == 2 and table in _MULTIMODAL
                    pairs.update(_texts([value] if one else value))
    return pairs


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _changed(node: ast.stmt) -> str | None:
    """The name that a statement assigns to or calls a method of."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
            return name
    return None


def _texts(value: object) -> dict[str, str]:
    """Pairs of texts, written as a dict or as a list."""
    if isinstance(value, list) and all(isinstance(one, tuple) and len(one) == 2 for one in value):
        value = dict(value)
    pairs = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in pairs if isinstance(key, str) and isinstance(text, str)}


def _literal(node: ast.expr | ast.AST) -> object:
    """The value of an expression of literals; `_COMPUTED` for any other."""
    match node:
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = (_literal(left), _literal(right))
            if all(isinstance(one, int | float) for one in factors):
                return factors[0] * factors[1]  # type: ignore[operator]
            return _COMPUTED
        case ast.Call(keywords=keywords):  # interval(min=0.0, max=1.0)(default=0.02)
            values = [word.value for word in keywords if word.arg == "default"]
            return _literal(values[0]) if values else _COMPUTED
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _COMPUTED


def _find_class(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """A class, in this module or where the module imports it from."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            base = path.parents[max(node.level, 1) - 1].joinpath(*(node.module or "").split("."))
            places = [base.with_suffix(".py"), *sorted(base.glob("configuration_*.py"))]
            found = (_find_class(place, name) for place in places if place.is_file())
            return next((one for one in found if one), None)
    return None


def _read_class(path: Path, name: str) -> ConfigClass | None:
    """Fields of a class, those of its bases first."""
    found = _find_class(path, name)
    if found is None:
        return None
    path, node = found
    fields: dict[str, object] = {}
    renamed: dict[str, str] = {}
    never_null: set[str] = set()
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id not in _BASES:
            parent = _read_class(path, base.id) or _NOTHING
            fields |= {**parent.defaults, **dict.fromkeys(parent.computed, _COMPUTED)}
            renamed |= parent.renamed
            never_null |= parent.never_null
    for field, value, annotation in _stated(node):
        if field == "attribute_map":
            renamed = _texts(_literal(value))
            continue
        fields[field] = _literal(value)
        if annotation is not None:
            takes_null = any(word in ast.unparse(annotation) for word in ("None", "Optional"))
            (never_null.discard if takes_null else never_null.add)(field)
    return ConfigClass(
        defaults={key: value for key, value in fields.items() if value is not _COMPUTED},
        renamed=renamed,
        computed=frozenset(key for key, value in fields.items() if value is _COMPUTED),
        never_null=frozenset(never_null),
    )


def _stated(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """What a class body sets, with annotations: fields, attributes, defaults of `__init__`."""
    for part in node.body:
        match part:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value, part.annotation
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value, None
            case ast.FunctionDef(name="__init__", args=arguments):
                count = len(arguments.defaults)
                last = arguments.args[len(arguments.args) - count :]
                for argument, value in zip(last, arguments.defaults, strict=True):
                    yield argument.arg, value, None
