"""F-14, F-32: what is the embedding and what the head is decided once, as transformers does.

A stored head that differs is used whatever the configuration says; where one of the two is stored
it is the other, too, if the family's configuration ties them; where it does not, one is missing.
"""

import pytest
import torch
from engines import PROMPT, engine_for
from folders import loaded, rewritten

from offload_rt.config import DraftConfig, DraftWeights, GenerationConfig, SamplingConfig
from offload_rt.costs.sizes import image_bytes
from offload_rt.device.kinds import CPU
from offload_rt.engine import Run
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.speculative.medusa.storage import read_output_bias, read_output_head

HEADS = ("equal", "different", "absent", "alone")
ENDS = {"gpt_neox": ("gpt_neox.embed_in.weight", "lm_head.weight")}
FAMILIES = {"llama": {}, "gemma2": {"head_dim": 16}, "gpt_neox": {"num_key_value_heads": 4}}


def with_head(tensors, model_type, head):
    embedding, name = ENDS.get(model_type, ("model.embed_tokens.weight", "lm_head.weight"))
    tensors = {key: t for key, t in tensors.items() if key not in ("embed_out.weight", name)}
    tied = tensors[embedding]
    if head == "equal":
        tensors[name] = tied
    if head == "different":
        tensors[name] = tied.roll(1, 0)
    if head == "alone":
        tensors[name] = tensors.pop(embedding)
    return tensors


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("model_type", "flag"),
    [("llama", True), ("llama", False), ("llama", None), ("gemma2", None), ("gpt_neox", True)],
)
def test_ends_are_those_of_transformers(make_tiny, tmp_path, caplog, model_type, flag, head):
    tiny = make_tiny(model_type, num_hidden_layers=2, **FAMILIES[model_type])
    folder = rewritten(
        tiny,
        tmp_path / "model",
        lambda tensors: with_head(tensors, model_type, head),
        tie_word_embeddings=flag,
    )
    model, missing = loaded(folder)
    if missing:
        refusal = pytest.raises(CheckpointError, match="missing|has no head|no token embedding")
        with refusal, engine_for(folder):
            pass
        return
    checkpoint = open_checkpoint(folder)
    with engine_for(folder, resident_layers=0, slots=1) as engine, torch.no_grad():
        ours = engine.forward([(0, PROMPT)], reuse=True)
        theirs = model(torch.tensor([PROMPT])).logits[:, -1]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        network = engine.network
        images = image_bytes(checkpoint, "auto", CPU)
        assert images == [*(layout.nbytes for layout in network.layouts), network.base.nbytes]
        assert torch.equal(read_output_head(checkpoint), model.get_output_embeddings().weight)
    state = model.state_dict()
    ends = [f"{name}.weight" for name in ("embed_tokens", "embed_in", "lm_head", "embed_out")]
    rest = sum(t.numel() for key, t in state.items() if not key.endswith(tuple(ends)))
    ties = model.config.tie_word_embeddings
    pairs = 1 + (head == "different" or (head == "equal" and not ties))
    rows = model.get_input_embeddings().weight.numel()
    assert checkpoint.total_bytes == 4 * (rest + pairs * rows)
    says = "lm_head.weight' differs from the embedding" in caplog.text
    assert says == (head == "different" and bool(ties))


def test_a_head_that_differs_in_one_number_is_used(make_tiny, tmp_path):
    """Where samples do not look: a few rows trained apart are enough."""
    tiny = make_tiny("llama", vocab_size=40000, num_hidden_layers=1, tie_word_embeddings=True)

    def one_number(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[12345, 6] += 1.0
        return tensors | {"lm_head.weight": head}

    checkpoint = open_checkpoint(rewritten(tiny, tmp_path / "other", one_number))
    assert checkpoint.head is not None
    same = rewritten(
        tiny, tmp_path / "same", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}
    )
    assert open_checkpoint(same).head is None
    assert [extent.name for extent in open_checkpoint(same).left_out] == ["lm_head.weight"]


@pytest.mark.parametrize("weights", [DraftWeights.SAME, DraftWeights.INT8])
def test_a_draft_model_uses_its_stored_head_too(make_tiny, tmp_path, weights):
    """A model drafts for itself: what it proposes is accepted only if its head is the target's."""
    tiny = make_tiny("llama", num_hidden_layers=2, tie_word_embeddings=True, dtype="bfloat16")
    folder = rewritten(tiny, tmp_path / "m", lambda t: with_head(t, "llama", "different"))
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=3, draft_weights=weights)
    with engine_for(folder, draft=draft) as engine:
        run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=16))
        run.prefill()
        while run.active:
            run.step()
        acceptance = run.report().speculation.acceptance_rate
    assert acceptance is not None and acceptance > 0.6


def test_a_head_bias_is_found_though_the_head_is_the_embedding(make_tiny, tmp_path):
    folder = make_tiny("phi", num_hidden_layers=1, tie_word_embeddings=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.head is None
    assert read_output_bias(checkpoint) is not None
