"""What each layer keeps of a sequence, from `config.json` alone: keys and values, a state, neither.

By the names that the families' classes give to their sizes. The network finds out what its layers
keep in fact (`model/probe.py`), and a run whose plan has counted less is refused. No torch here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from offload_rt.errors import CheckpointError
from offload_rt.model.config import ModelConfig
from offload_rt.model.files import shown

_STATE_BYTES = 4  # recurrent states are in fp32 whatever the model's format
_MOST = 2**20
_STATES = frozenset({"linear_attention", "mamba", "conv", "recurrent", "M", "hybrid"})
_NEITHER = frozenset({"moe", "mlp", "E", "-"})
_LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
_SPARSE_LISTS = ("attn_layer_indices", "full_attn_idxs")  # of the layers that attend
_EVERY = 4  # one layer of so many attends, where the file does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one layer keeps.

    Attributes:
        kv_numbers: of keys and values, for a token.
        conv_numbers: of a convolution's newest inputs, for a sequence.
        state_numbers: of its recurrent state, for a sequence.
    """

    kv_numbers: int = 0
    conv_numbers: int = 0
    state_numbers: int = 0

    def state_bytes(self, number_bytes: int) -> int:
        """Bytes of its state in a model of that number format."""
        return self.conv_numbers * number_bytes + self.state_numbers * _STATE_BYTES


def layers_keep(config: ModelConfig) -> tuple[Kept, ...]:
    """What each layer keeps of a sequence.

    Raises:
        CheckpointError: a size is no number that could be one.
    """
    return _layers_keep(_Hashable(config))


def keeps_states(config: ModelConfig) -> bool:
    """Whether some layers have a recurrent state."""
    return any(kept.conv_numbers for kept in layers_keep(config))


class _Hashable:
    """A configuration as a key: one is equal to itself only."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.config is other.config


@lru_cache(maxsize=16)  # a search asks for the same ones hundreds of times
def _layers_keep(key: _Hashable) -> tuple[Kept, ...]:
    config = key.config
    rows = _kv_numbers(config)
    conv, state = _state_numbers(config)
    if not conv:
        return (Kept(kv_numbers=rows),) * config.num_layers
    kinds = _kinds(config)
    return tuple(
        Kept(
            kv_numbers=0 if kind in (_STATES - {"hybrid"}) | _NEITHER else rows,
            conv_numbers=conv if kind in _STATES else 0,
            state_numbers=state if kind in _STATES else 0,
        )
        for kind in kinds
    )


def _kv_numbers(config: ModelConfig) -> int:
    """Keys and values of a token in a layer that attends."""
    if config.setting("kv_lora_rank") is None:
        return 2 * config.num_kv_heads * config.head_dim
    sizes = [_number(config, n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    return config.num_heads * sum(sizes)


def _state_numbers(config: ModelConfig) -> tuple[int, int]:
    """Numbers of a convolution's state and of a recurrent one; zeros where no layer has any."""

    def known(name: str) -> bool:
        return name in config.raw or name in config.defaults

    if known("conv_L_cache"):
        return config.hidden_size * _number(config, "conv_L_cache"), 0
    if known("linear_num_heads"):  # KDA
        stated = config.setting("linear_attn_config")
        given: Mapping[str, object] = stated if isinstance(stated, dict) else {}
        heads = _number(config, "linear_num_heads", given.get("num_heads"))
        dim = _number(config, "linear_head_dim", given.get("head_dim"))
        width = _number(config, "linear_conv_kernel_dim", given.get("short_conv_kernel_size"))
        return 3 * heads * dim * width, heads * dim * dim
    if known("linear_num_value_heads"):  # Gated DeltaNet
        keys = _number(config, "linear_num_key_heads", otherwise=config.num_heads)
        values = _number(config, "linear_num_value_heads", otherwise=config.num_heads)
        usual = int(0.75 * config.hidden_size / keys)
        key = _number(config, "linear_key_head_dim", otherwise=usual)
        value = _number(config, "linear_value_head_dim", otherwise=2 * key)
        width = _number(config, "linear_conv_kernel_dim")
        return (2 * keys * key + values * value) * width, values * key * value
    for names in (
        ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"),
        ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    ):
        if known(names[0]):
            return _mamba(config, *names)
    return 0, 0


def _mamba(
    config: ModelConfig, heads_name: str, dim_name: str, size_name: str, groups: str, width: str
) -> tuple[int, int]:
    """The same of Mamba-2."""
    heads = _number(config, heads_name)
    inner = config.setting("mamba_d_ssm")
    if inner is None:
        inner = _number(config, "mamba_expand", otherwise=2) * config.hidden_size
    else:
        inner = _number(config, "mamba_d_ssm")
    stated = config.setting(dim_name)
    dim = inner // heads if stated in (None, "auto") else _number(config, dim_name)
    size = _number(config, size_name)
    channels = heads * dim + 2 * _number(config, groups) * size
    return channels * _number(config, width), heads * dim * size


def _kinds(config: ModelConfig) -> Sequence[str]:
    """The kind of each layer, of a model of which some have states."""
    layers = config.num_layers
    for name in _LISTS:
        stated = config.setting(name)
        if isinstance(stated, list | str) and len(stated) == layers:
            return [str(kind) for kind in stated]
    stated = config.setting("linear_attn_config")
    if isinstance(stated, dict) and isinstance(stated.get("full_attn_layers"), list):
        attending = {at - 1 for at in stated["full_attn_layers"] if isinstance(at, int)}
    elif config.model_type == "falcon_h1":
        return ["hybrid"] * layers
    elif config.model_type == "lfm3":
        attending = {i for i in range(layers) if i % 4 == 2 or (i % 4 == 0 and i > 0)}
    elif config.model_type == "kimi_linear":
        attending = {i for i in range(layers) if i and i % _EVERY == 0}
    else:
        lists = [config.setting(name) for name in _SPARSE_LISTS]
        found = next((each for each in lists if isinstance(each, list)), None)
        every = config.setting("full_attention_interval") or _EVERY
        every = every if isinstance(every, int) and every > 0 else _EVERY
        attending = set(found or ()) if found is not None else {*range(every - 1, layers, every)}
    return ["full_attention" if i in attending else "linear_attention" for i in range(layers)]


def _number(
    config: ModelConfig, name: str, stated: object = None, otherwise: int | None = None
) -> int:
    """A size that the file or the family's class states.

    Args:
        config: the configuration.
        name: of the size.
        stated: what an older spelling says.
        otherwise: the size where nothing is said.

    Raises:
        CheckpointError: it is none.
    """
    value = config.setting(name) if stated is None else stated
    value = otherwise if value is None else value
    if type(value) is not int or not 0 < value <= _MOST:
        raise CheckpointError(
            f"config.json: {name} is {shown(value)}, accepted is a whole number from 1 to {_MOST}"
        )
    return value
