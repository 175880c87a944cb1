"""Read a model's `config.json` as untrusted input, by the rules of the family's own class.

transformers builds the family's configuration class from the file. A name that the class lacks
means nothing, one it has by `attribute_map` counts, and what the file leaves out is the class's
default (`model/config_class.py`). Numbers are bounded. Nothing here or later runs or picks code
because the file says so.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from offload_rt.errors import CheckpointError
from offload_rt.model.config_class import (
    ConfigClass,
    find_config_class,
    generates_text,
    reads_more_than_text,
    text_type_of,
)
from offload_rt.model.files import read_json_object, shown
from offload_rt.model.formats.methods import Method, read_method
from offload_rt.model.kinds import KEYS, READ, find_kind, weights_note

_log = logging.getLogger(__name__)

_CONFIG_NAME = "config.json"
_CONFIG_LIMIT_BYTES = 4 * 2**20  # the largest seen, with a label table, has 0.3 MB
_TEXT_PART = "text_config"
_LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern")  # a kind for each layer
_FLOAT_TAG, _FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")  # which JSON does not have

PADDING_TOKENS = 512  # families pad their vocabularies differently, Qwen2.5 by up to 400

# Names a number goes by in the families, the standard one first, and the range that is accepted.
# The upper ends are a few times the largest published models; they bound what a hostile file can
# make us allocate.
_NUMBERS: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    "num_layers": (("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1, 1000),
    "hidden_size": (("hidden_size", "n_embd", "d_model"), 1, 2**17),
    "num_heads": (("num_attention_heads", "n_head", "n_heads"), 1, 2**12),
    "num_kv_heads": (("num_key_value_heads", "num_kv_heads"), 1, 2**12),
    "head_dim": (("head_dim",), 1, 4096),
    "vocab_size": (("vocab_size",), 1, 2**22),
    "max_positions": (("max_position_embeddings", "n_positions", "max_seq_len"), 1, 2**28),
    "original_positions": (("original_max_position_embeddings",), 1, 2**28),
    "intermediate_size": (("intermediate_size", "n_inner", "ffn_dim"), 1, 2**20),
    "moe_intermediate_size": (("moe_intermediate_size",), 1, 2**20),
    "experts_per_token": (
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_k",  # Ernie 4.5
            "moe_topk",  # Hunyuan, Aria
            "moe_top_k",
            "top_k_experts",  # Gemma 4
        ),
        0,
        2**12,
    ),
    "experts": (
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        0,
        2**12,
    ),
    "sliding_window": (("sliding_window",), 0, 2**28),  # 0 is how Qwen2-MoE writes none
}
# Some files list them by layer, Hunyuan's do.
_BY_LAYER = ("experts", "experts_per_token", "moe_intermediate_size")
_ROPE_KEYS = ("rope_theta", "factor", "rope_local_base_freq", "original_max_position_embeddings")
_ROPE_LIMIT = 1e12
# Kinds of rotary scaling whose factor a file may add to a max_position_embeddings left as it was;
# of llama3 it is part of that number already.
_STRETCHED = ("yarn", "linear", "dynamic", "longrope", "su")
_DTYPES = ("bfloat16", "float16", "float32")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPE_NAMES = {"half": "float16", "float": "float32"}  # as torch has them
# Of a model made of several networks: what counts for its text model, too.
_TIE = "tie_word_embeddings"
_OF_THE_WHOLE = (_TIE, *_DTYPE_KEYS, *KEYS)
# Never passed on, at any depth: what asks for code of the folder or for an implementation, and
# leftovers of a saved config that transformers acts on.
_DROPPED = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "_attn_implementation_internal",
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "experts_implementation",
    "_commit_hash",
    "_name_or_path",
    "name_or_path",
)


class QuantisedError(CheckpointError):
    """The weights are of a kind that is not read.

    Attributes:
        original: the model with 16-bit weights, as far as the file tells.
    """

    def __init__(self, message: str, original: "ModelConfig | None" = None) -> None:
        super().__init__(message)
        self.original = original


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the rest of the package needs to know of a decoder-only network.

    Attributes:
        model_type: family, as transformers names it.
        num_layers: decoder layers.
        hidden_size: width of the hidden state.
        num_heads: query heads.
        num_kv_heads: key-value heads; divides `num_heads`.
        head_dim: size of a head.
        vocab_size: token ids are below it.
        max_positions: longest sequence the model was made for.
        tie_word_embeddings: whether the head is the embedding; None when neither the file nor the
            family says.
        intermediate_size: widest MLP; sizes the workspace.
        dtype: `bfloat16`, `float16`, `float32`, or None when the file does not say.
        sliding_window: window of the layers that have one, or None.
        experts: of a layer, the most; 0 in a dense model.
        experts_per_token: of these, how many a token is sent to, the most; 0 where nothing says.
        raw: what the family's class is built from: the file's object (or its part about the text
            model), read-only, without what makes transformers run or pick code.
        defaults: what the family's class sets where `raw` says nothing.
        positions_note: where `max_positions` comes from if not from the file's own number, else "".
        part_of: the family whose text part this is, as of a vision-language model, or None.
        whole: what the class of that family is built from.
        quantised: what is stated of quantised weights, if there are.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tie_word_embeddings: bool | None
    intermediate_size: int
    dtype: str | None
    sliding_window: int | None
    experts: int = 0
    experts_per_token: int = 0
    raw: Mapping[str, object] = field(repr=False)
    defaults: Mapping[str, object] = field(default_factory=dict, repr=False, compare=False)
    positions_note: str = ""
    part_of: str | None = None
    whole: Mapping[str, object] | None = field(default=None, repr=False, compare=False)
    quantised: Method | None = None

    def setting(self, name: str) -> object:
        """A value of the family's class: the file's, else the class's default, else None."""
        return self.raw[name] if name in self.raw else self.defaults.get(name)

    @property
    def longest(self) -> str:
        """The longest sequence in words, with what it comes from if the file has no such number."""
        note = f" ({self.positions_note})" if self.positions_note else ""
        return f"{self.max_positions}{note}"

    @property
    def writes_out_scores(self) -> bool:
        """Whether attention has a soft cap or sinks, which fused kernels do not know."""
        capped = self.setting("attn_logit_softcapping") is not None
        return capped or self.model_type == "gpt_oss"

    @property
    def has_experts(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return self.experts > 0


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a model folder.

    Raises:
        QuantisedError: the weights are of a kind that is not read.
        CheckpointError: missing, malformed, a number out of range, or a kind of model that is not
            supported.
    """
    path = folder / _CONFIG_NAME
    raw = _with_floats(read_json_object(folder, _CONFIG_NAME, _CONFIG_LIMIT_BYTES, lenient=True))
    reader, whole = _text_part(_reader_of(path, raw))
    kind = find_kind(folder, reader.raw)
    if kind is None:
        return _model_config(reader, whole)
    method = read_method(str(kind), kind.stated)
    if isinstance(method, Method):
        for note in method.notes:
            _log.warning("%s: %s", shown(folder.name), note)
        return replace(_model_config(reader, whole), quantised=method)
    try:
        original = _model_config(reader, whole)
    except CheckpointError:
        original = None  # what is wrong with it matters less
    raise QuantisedError(
        f"{folder}: its weights are quantised ({kind}, says {kind.said}){weights_note(folder)}: "
        f"{method}; {READ}, {kind.instead}",
        original,
    )


def _model_config(reader: "_Reader", whole: "_Reader | None") -> ModelConfig:
    _check_nested_numbers(reader)
    hidden_size = reader.number("hidden_size")
    num_heads = reader.number("num_heads")
    num_kv_heads = reader.number("num_kv_heads", num_heads)
    if num_heads % num_kv_heads:
        raise reader.error(
            f"num_attention_heads is {num_heads}, which num_key_value_heads {num_kv_heads} "
            "does not divide"
        )
    num_layers = reader.number("num_layers", _listed_layers(reader))
    _check_layers(reader, num_layers)
    max_positions, note = _longest(reader, reader.number("max_positions"))
    return ModelConfig(
        model_type=reader.model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(reader, hidden_size, num_heads),
        vocab_size=reader.number("vocab_size"),
        max_positions=max_positions,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        intermediate_size=_intermediate_size(reader, hidden_size),
        dtype=_dtype(reader),
        sliding_window=_sliding_window(reader),
        experts=reader.optional_number("experts") or 0,
        experts_per_token=reader.optional_number("experts_per_token") or 0,
        raw=MappingProxyType(_plain(reader.raw)),
        defaults=reader.family.defaults,
        positions_note=note,
        part_of=None if whole is None else whole.model_type,
        whole=None if whole is None else MappingProxyType(_plain(whole.raw)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """The parsed file, with the checks that name key, value and accepted range."""

    path: Path
    model_type: str
    family: ConfigClass
    raw: dict[str, object]

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def number(self, what: str, default: int | None = None) -> int:
        value = self.optional_number(what)
        if value is not None:
            return value
        if default is None:
            names, low, high = _NUMBERS[what]
            raise self.error(
                f"{names[0]} is missing, expected is a whole number from {low} to {high}"
            )
        return default

    def optional_number(self, what: str) -> int | None:
        """The number that the family's class would have, or None."""
        _, low, high = _NUMBERS[what]
        # What the file says, under any name, counts before the default of another name.
        for name in sorted(self._names(what), key=lambda name: name not in self.raw):
            value = self.stated(name)
            if value is None:
                continue
            if what in _BY_LAYER and isinstance(value, list) and self._one_a_layer(value):
                value = max(value)
            if type(value) is not int or not low <= value <= high:
                raise self.error(
                    f"{name} is {shown(value)}, accepted is a whole number from {low} to {high}"
                )
            return value
        return None

    def _one_a_layer(self, values: list[object]) -> TypeGuard[list[int]]:
        whole = all(type(value) is int for value in values)
        return whole and len(values) == self.optional_number("num_layers")

    def flag(self, name: str) -> bool | None:
        value = self.stated(name)
        if value is None or isinstance(value, bool):
            return value
        raise self.error(f"{name} is {shown(value)}, accepted is true or false")

    def stated(self, name: str) -> object:
        """The file's value, else the default of the class; null only where the class takes it."""
        default = self.family.defaults.get(name)
        if name in self.raw and self.raw[name] is None and name in self.family.never_null:
            raise self.error(f"{name} is null: leave it out for {self.model_type}'s {default!r}")
        return self.raw.get(name, default)

    def _names(self, what: str) -> list[str]:
        """What the class calls a number, by what counts first; all names if it has none of them."""
        names, _, _ = _NUMBERS[what]
        known = [name for name in names if self.family.has(name)]
        if not known:  # many classes read head_dim where a file has it, none key-value heads
            return [] if what == "num_kv_heads" and self.family.defaults else [*names]
        return list(dict.fromkeys(n for name in known for n in self.family.names(name)))


def _reader_of(path: Path, raw: dict[str, object]) -> _Reader:
    """A reader by the rules of the family that the object names.

    Raises:
        CheckpointError: it names none, or one that transformers lacks.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"{path}: model_type is {shown(model_type)}, expected the name of a family"
        )
    family = find_config_class(model_type)
    if family is None:
        own = ", and the folder's own code (auto_map) is never run" if raw.get("auto_map") else ""
        raise CheckpointError(
            f"{path}: the installed transformers has no family {shown(model_type)}{own}: a newer "
            "version may have it (pip install -U transformers), or use another model"
        )
    if raw.get("auto_map"):
        _log.info("%s: auto_map is not used, transformers has %s itself", path, shown(model_type))
    return _Reader(path=path, model_type=model_type, family=family, raw=_drop_code(raw))


def _text_part(reader: _Reader) -> tuple[_Reader, _Reader | None]:
    """The reader of the text model, and that of the whole it is a part of, if it is one.

    The number formats, ties and quantisation of the whole count for its part too.

    Raises:
        CheckpointError: another kind of network than one that writes text.
    """
    family = reader.model_type
    if reader.flag("is_encoder_decoder"):
        raise reader.error(
            f"{shown(family)} is an encoder-decoder model, only decoder-only models are supported"
        )
    nested = [
        key
        for key, value in reader.raw.items()
        if isinstance(value, dict) and (value.get("model_type") or key.endswith(_TEXT_PART))
    ]
    if not nested:
        return reader, None
    text = reader.raw.get(_TEXT_PART)
    if text is None:  # older files have its values beside those of the other parts
        text = {key: value for key, value in reader.raw.items() if key not in nested}
        text["model_type"] = text_type_of(family)
    known = reads_more_than_text(family) or generates_text(family)
    if not (isinstance(text, dict) and known and reader.family.has(_TEXT_PART)):
        raise reader.error(
            f"{shown(family)} is made of several networks ({', '.join(map(shown, nested))}), and "
            "transformers has no class that takes its text model: use the text-only version of "
            "this model"
        )
    whole = {k: v for k, v in reader.raw.items() if k in _OF_THE_WHOLE and v is not None}
    if any(key in whole for key in _DTYPE_KEYS):
        text = {key: value for key, value in text.items() if key not in _DTYPE_KEYS}
    tied = True if text.get(_TIE) is True else reader.stated(_TIE)  # some save it in the part only
    whole |= {"model_type": text.get("model_type") or text_type_of(family)}
    whole |= {} if tied is None else {_TIE: tied}
    part = _reader_of(reader.path, {**text, **whole})
    folder = shown(reader.path.parent.name)
    _log.warning("%s: only the text part of a %s model is used", folder, shown(family))
    return part, reader


def _head_dim(reader: _Reader, hidden_size: int, num_heads: int) -> int:
    stated = reader.optional_number("head_dim")
    if stated is not None:
        return stated
    if hidden_size % num_heads:
        raise reader.error(
            f"hidden_size is {hidden_size}, which num_attention_heads {num_heads} does not divide, "
            "and head_dim is missing"
        )
    return hidden_size // num_heads


def _intermediate_size(reader: _Reader, hidden_size: int) -> int:
    """Widest MLP a token goes through: the dense one, or all experts it is sent to."""
    dense = reader.optional_number("intermediate_size")
    expert = reader.optional_number("moe_intermediate_size")
    if expert is None:
        return 4 * hidden_size if dense is None else dense  # GPT-2 leaves it out and means 4
    experts_per_token = reader.optional_number("experts_per_token") or 1
    return max(dense or 0, experts_per_token * expert)


def _sliding_window(reader: _Reader) -> int | None:
    if reader.flag("use_sliding_window") is False:  # some save 0 then
        return None
    return reader.optional_number("sliding_window") or None


def _dtype(reader: _Reader) -> str | None:
    """The format of the weights; the first key that names one counts."""
    for key in _DTYPE_KEYS:
        value = reader.raw.get(key)
        name = _dtype_name(value)
        if name in _DTYPES:
            return name
        if name is not None:
            raise reader.error(f"{key} is {shown(value)}, accepted is {', '.join(_DTYPES)}, auto")
    return None


def _dtype_name(value: object) -> str | None:
    """Torch's name of a number format, without `torch.`; None where the file's tensors decide."""
    if not isinstance(value, str):
        return None if value is None else str(value)
    name = value.removeprefix("torch.")
    return None if name == "auto" else _DTYPE_NAMES.get(name, name)


def _plain(raw: Mapping[str, object]) -> dict[str, object]:
    """The object with its number formats as transformers spells them, left out for `auto`."""
    spelled = {
        k: _dtype_name(v) if k in _DTYPE_KEYS and v is not None else v for k, v in raw.items()
    }
    return {
        k: v
        for k, v in spelled.items()
        if (v is not None or raw[k] is None) and k not in KEYS  # transformers acts on those
    }


def _longest(reader: _Reader, stated: int) -> tuple[int, str]:
    """Longest sequence with rotary scaling, and a note of how it came about.

    A file that scales may leave max_position_embeddings as it was trained (the recipe of Qwen's
    model cards) or have the product there (DeepSeek, Llama 3.1): the larger of the two counts.
    """
    rope = reader.raw.get("rope_scaling") or reader.raw.get("rope_parameters")
    # Some families have an object for each kind of layer.
    parts = [part for part in (rope, *_values(rope)) if isinstance(part, dict)]
    longest, note = stated, ""
    for part in parts:
        kind, factor = part.get("rope_type", part.get("type")), part.get("factor")
        if kind not in _STRETCHED or not isinstance(factor, int | float):
            continue
        if kind == "linear" and reader.model_type.startswith("gemma3"):
            continue  # there the class's own number has the factor in it
        original = part.get("original_max_position_embeddings")
        if reader.family.has("original_max_position_embeddings") or original is None:
            original = reader.optional_number("original_positions") or stated
        if not isinstance(original, int):
            raise reader.error(
                f"original_max_position_embeddings is {shown(original)}, accepted is a whole number"
            )
        _, _, high = _NUMBERS["max_positions"]
        if factor * original > high:
            raise reader.error(f"rope factor {factor:g} x {original} positions is above {high}")
        if factor * original > longest:
            longest, note = int(factor * original), f"{kind} factor {factor:g} x {original}"
    return longest, note


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else []


def _check_nested_numbers(reader: _Reader) -> None:
    """Numbers nobody here uses, but which transformers computes or allocates with."""
    sent, experts = map(reader.optional_number, ("experts_per_token", "experts"))
    if experts and sent is not None and sent > experts:
        raise reader.error(
            f"a token is sent to {sent} experts of a layer, which has {experts} experts: files "
            "and config are not of one model"
        )
    for key, value in chain.from_iterable(one.items() for one in _objects(reader.raw)):
        if key not in _ROPE_KEYS or value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value <= _ROPE_LIMIT):  # type: ignore[operator]
            raise reader.error(
                f"{key} is {shown(value)}, accepted is a number above 0, up to {_ROPE_LIMIT:.0e}"
            )


def _listed_layers(reader: _Reader) -> int | None:
    """The number of layers of a file that lists their kinds instead."""
    stated = (reader.raw.get(name) for name in _LAYER_LISTS)
    found = next((len(kinds) for kinds in stated if isinstance(kinds, list | str)), None)
    _, low, high = _NUMBERS["num_layers"]
    if found is not None and not low <= found <= high:
        raise reader.error(f"it lists {found} layers, accepted are {low} to {high}")
    return found


def _check_layers(reader: _Reader, num_layers: int) -> None:
    kinds = reader.raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != num_layers:
        raise reader.error(
            f"layer_types lists {len(kinds)} layers, num_hidden_layers is {num_layers}"
        )
    if reader.raw.get("per_layer_config"):
        raise reader.error("per_layer_config gives layers sizes of their own: not supported")


def _with_floats(root: dict[str, object]) -> dict[str, object]:
    """The object, just parsed, with the numbers that transformers writes as objects."""
    waiting: list[Any] = [root]
    while waiting:
        place = waiting.pop()
        for key, value in list(place.items() if isinstance(place, dict) else enumerate(place)):
            tagged = value.get(_FLOAT_TAG) if isinstance(value, dict) and len(value) == 1 else None
            if isinstance(tagged, str) and tagged in _FLOATS:
                place[key] = float(tagged)
            elif isinstance(value, dict | list):
                waiting.append(value)
    return root


def _drop_code(root: dict[str, object]) -> dict[str, object]:
    """The object, just parsed, without what asks for code, at any depth."""
    for value in _objects(root):
        for key in _DROPPED:
            value.pop(key, None)
    return root


def _objects(root: object) -> Iterator[dict[str, object]]:
    """Every object, at any depth; a loop, so that depth cannot exhaust the stack."""
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
