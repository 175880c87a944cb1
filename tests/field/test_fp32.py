"""Parameters that a family keeps in fp32 in a model of 16 bits are in fp32 here, too.

Routers add a bias to scores between 0 and 1; rounded to bf16 it chooses other experts.
"""

import pytest
import torch
from engines import PROMPT, engine_for
from folders import loaded, rewritten

from offload_rt.costs.sizes import layouts_of
from offload_rt.device.kinds import CPU, Packing
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.network import Network

HEAD = {"head_dim": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "llama": {},
    "glm4_moe": HEAD | ROUTED | {"first_k_dense_replace": 1},
    "dots1": HEAD | ROUTED | {"first_k_dense_replace": 1},
    "ernie4_5_moe": EXPERTS
    | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "minimax_m2": HEAD | EXPERTS | {"num_local_experts": 4},
    "hy_v3": HEAD | EXPERTS | {"num_experts": 4, "first_k_dense_replace": 1},  # renames its bias
    "hunyuan_v1_moe": HEAD | {"num_experts": 4, "moe_topk": 2},  # makes its router in fp32
    "gpt_oss": HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny(make_tiny, family):
    return make_tiny(family, num_hidden_layers=2, dtype="bfloat16", **(IDS | FAMILIES[family]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_formats_are_those_of_transformers(make_tiny, family, dtype):
    folder = tiny(make_tiny, family)
    network = Network(open_checkpoint(folder), dtype, Packing.FILE)
    model, missing = loaded(folder, dtype=getattr(torch, dtype))
    assert not missing
    theirs = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    places = [p for group in (*network._places.of_layers, network._places.of_base) for p in group]
    assert {p.key: getattr(torch, p.placement.dtype) for p in places} == {
        name: theirs[name] for name in (p.key for p in places)
    }
    assert len(places) >= len(theirs) - network._places.tied
    planned = layouts_of(open_checkpoint(folder), dtype, CPU)
    assert planned == (*network.layouts, network.base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("placement", [{"resident_layers": 0, "slots": 1}, {"resident_layers": 2}])
def test_routers_choose_as_in_transformers(make_tiny, tmp_path, dtype, placement):
    def biased(tensors):
        generator = torch.Generator().manual_seed(1)
        for name, tensor in tensors.items():
            if ".experts." in name:  # so wide that another choice shows
                tensors[name] = 10 * tensor
            if name.endswith("e_score_correction_bias"):
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = 1000 + noise  # of which bf16 keeps nothing
        return tensors

    folder = rewritten(tiny(make_tiny, "glm4_moe"), tmp_path / "m", biased)
    model, _ = loaded(folder, dtype=getattr(torch, dtype))
    with torch.no_grad():
        theirs = model(torch.tensor([PROMPT])).logits[:, -1].float()
    with engine_for(folder, dtype=dtype, **placement) as engine:
        ours = engine.forward([(0, PROMPT)], reuse=True).float()
    assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()
