"""Read a model's `config.json` as untrusted input: numbers in range, nothing that asks for code."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from offload_rt.errors import CheckpointError
from offload_rt.model.files import read_json_object, shown

_CONFIG_NAME = "config.json"
_CONFIG_LIMIT_BYTES = 4 * 2**20  # the largest seen, with a label table, has 0.3 MB

# Names a number goes by in the families, and the range that is accepted. The upper ends are a few
# times the largest published models; they bound what a hostile file can make us allocate.
_NUMBERS: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    "num_layers": (("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1, 1000),
    "hidden_size": (("hidden_size", "n_embd", "d_model"), 1, 2**17),
    "num_heads": (("num_attention_heads", "n_head", "n_heads"), 1, 2**12),
    "num_kv_heads": (("num_key_value_heads", "num_kv_heads"), 1, 2**12),
    "head_dim": (("head_dim",), 1, 4096),
    "vocab_size": (("vocab_size",), 1, 2**22),
    "max_positions": (("max_position_embeddings", "n_positions"), 1, 2**28),
    "intermediate_size": (("intermediate_size", "n_inner", "ffn_dim"), 1, 2**20),
    "moe_intermediate_size": (("moe_intermediate_size",), 1, 2**20),
    "experts_per_token": (("num_experts_per_tok", "num_experts_per_token"), 0, 2**12),
    "experts": (("num_experts", "num_local_experts", "n_routed_experts"), 0, 2**12),
    "sliding_window": (("sliding_window",), 1, 2**28),
}
_ROPE_KEYS = ("rope_theta", "factor", "rope_local_base_freq")
_ROPE_LIMIT = 1e12
_DTYPES = ("bfloat16", "float16", "float32")
_CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")
# harmless leftovers of a saved config, but transformers acts on them
_DROPPED = (
    *_CODE_KEYS,
    "custom_pipelines",
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "experts_implementation",
    "_commit_hash",
    "_name_or_path",
    "name_or_path",
)


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
        tie_word_embeddings: whether the head is the embedding; None when the file does not say.
        intermediate_size: widest MLP; sizes the workspace.
        dtype: `bfloat16`, `float16`, `float32`, or None when the file does not say.
        sliding_window: window of the layers that have one, or None.
        raw: the file's object, read-only, without what makes transformers run or pick code.
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
    raw: Mapping[str, object] = field(repr=False)

    @property
    def writes_out_scores(self) -> bool:
        """Whether attention has a soft cap or sinks, which fused kernels do not know."""
        capped = self.raw.get("attn_logit_softcapping") is not None
        return capped or self.model_type == "gpt_oss"

    @property
    def has_experts(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return any(isinstance(self.raw.get(name), int) for name in _NUMBERS["experts"][0])


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a model folder.

    Raises:
        CheckpointError: missing, malformed, a number out of range, or a kind of model that is not
            supported.
    """
    reader = _Reader(
        path=folder / _CONFIG_NAME,
        raw=read_json_object(folder, _CONFIG_NAME, _CONFIG_LIMIT_BYTES),
    )
    model_type = reader.raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise reader.error(f"model_type is {shown(model_type)}, expected the name of a family")
    _refuse_code(reader, model_type)
    _refuse_kinds(reader, model_type)
    _check_nested_numbers(reader)
    hidden_size = reader.number("hidden_size")
    num_heads = reader.number("num_heads")
    num_kv_heads = reader.number("num_kv_heads", num_heads)
    if num_heads % num_kv_heads:
        raise reader.error(
            f"num_attention_heads is {num_heads}, which num_key_value_heads {num_kv_heads} "
            "does not divide"
        )
    num_layers = reader.number("num_layers")
    _check_layer_types(reader, num_layers)
    return ModelConfig(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(reader, hidden_size, num_heads),
        vocab_size=reader.number("vocab_size"),
        max_positions=reader.number("max_positions"),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        intermediate_size=_intermediate_size(reader, hidden_size),
        dtype=_dtype(reader),
        sliding_window=_sliding_window(reader),
        raw=MappingProxyType({k: v for k, v in reader.raw.items() if k not in _DROPPED}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """The parsed file, with the checks that name key, value and accepted range."""

    path: Path
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
        names, low, high = _NUMBERS[what]
        given = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
        for name, value in given.items():
            if type(value) is not int or not low <= value <= high:
                raise self.error(
                    f"{name} is {shown(value)}, accepted is a whole number from {low} to {high}"
                )
        if len(set(given.values())) > 1:
            both = ", ".join(f"{name} {value}" for name, value in given.items())
            raise self.error(f"names for one number disagree ({both}): keep the right one")
        return next((value for value in given.values() if type(value) is int), None)

    def flag(self, name: str) -> bool | None:
        value = self.raw.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise self.error(f"{name} is {shown(value)}, accepted is true or false")


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
    window = reader.optional_number("sliding_window")
    return None if reader.flag("use_sliding_window") is False else window


def _dtype(reader: _Reader) -> str | None:
    stated = {key: reader.raw.get(key) for key in ("dtype", "torch_dtype")}
    for key, value in stated.items():
        if value is not None and value not in _DTYPES:
            raise reader.error(f"{key} is {shown(value)}, accepted is {', '.join(_DTYPES)}")
    value = stated["dtype"] or stated["torch_dtype"]
    return value if isinstance(value, str) else None


def _refuse_code(reader: _Reader, model_type: str) -> None:
    for key, value in _walk(reader.raw):
        if key not in _CODE_KEYS or value is None or value is False or value == {}:
            continue
        if key == "auto_map":
            raise reader.error(
                "auto_map says that the model needs its own Python code, which is never run: if "
                f"transformers itself has {shown(model_type)}, delete auto_map from the file"
            )
        raise reader.error(
            f"{key} is {shown(value)}, which asks for code from outside to be run: it never is, "
            "use another copy of this model"
        )


def _refuse_kinds(reader: _Reader, model_type: str) -> None:
    for key in ("quantization_config", "compression_config"):
        stated = reader.raw.get(key)
        if stated is None:
            continue
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        raise reader.error(
            f"{key} says the weights are quantized (method {shown(method)}): this version streams "
            "bfloat16, float16 and float32 weights only, use the original model"
        )
    if reader.flag("is_encoder_decoder"):
        raise reader.error(
            f"{shown(model_type)} is an encoder-decoder model, only decoder-only models are "
            "supported"
        )
    for key, value in reader.raw.items():
        nested = isinstance(value, dict) and ("model_type" in value or key.endswith("text_config"))
        if nested:
            raise reader.error(
                f"{shown(model_type)} is made of several networks ({shown(key)}), only plain text "
                "models are supported: use the text-only version of this model"
            )


def _check_nested_numbers(reader: _Reader) -> None:
    """Numbers nobody here uses, but which transformers computes or allocates with."""
    reader.optional_number("experts")
    for key, value in _walk(reader.raw):
        if key not in _ROPE_KEYS or value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value <= _ROPE_LIMIT):  # type: ignore[operator]
            raise reader.error(
                f"{key} is {shown(value)}, accepted is a number above 0, up to {_ROPE_LIMIT:.0e}"
            )


def _check_layer_types(reader: _Reader, num_layers: int) -> None:
    kinds = reader.raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != num_layers:
        raise reader.error(
            f"layer_types lists {len(kinds)} layers, num_hidden_layers is {num_layers}"
        )


def _walk(root: object) -> Iterator[tuple[str, object]]:
    """Every key with its value, at any depth; a loop, so that depth cannot exhaust the stack."""
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
