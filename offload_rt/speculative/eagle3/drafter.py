"""An EAGLE-3 head drafts: its network, and what of the target's hidden states it is fed.

Row i is fed the embedding of token i + 1 and a hidden state that `fc` makes of those of token i in
some layers of the target; its logits are of token i + 2. In a draft it goes on from what left its
own layer, before the final norm. Attention, MLP and norms are transformers' own modules.
"""

from functools import partial
from typing import Any

import torch

from offload_rt.costs.sizes import RECORDED_ROWS
from offload_rt.device.base import Device
from offload_rt.errors import CheckpointError
from offload_rt.model.attention_function import ATTENTION_NAME
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.modules import build_modules
from offload_rt.model.network import Network
from offload_rt.runner.loading import load_drafting
from offload_rt.speculative.eagle3.checkpoint import HEAD, MIXING_BIAS, layers_read, tokens_of
from offload_rt.speculative.hidden_drafter import HiddenModule, ModulePlace


class Layer(torch.nn.Module):
    """A Llama layer of which queries, keys and values are made of two rows side by side.

    Args:
        like: a layer of transformers, whose parts it takes.
        size: E.
        norm_first: the residual is the normed hidden state (`norm_before_residual`).
    """

    def __init__(self, like: Any, size: int, *, norm_first: bool) -> None:  # noqa: ANN401
        super().__init__()
        self.self_attn, self.mlp = like.self_attn, like.mlp
        self.input_layernorm = like.input_layernorm
        self.post_attention_layernorm = like.post_attention_layernorm
        norm = like.input_layernorm
        self.hidden_norm = type(norm)(size, eps=norm.variance_epsilon)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(self.self_attn, name)
            wide = torch.nn.Linear(2 * size, linear.out_features, bias=linear.bias is not None)
            setattr(self.self_attn, name, wide)
        self._norm_first = norm_first

    def forward(self, both: torch.Tensor, **options: Any) -> torch.Tensor:  # noqa: ANN401
        """[1, S, 2 E], embedded tokens and hidden states side by side, to [1, S, E]."""
        embedded, hidden = both.chunk(2, dim=-1)
        normed = self.hidden_norm(hidden)
        residual = normed if self._norm_first else hidden
        fed = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        attended, *_ = self.self_attn(hidden_states=fed, **options)
        made = residual + attended
        added: torch.Tensor = self.mlp(self.post_attention_layernorm(made))
        return made + added


class Ends(torch.nn.Module):
    """What is in no layer; its parameters are named as `eagle3.checkpoint` names tensors.

    Args:
        size: E.
        taps: layers of the target whose hidden states it reads.
        bias: of the projection.
        rows: of an output head of its own; 0: it has none.
    """

    def __init__(self, size: int, taps: int, *, bias: bool, rows: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(taps * size, size, bias=bias)
        self.head = torch.nn.Linear(size, rows, bias=False) if rows else None

    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, n E] of the target's hidden states to [S, E]."""
        with torch.inference_mode():
            made: torch.Tensor = self.fc(hidden)
        return made

    def answers(
        self, tokens: torch.Tensor | None, width: int, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Logits of all tokens of the target, of which its own output head knows some.

        Args:
            tokens: [R] int64, of its rows; None: they are the target's.
            width: V, tokens of the target.
            hidden: [..., E].

        Returns:
            [..., V]; minus infinity where it knows none.
        """
        assert self.head is not None
        logits: torch.Tensor = self.head(hidden)
        if tokens is None:
            return logits
        every = logits.new_full((*logits.shape[:-1], width), float("-inf"))
        return every.index_copy_(-1, tokens, logits)


def load(place: ModulePlace) -> HiddenModule:
    """Load a head beside its target, whose weights may come later.

    Raises:
        CheckpointError: its layer cannot be run so.
    """
    checkpoint, target = place.module, place.target
    assert checkpoint is not None  # as opened for it
    layers = layers_read(checkpoint.folder, checkpoint.config, place.checkpoint)
    try:
        network, ends = _network(checkpoint, target, place.device, len(layers))
    except CheckpointError as error:
        raise CheckpointError(f"--draft eagle3: {error}") from error
    target.lend_ends(network)
    network.mix_with(lambda embedded, hidden: torch.cat([embedded, hidden], dim=-1), "model.norm")
    runner = load_drafting(
        checkpoint,
        place.device,
        # What it is fed is wider than its rows.
        chunk_tokens=max(place.chunk_tokens, RECORDED_ROWS),
        target_ids=place.target_ids,
        weights=place.draft.draft_weights,
        layers=(0,),
        shares_head=True,
        network=network,
    )
    if ends.head is not None:
        tokens = tokens_of(checkpoint)
        ids = None if tokens is None else place.device.upload([*tokens]).clone()
        network.answer_with(partial(ends.answers, ids, place.target_ids))
    return HiddenModule("eagle3", runner, place, layers=layers, prepare=ends.mixed)


def _network(
    checkpoint: Checkpoint, target: Network, device: Device, taps: int
) -> tuple[Network, Ends]:
    config, folder = checkpoint.config, checkpoint.folder
    model: Any = build_modules(config, folder, target.dtype, attn_implementation=ATTENTION_NAME)
    size, head = config.hidden_size, checkpoint.tensors.get(HEAD)
    norm_first = config.raw.get("norm_before_residual") is True
    with torch.device("meta"):
        layer = Layer(model.model.layers[0], size, norm_first=norm_first)
        bias, rows = MIXING_BIAS in checkpoint.tensors, 0 if head is None else head.shape[0]
        ends = Ends(size, taps, bias=bias, rows=rows)
        # Until the target's is lent: as wide as what the layer is fed, for the probe.
        model.set_input_embeddings(torch.nn.Embedding(config.vocab_size, 2 * size))
    model.model.layers[0], model.eagle3 = layer, ends
    model.to(target.dtype).requires_grad_(False)
    name = str(target.dtype).removeprefix("torch.")
    return Network(checkpoint, name, device.kind.packing, model), ends
