"""The module's network: embedded tokens and hidden states of the target in, logits out.

Row i is fed the target's hidden state of token i, after the final norm, and the embedding of token
i + 1; its logits are of token i + 2. It goes on from its own result, as if that were the target's.
Embedding and output head are the target's. Layer and norms are transformers' own modules.
"""

from typing import Any

import torch

from offload_rt.config import DraftWeights
from offload_rt.device.base import Device
from offload_rt.errors import CheckpointError
from offload_rt.model.attention_function import ATTENTION_NAME
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.modules import build_modules
from offload_rt.model.network import Network
from offload_rt.runner.loading import load_drafting
from offload_rt.runner.runner import Runner
from offload_rt.speculative.mtp.checkpoint import FINAL_NORM


class Mixer(torch.nn.Module):
    """Makes the input of the layer; its parameters are named as `mtp.checkpoint` names tensors."""

    def __init__(self, norm: Any, size: int) -> None:  # noqa: ANN401 - a class of transformers
        super().__init__()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(), norm()
        self.fc = torch.nn.Linear(2 * size, size, bias=False)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[S, E] of the embedded tokens and [S, E] of hidden states to [S, E]."""
        parts = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        made: torch.Tensor = self.fc(torch.cat(parts, dim=-1))
        return made


def load_module(
    checkpoint: Checkpoint,
    target: Network,
    device: Device,
    *,
    weights: DraftWeights,
    chunk_tokens: int,
    target_ids: int,
) -> Runner:
    """Load a module beside its target, whose weights may come later.

    Args:
        checkpoint: of the module.
        target: lends embedding and output head.
        device: where the module runs, and what the target lends is.
        weights: how the matrices of its layer are kept.
        chunk_tokens: rows that go through the layer at once.
        target_ids: width of the target's logits.

    Raises:
        CheckpointError: the family's layer cannot be run so, or the tensors are not its.
    """
    try:
        network, mixer = _network(checkpoint, target, device)
    except CheckpointError as error:
        raise CheckpointError(f"--draft mtp: {error}") from error
    target.lend_ends(network)
    network.mix_with(mixer)
    return load_drafting(
        checkpoint,
        device,
        chunk_tokens=chunk_tokens,
        target_ids=target_ids,
        weights=weights,
        layers=(0,),
        shares_head=True,
        network=network,
    )


def _network(checkpoint: Checkpoint, target: Network, device: Device) -> tuple[Network, Mixer]:
    config, folder = checkpoint.config, checkpoint.folder
    model: Any = build_modules(config, folder, target.dtype, attn_implementation=ATTENTION_NAME)
    like = model.get_submodule(FINAL_NORM.removesuffix(".weight"))
    size, eps = config.hidden_size, model.config.get_text_config().rms_norm_eps
    with torch.device("meta"):
        mixer = Mixer(lambda: type(like)(size, eps=eps), size).to(target.dtype)
    model.mtp = mixer.requires_grad_(False)
    name = str(target.dtype).removeprefix("torch.")
    return Network(checkpoint, name, device.kind.packing, model), mixer
