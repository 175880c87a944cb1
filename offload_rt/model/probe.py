"""Whether transformers' modules of a family can run with borrowed weights, found out by one pass.

The pass computes shapes only, on meta tensors. It must show that

- each decoder layer is called once with a hidden state,
- a layer that attends does so once through our function, with options we know, under a mask our
  caches apply,
- the output head heeds which rows are wanted,
- a layer reads nothing of the pass but its rows and what positions make of them (`probe_flow.py`).

Some layers may have a recurrent state instead, or besides, or neither: `probe_states.py`.
It also shows which modules have their experts computed by a function of ours.

No list of names decides.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from offload_rt.errors import CheckpointError
from offload_rt.kv.base import NO_KV, KVShape
from offload_rt.model.attention_function import CONTEXT_KEYWORD, MaskKind, PassContext, Segment
from offload_rt.model.config import ModelConfig
from offload_rt.model.exact import looks_of
from offload_rt.model.experts import PROBE_NAME, Calls
from offload_rt.model.fits import (
    Fit,
    as_entry,
    fit_key,
    fit_of,
    keep_fit,
    keep_looks,
    kept_fit,
    looks_in,
)
from offload_rt.model.hf_config import reason_of
from offload_rt.model.mixing import STATES_KEYWORD, Mixer, PassStates, use_torch_forms
from offload_rt.model.modelling import ALL_EXPERTS_FUNCTIONS, PreTrainedModel, masking_utils
from offload_rt.model.probe_flow import PLACES, TOKENS, Reads
from offload_rt.model.probe_states import AskedStates, probe_mixers
from offload_rt.model.sparing import apart, is_spared

PROBE_TOKENS = 3
_MASK_FUNCTION = re.compile(r"create_\w*mask\w*")
_CHOOSES_MASKS = "create_masks_for_generate"  # of them, by the kinds of a family's layers
_MASK_KINDS = {
    "create_causal_mask": MaskKind.CAUSAL,
    "create_sliding_window_causal_mask": MaskKind.SLIDING,
}
# For padded texts, of which there are none here: it is left out.
_RECURRENT_MASK = "create_recurrent_attention_mask"
_MASK_OPTIONS = frozenset(
    {"config", "inputs_embeds", "attention_mask", "past_key_values", "position_ids"}
)


_fit: dict[tuple[type, torch.dtype, str], Fit] = {}  # by class, dtype and config


class _Shapes:
    """Stands for a cache in the probe: notes the shapes it is given."""

    length, capacity = 0, PROBE_TOKENS

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: every pass is alike to this cache."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Note the shapes of key [K, S, D] and value [K, S, D]."""
        if layer in self.shapes:
            raise CheckpointError(f"layer {layer} attends more than once")
        shape = KVShape(heads=key.shape[0], key_dim=key.shape[2], value_dim=value.shape[2])
        self.shapes[layer] = shape

    def attend(
        self, layer: int, query: torch.Tensor, spec: object, tree: object = None
    ) -> torch.Tensor:
        """Return something of the right shape: query [H, S, D] gives [S, H, D_v]."""
        heads, rows, _ = query.shape
        return query.new_empty(rows, heads, self.shapes[layer].value_dim)

    def commit(self, keep: Sequence[int]) -> None:
        """Nothing to keep."""

    def truncate(self, length: int) -> None:
        """Nothing to forget."""


def probe(model: torch.nn.Module, layers: Sequence[torch.nn.Module], config: ModelConfig) -> Fit:
    """Run one pass over meta tensors and see whether the family can be streamed.

    Modules that were found to be fit are not run again in this process: a draft model, a second
    engine and each setting of a sweep are the same ones (18 ms of 33 that a small engine takes).
    Nor are they in later processes that are ours alone (`fits`).

    Raises:
        CheckpointError: it cannot, with the reason.
    """
    made: Any = model.config
    key = type(model), next(model.parameters()).dtype, made.to_json_string(use_diff=False)
    use_torch_forms(model.modules())
    if key not in _fit:
        kept_as = fit_key(config, key[1])
        keeps = is_spared() and key[0].__module__.startswith("transformers.")
        fit = kept_fit(kept_as) if keeps else None
        if fit is None or len(fit.kv) != len(layers):
            try:
                fit = _found_apart(model, layers, config) if keeps else _probed(model, layers)
            except CheckpointError as error:
                family = config.part_of or config.model_type
                raise CheckpointError(f"{family} models cannot be streamed: {error}") from error
            if keeps:
                keep_fit(kept_as, fit)
        _fit[key] = fit
    return _fit[key]


def _found_apart(
    model: torch.nn.Module, layers: Sequence[torch.nn.Module], config: ModelConfig
) -> Fit:
    """What the probe finds, in the fork that looks at what the modules compute too."""

    def find() -> dict[str, object]:
        fit = _probed(model, layers)
        run = partial(run_on_shapes, model)
        looks = None if fit.mixers else as_entry(looks_of(model, run, ()))
        return {"fit": asdict(fit), "looks": looks}

    found = apart(find)
    if found["looks"] is not None:
        keep_looks(model, config, looks_in(found["looks"]))
    return fit_of(found["fit"])


def run_on_shapes(model: torch.nn.Module) -> None:
    """A pass over shapes, for whoever watches what it computes."""
    _meta_pass(model, Calls(), PassStates(PassContext([Segment(_Shapes(), PROBE_TOKENS)])))


