"""Which modules of a network keep a recurrent state, found out by a pass over shapes.

The pass runs over several tokens, from states that were given to it. One module of a layer must ask
for its state, by the calls we know, and every state it is given must bear on what it computes: some
families' forms for many tokens overlook a state, as they are written for prompts alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from offload_rt.errors import CheckpointError
from offload_rt.kv.states import LayerState
from offload_rt.model.attention_function import PassContext
from offload_rt.model.mixing import Mixer, PassStates
from offload_rt.model.probe_flow import Flow

_ROWS = "hidden_states"  # by which keyword a module is given its rows


class AskedStates(PassStates):
    """Notes the states that layers give to their cache, and refuses calls we do not know.

    Attributes:
        made: the state behind the tokens, by layer.
    """

    def __init__(self, context: PassContext) -> None:
        super().__init__(context)
        self.made: dict[int, LayerState] = {}

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CheckpointError(f"their layers ask their cache for {name}, which is not known here")

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **options: object,
    ) -> torch.Tensor:
        """Note what is kept of [B, C, S]."""
        given = super().update_conv_state(conv_states, layer_idx, state_idx, conv_kernel_size)
        self._note(layer_idx).conv[state_idx] = self._conv[state_idx]  # type: ignore[index]
        return given

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: object
    ) -> torch.Tensor:
        """Note the state."""
        self._note(layer_idx).recurrent[state_idx] = recurrent_states  # type: ignore[index]
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx)

    def _note(self, layer: int) -> LayerState:
        return self.made.setdefault(layer, LayerState({}, {}))


class _Given(AskedStates):
    """Gives states of its own to the layers, and sees who asks and what they are used for.

    Attributes:
        before: the state before the tokens, by layer.
        callers: modules that asked, by layer, with the options they were called with.
    """

    def __init__(self, context: PassContext, made: Mapping[int, LayerState]) -> None:
        super().__init__(context)
        self.before = {
            layer: LayerState(
                {i: torch.empty_like(t) for i, t in state.conv.items()},
                {i: torch.empty_like(t) for i, t in state.recurrent.items()},
            )
            for layer, state in made.items()
        }
        self.stack: list[tuple[torch.nn.Module, dict[str, object]]] = []
        self.callers: dict[int, dict[torch.nn.Module, dict[str, object]]] = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state of a convolution."""
        self._ask(layer_idx)
        return self._of(layer_idx).conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The recurrent state."""
        self._ask(layer_idx)
        return self._of(layer_idx).recurrent.get(state_idx)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """There is one in each layer that has one."""
        return layer_idx is None or layer_idx in self.before

    def _of(self, layer: int) -> LayerState:
        return self.before.get(layer, LayerState())

    def _ask(self, layer: int) -> None:
        module, options = self.stack[-1]
        self.callers.setdefault(layer, {})[module] = options


Source = tuple[int, str, int]  # a state: layer, kind and number


def probe_mixers(
    model: torch.nn.Module,
    context: PassContext,
    made: Mapping[int, LayerState],
    run: Callable[[PassStates], object],
) -> tuple[Mixer, ...]:
    """What has a state, after a pass over several tokens from given ones.

    Args:
        model: on meta.
        context: of the pass.
        made: the states that a pass has left, by layer.
        run: makes the pass.

    Raises:
        CheckpointError: a layer has several such modules, or one is given more than rows, or
            overlooks a state it is given.
    """
    states, flow = _Given(context, made), Flow()
    results: dict[torch.nn.Module, object] = {}

    def enter(module: torch.nn.Module, args: tuple[object, ...], options: dict[str, Any]) -> None:
        states.stack.append((module, {_ROWS: args[0], **options} if args else options))

    def leave(module: torch.nn.Module, _: object, result: object) -> None:
        states.stack.pop()
        results[module] = result

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        sources = {layer: _marked(flow, layer, state) for layer, state in states.before.items()}
        with flow:
            run(states)
    finally:
        for handle in handles:
            handle.remove()
    paths = {module: name for name, module in model.named_modules()}
    mixers = []
    for layer, state in sorted(states.before.items()):
        callers = states.callers.get(layer, {})
        if len(callers) != 1:
            raise CheckpointError(f"{len(callers)} modules of layer {layer} ask for its state")
        ((module, options),) = callers.items()
        _check_result(layer, results[module], flow, sources[layer])
        mixers.append(_mixer(layer, paths[module], options, state))
    return tuple(mixers)


def _marked(flow: Flow, layer: int, state: LayerState) -> set[Source]:
    """Follow the tensors of a state."""
    sources = set()
    for kind, tensors in (("convolution", state.conv), ("recurrence", state.recurrent)):
        for index, tensor in tensors.items():
            flow.mark(tensor, (layer, kind, index))
            sources.add((layer, kind, index))
    return sources


def _check_result(layer: int, result: object, flow: Flow, sources: set[Source]) -> None:
    """See that what a module made of rows depends on all of its state."""
    if not isinstance(result, torch.Tensor):
        raise CheckpointError("their layers with a state return more than rows")
    for _, kind, _ in sorted(sources - flow.of(result)):
        raise CheckpointError(
            f"with several tokens at once layer {layer} ignores the state before them, that of "
            f"its {kind}"
        )


def _mixer(layer: int, path: str, options: dict[str, object], state: LayerState) -> Mixer:
    """What a module is that was called with these options."""
    keyword = next(key for key, value in options.items() if isinstance(value, PassStates))
    hidden = options.get(_ROWS)
    tensors = sorted(k for k, v in options.items() if isinstance(v, torch.Tensor) and k != _ROWS)
    if tensors or not isinstance(hidden, torch.Tensor):
        what = ", ".join(tensors) or "no hidden states"
        raise CheckpointError(f"their layers with a state are given {what}")
    parts = [*state.conv.values(), *state.recurrent.values()]
    return Mixer(
        layer=layer,
        path=path,
        keyword=keyword,
        state_bytes=sum(part.nbytes for part in parts),
        hidden_bytes=hidden.shape[-1] * hidden.dtype.itemsize,
    )
