"""Medusa heads as runs load them: computed by the formula, and refused when they are wrong."""

import pytest
import torch
from medusa_heads import by_formula, computed, random_heads, write_pickled, write_shared
from safetensors.torch import save_file

from offload_rt.errors import CheckpointError
from offload_rt.speculative.medusa.checkpoint import open_heads
from offload_rt.speculative.medusa.heads import MedusaHeads, ResBlock
from offload_rt.speculative.medusa.names import HeadsShape, LmHead
from offload_rt.speculative.medusa.storage import read_heads

SIZE, ROWS = 64, 300


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(5, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model_head():
    return torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(4)) / 8


# --- the modules ---------------------------------------------------------------------------------


def test_a_new_block_is_nearly_the_identity():
    torch.manual_seed(0)
    block, x = ResBlock(SIZE), torch.randn(3, SIZE)
    assert not block.linear.weight.any() and block.linear.bias.any()
    expected = x + torch.nn.functional.silu(block.linear.bias)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_heads_compute_the_papers_formula(tmp_path, hidden, model_head, layers, bias, own):
    tensors = random_heads(layers=layers, bias=bias, own=own)
    folder = write_shared(tmp_path, layers=layers, bias=bias, own=own)
    heads = read_heads(open_heads(folder))
    shape = heads.shape
    assert (shape.heads, shape.layers, shape.bias) == (3, layers, bias)
    assert shape.lm_head is (LmHead.OWN if own else LmHead.MODEL)
    found = computed(heads, hidden, None if own else model_head)
    assert torch.allclose(found, by_formula(tensors, hidden, model_head), atol=1e-5)


def test_blocks_of_one_head_have_weights_of_their_own():
    module = MedusaHeads(open_shape(layers=2))
    module.blocks[0][0].linear.weight.data.fill_(1.0)
    assert not module.blocks[0][1].linear.weight.any()
    assert len({p.data_ptr() for p in module.parameters()}) == len(list(module.parameters()))


def open_shape(**options):
    return HeadsShape(**({"heads": 2, "layers": 1, "hidden_size": SIZE} | options))


# --- what is refused -----------------------------------------------------------------------------


def without(name):
    return lambda t: {n: x for n, x in t.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("1.0.linear.weight"), r"lacks 1 of the 9 tensors.*blocks\.1\.0\.linear\.weight"),
        (without("2.0.linear.bias"), r"lacks 1 of the 9 .*blocks\.2\.0\.linear\.bias"),
        (without("1.1.weight"), r"lacks 1 of the 9 .*lm_heads\.1\.weight"),
        (lambda t: {n: x for n, x in t.items() if n[0] != "1"}, "lacks 3 of the 9"),
        (lambda t: {n: x for n, x in t.items() if "bias" in n}, "every linear.weight has shape"),
        (lambda t: t | {"lm_head.bias": torch.ones(3)}, "'lm_head.bias', which Medusa heads"),
        (lambda t: t | {"0.2.weight": torch.ones(3)}, "'0.2.weight', which Medusa heads"),
        (lambda t: t | {"lm_head.weight": torch.ones(300, 64)}, "holds 3 tensors that 3 heads"),
        (lambda t: t | {"medusa_heads.0.1.weight": torch.ones(300, 64)}, "under two names"),
        (lambda t: t | {"0.1.weight": torch.ones(299, 64)}, r"has shape \[300, 64\], the other"),
        (lambda t: t | {"1.0.linear.bias": torch.ones(63)}, r"shape \[63\].*make it \[64\]"),
        (lambda t: t | {"0.0.linear.weight": torch.ones(64, 63)}, "residual block's is square"),
        (lambda t: t | {"0.0.linear.weight": torch.ones(64)}, "residual block's is square"),
        (lambda t: t | {"99.0.linear.weight": torch.ones(64, 64)}, "numbers 100 heads"),
        (lambda t: t | {"0.0.linear.bias": torch.ones(64).double()}, "is F64, accepted are BF16"),
        (lambda t: t | {"token_map": torch.ones(301).long()}, r"token_map has shape \[301\]"),
        (lambda t: t | {"token_map": torch.ones(30)}, "token_map is F32, accepted are I64"),
        (lambda t: {"model.norm.weight": torch.ones(3)}, "holds no Medusa heads"),
    ],
)
def test_wrong_tensors_are_refused_with_their_names(tmp_path, change, message):
    save_file(change(random_heads(own=True)), tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match=message) as told:
        open_heads(tmp_path)
    assert "\n" not in str(told.value)


def test_pickles_are_not_opened_for_a_run(tmp_path):
    folder = write_pickled(tmp_path, random_heads())
    with pytest.raises(CheckpointError, match="tools/convert_medusa.py .* NEW_FOLDER"):
        open_heads(folder)


def test_folders_without_heads_are_refused(tmp_path, make_tiny):
    with pytest.raises(CheckpointError, match="expected medusa_lm_head.safetensors"):
        open_heads(tmp_path)
    with pytest.raises(CheckpointError, match="holds no Medusa heads"):
        open_heads(make_tiny("llama"))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_heads(tmp_path / "missing")
