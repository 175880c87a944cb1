"""The probe sees what layers read of a pass beside their rows; planted families read too much."""

import pytest
import torch
from engines import PROMPT, engine_for
from tiny import DEEP
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from offload_rt.device.kinds import CPU
from offload_rt.errors import CheckpointError
from offload_rt.model import probe
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.network import Network

ROTARY, LAYER, CALL = (
    LlamaRotaryEmbedding.forward,
    LlamaDecoderLayer.forward,
    LlamaDecoderLayer.__call__,
)


@pytest.fixture
def planted(make_tiny, monkeypatch):
    """The network of a Llama whose rotation, layers or calls of layers are others."""
    folder = make_tiny("llama", **DEEP)
    monkeypatch.setattr(probe, "_fit", {})

    def make(*, rotary=ROTARY, layer=LAYER, call=CALL):
        monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)
        monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
        monkeypatch.setattr(LlamaDecoderLayer, "__call__", call)
        return Network(open_checkpoint(folder), "float32", CPU.packing)

    return make


def note_embedding(stash):
    def rotary(self, x, position_ids):
        stash["embedded"] = x
        return ROTARY(self, x, position_ids=position_ids)

    return rotary


def test_layers_that_read_what_another_computed_are_refused(planted):
    stash = []

    def layer(self, hidden, **options):
        stash.append(hidden * 2)
        return LAYER(self, hidden, **options) + (stash[1] if len(stash) > 3 else 0)

    with pytest.raises(CheckpointError, match="layer 3 reads, beside its rows, what layer 1 comp"):
        planted(layer=layer)


def test_layers_that_read_tokens_and_are_not_given_them_by_rows_are_refused(planted):
    stash = {}

    def layer(self, hidden, **options):
        return LAYER(self, hidden, **options) + stash["embedded"].tanh()

    said = "layer 0 reads, beside its rows, what the tokens made, and is not given it by rows"
    with pytest.raises(CheckpointError, match=said):
        planted(layer=layer, rotary=note_embedding(stash))


def test_layers_that_read_positions_otherwise_than_by_rows_are_refused(planted):
    def rotary(self, x, position_ids):
        cos, sin = ROTARY(self, x, position_ids=position_ids)
        return cos[0], sin[0]

    with pytest.raises(CheckpointError, match="layer 0 reads, .* what positions made, and is not"):
        planted(rotary=rotary)


def test_layers_between_which_the_embedding_is_added_stay_together(planted):
    stash = {}

    def call(self, hidden, **options):
        if self.self_attn.layer_idx:
            hidden = hidden + stash["embedded"]
        return CALL(self, hidden, **options)

    network = planted(call=call, rotary=note_embedding(stash))
    assert network.apart == "behind layer 0 they read what the tokens made"


def test_layers_that_read_rows_and_places_alone_may_be_apart(planted):
    assert planted().apart == ""


def test_what_has_rows_in_its_third_dimension_is_cut_with_them(planted, make_tiny):
    def rotary(self, x, position_ids):
        return tuple(made[:, None] for made in ROTARY(self, x, position_ids=position_ids))

    def layer(self, hidden, position_embeddings, **options):
        cos, sin = position_embeddings
        assert cos.shape[:3] == (1, 1, hidden.shape[1])
        return LAYER(self, hidden, position_embeddings=(cos[:, 0], sin[:, 0]), **options)

    planted(rotary=rotary, layer=layer)
    with engine_for(make_tiny("llama"), prefill_chunk_tokens=5) as engine:
        assert torch.isfinite(engine.forward([(0, PROMPT)], reuse=False)).all()
