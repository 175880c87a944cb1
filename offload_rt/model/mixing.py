"""Layers with a recurrent state, called as transformers calls them.

Its mixers (Gated DeltaNet, KDA, Mamba-2, short convolutions) ask what is passed on as their cache
for the state before these tokens and give it the state behind them. Here that is `PassStates`. A
mixer's forward is called for each sequence of a pass, with pieces of the rows that
`kv/states.py` makes, and always with several tokens: so one token takes the same way as many.

What they compute is torch's: kernels of other packages (fla, causal_conv1d, mamba_ssm), which
transformers takes where they are installed, have other bits and are left out.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch

from offload_rt.kv.states import HybridKV, LayerState
from offload_rt.model.attention_function import CONTEXT_KEYWORD, PassContext

_log = logging.getLogger(__name__)

_CHOOSER = "transformers.integrations.hub_kernels"  # picks a kernel for a function
_CHUNK = "chunk_size"
STATES_KEYWORD = "past_key_values"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """A module that mixes tokens by a state.

    Attributes:
        layer: its layer.
        path: its name in the model.
        keyword: by which it is given its cache.
        state_bytes: of one sequence.
        hidden_bytes: of its input, a row.
    """

    layer: int
    path: str
    keyword: str
    state_bytes: int
    hidden_bytes: int


class PassStates:
    """What transformers' layers take for their cache in a pass; attention has its own."""

    def __init__(self, context: PassContext) -> None:
        self.context = context
        self._before: LayerState | None = None
        self._conv: dict[int, torch.Tensor] = {}
        self._recurrent: dict[int, torch.Tensor] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave keys and values to the attention function."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing: places are passed on."""
        return 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether there is a state before these tokens."""
        return self._before is not None

    def is_recording_past(self, layer_idx: int) -> bool:
        """Yes: one token is convolved as many are."""
        return True

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The newest inputs of a convolution before these tokens, [B, C, width]."""
        return None if self._before is None else self._before.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state before these tokens, [B, ...]."""
        return None if self._before is None else self._before.recurrent.get(state_idx)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Keep the newest of [B, C, S] inputs; returns them behind those before, [B, C, T].

        Before a text there are zeros, as many as a width: its first tokens then go the same way.
        """
        width = conv_kernel_size or conv_states.shape[-1]
        before = self.get_conv_state(layer_idx, state_idx)
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:-1], width)
        full = torch.cat([before, conv_states], dim=-1)
        self._conv[state_idx] = full[..., -width:].clone()
        return full

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: object
    ) -> torch.Tensor:
        """Keep the state behind these tokens."""
        self._recurrent[state_idx] = recurrent_states.clone()
        return recurrent_states

    def begin(self, before: LayerState | None) -> None:
        """Have the next call of a mixer continue from there."""
        self._before, self._conv, self._recurrent = before, {}, {}

    @property
    def after(self) -> LayerState:
        """The state behind the tokens of the newest call."""
        return LayerState(self._conv, self._recurrent)


class AnchoredMixer:
    """The forward of a mixer in a pass over several sequences."""

    def __init__(self, module: torch.nn.Module, mixer: Mixer) -> None:
        self._forward: Callable[..., torch.Tensor] = module.forward
        self._layer, self._keyword = mixer.layer, mixer.keyword

    def __call__(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:  # noqa: ANN401
        """[1, S, E] gives [1, S, E], each segment from its own state."""
        states: PassStates = options[self._keyword]
        options.pop(CONTEXT_KEYWORD, None)
        step = partial(self._step, states, options)
        parts = []
        for segment, rows, pending in states.context.segment_rows():
            cache, parents = segment.cache, segment.parents
            assert isinstance(cache, HybridKV)
            seen = None if parents is None else parents[: len(parents) - pending]
            parts.append(cache.states.mix(self._layer, hidden_states[0, rows], step, seen))
        return states.context.whole_tile(parts).unsqueeze(0)

    def _step(
        self,
        states: PassStates,
        options: dict[str, Any],
        rows: torch.Tensor,
        before: LayerState | None,
    ) -> tuple[torch.Tensor, LayerState]:
        states.begin(before)
        return self._forward(rows[None], **options)[0], states.after


def use_torch_forms(modules: Iterable[torch.nn.Module]) -> None:
    """Have the functions these modules compute with be torch's, and say what was left out.

    Args:
        modules: mixers; the functions are looked up where their classes are defined.
    """
    left_out: set[str] = set()
    for name in dict.fromkeys(type(module).__module__ for module in modules):
        place = vars(sys.modules[name])
        for key, function in list(place.items()):
            if getattr(function, "__module__", None) != name or not inspect.isfunction(function):
                continue
            chosen = _chosen(function)
            if chosen is None:
                continue
            plain = inspect.unwrap(function)
            if chosen is not plain:
                left_out.add(chosen.__module__.partition(".")[0])
            place[key] = _with_known_options(plain)
    if left_out:
        _log.warning(
            "kernels of %s are not used for layers with a state: torch's own are, whose numbers "
            "do not change with what is installed",
            ", ".join(sorted(left_out)),
        )


def _chosen(function: Any) -> Any:  # noqa: ANN401 - of transformers
    """What transformers would call in place of a function; None where it does not choose."""
    while function.__globals__["__name__"] != _CHOOSER:
        if not hasattr(function, "__wrapped__"):
            return None
        function = function.__wrapped__
    return inspect.getclosurevars(function).nonlocals.get("implementation")


def _with_known_options(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that overlooks options it does not have, as transformers calls it.

    Those that compute chunk by chunk pad their rows to a whole chunk, of 64 to 256: for fewer rows
    the chunk is as long as they are.
    """
    known = inspect.signature(plain).parameters
    usual = known[_CHUNK].default if _CHUNK in known else None

    @wraps(plain)
    def call(rows: torch.Tensor, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        options = {key: options[key] for key in options if key in known}
        if usual is not None:
            options[_CHUNK] = min(options.get(_CHUNK, usual), rows.shape[1])
        return plain(rows, *args, **options)

    del call.__wrapped__  # it is not one that chooses
    call.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    return call