def _probed(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> Fit:
    cache, experts = _Shapes(), Calls()
    states = AskedStates(PassContext([Segment(cache, PROBE_TOKENS)], strict=True))
    reads, results = Reads(PROBE_TOKENS, len(layers)), list[object]()
    calls, handles = 0, []

    def enter(layer: int, args: tuple[object, ...], options: dict[str, object]) -> tuple[Any, Any]:
        nonlocal calls
        calls += 1
        return reads.enter(layer, _rows_given(args, options), options)

    def leave(result: object) -> None:
        reads.leave()
        results.append(result)

    for index, layer in enumerate(layers):
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, options, index=index: enter(index, args, options), with_kwargs=True
            ),
            layer.register_forward_hook(lambda *hooked: leave(hooked[2])),
        ]
    try:
        logits = _meta_pass(model, experts, states, reads)
    finally:
        for handle in handles:
            handle.remove()
    if calls != len(layers):
        raise CheckpointError(f"a pass runs {calls} decoder layers instead of {len(layers)}")
    if logits.shape[:2] != (1, 1):
        raise CheckpointError("their output head ignores which rows are wanted")
    attending = f"{len(cache.shapes)} of {len(layers)} layers use a KV cache"
    if not cache.shapes or (not states.made and len(cache.shapes) < len(layers)):
        raise CheckpointError(attending)
    mixers: tuple[Mixer, ...] = ()
    if states.made:
        given = PassContext([Segment(_Shapes(), PROBE_TOKENS)])
        mixers = probe_mixers(model, given, states.made, partial(_meta_pass, model, experts))
    names = {module: name for name, module in model.named_modules()}
    return Fit(
        tuple(cache.shapes.get(layer, NO_KV) for layer in range(len(layers))),
        {names[module]: count for module, count in experts.per_token.items()},
        mixers,
        _in_tuples(results),
        reads.apart,
    )


def _in_tuples(results: Sequence[object]) -> int:
    """The length of the tuples in which layers return their rows, and nothing else; 0: alone."""
    found = {len(result) if isinstance(result, tuple) else 0 for result in results}
    for result in results:
        rows, *more = result if isinstance(result, tuple) else (result,)
        if not isinstance(rows, torch.Tensor) or any(other is not None for other in more):
            raise CheckpointError("their decoder layers return more than rows")
    if len(found) > 1:
        raise CheckpointError("their decoder layers return their rows in several ways")
    return found.pop()


def _meta_pass(
    model: torch.nn.Module, calls: Calls, states: PassStates, reads: Reads | None = None
) -> torch.Tensor:
    """Run a pass of `PROBE_TOKENS` tokens that computes shapes only; returns [1, R, V]."""
    ids, places = (torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device="meta") for _ in range(2))
    wanted = torch.zeros(1, dtype=torch.int64, device="meta")
    if reads is not None:
        reads.mark(ids, TOKENS)
        reads.mark(places, PLACES)
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.to("meta")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    experts = config._experts_implementation
    if experts is not None:  # the default's kernel has no shape-only form for every number format
        ALL_EXPERTS_FUNCTIONS.register(PROBE_NAME, calls)
        model.set_experts_implementation(PROBE_NAME)  # type: ignore[operator]
    try:
        with torch.no_grad(), _marked_masks(model), reads or nullcontext():
            output = model(
                input_ids=ids,
                position_ids=places,
                use_cache=False,
                logits_to_keep=wanted,
                **{CONTEXT_KEYWORD: states.context, STATES_KEYWORD: states},
            )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"their forward pass does not run on shapes alone ({reason_of(error)})"
        ) from error
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)  # type: ignore[operator]
        for module, saved in buffers:
            module._buffers.update(saved)
    logits: torch.Tensor = output.logits
    return logits


@contextmanager
def _marked_masks(model: torch.nn.Module) -> Iterator[None]:
    """Have HF's mask functions tell which mask they would have made.

    With no mask function registered under our name they return None, and a window, chunk or
    direction that a family applies by its mask alone would be lost without a word.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    modules = {masking_utils, *(sys.modules[type(part).__module__] for part in parts)}
    table = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    places: list[dict[str, Any]] = [vars(module) for module in modules]
    saved = [
        (place, name, made)
        for place in places
        for name, made in place.items()
        if _MASK_FUNCTION.fullmatch(name) and name != _CHOOSES_MASKS
    ]
    patterns = dict(table)
    for place, name, _ in saved:
        place[name] = partial(_mark, name)
    table.update({pattern: _marked(made) for pattern, made in patterns.items()})
    try:
        yield
    finally:
        for place, name, made in saved:
            place[name] = made
        table.update(patterns)


def _marked(made: Any) -> Any:  # noqa: ANN401 - an entry of transformers' table
    """What replaces a mask function, one with options, or several by name."""
    if isinstance(made, dict):
        return {kind: _marked(each) for kind, each in made.items()}
    if isinstance(made, partial):
        return partial(_mark, made.func.__name__, **made.keywords)
    return partial(_mark, made.__name__)


def _mark(name: str, *args: object, **options: object) -> MaskKind | None:
    extra = sorted(k for k, v in options.items() if v is not None and k not in _MASK_OPTIONS)
    known = name in _MASK_KINDS or name == _RECURRENT_MASK
    if not known or args[6:] or extra:
        raise CheckpointError(f"they attend by {name}({', '.join(extra)})")
    return _MASK_KINDS.get(name)


def _rows_given(args: tuple[object, ...], options: Mapping[str, object]) -> torch.Tensor:
    """The hidden state that a layer is called with."""
    hidden = args[0] if len(args) == 1 else None
    if not isinstance(hidden, torch.Tensor) or hidden.shape[:2] != (1, PROBE_TOKENS):
        raise CheckpointError("their decoder layers are not called with a hidden state alone")
    if CONTEXT_KEYWORD not in options:
        raise CheckpointError("they do not pass keywords on to their decoder layers")
    return hidden
