"""GGUF files run as they are: the numbers of their blocks, their networks, their texts.

Laws: a block's numbers are bit for bit those of a formula and of the package gguf; the run of a
file is bit for bit the run of the plain model with these numbers, wherever its weights are; a
damaged file gets a sentence.
"""

import functools
import json
import os
import struct
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate, reference_model
from gguf_files import (
    SCALES,
    formula,
    gguf_bytes,
    paired,
    random_blocks,
    text,
    tokenizer_settings,
    write_gguf,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from value_double import open_as, open_double

from offload_rt.cli.machine import _disk
from offload_rt.config import DraftConfig, DraftWeights, Exact, HomeKind, RuntimeConfig
from offload_rt.costs.machine import FreeMemory
from offload_rt.costs.workload import parts_of
from offload_rt.device import system
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.errors import CheckpointError, PlanError
from offload_rt.kernels import stored as stored_kernels
from offload_rt.kernels.products import problem
from offload_rt.kernels.registers import problem as registers_problem
from offload_rt.model import ends
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.ends import forms_of_ends, with_stored_ends
from offload_rt.model.exact import product_shapes
from offload_rt.model.formats import ggml, methods
from offload_rt.model.formats import stored as stored_module
from offload_rt.model.formats.direct import direct_for, plain_for
from offload_rt.model.formats.methods import BLOCKS, Form, block_name
from offload_rt.model.formats.stored import BLOCK_NUMBERS, Stored, multiplies
from offload_rt.model.formats.wired import WiredLinear, dequantise
from offload_rt.model.gguf import tensors as tensors_module
from offload_rt.model.gguf.container import read_gguf
from offload_rt.model.gguf.tokenizer import describe_text
from offload_rt.model.locate import resolve_model
from offload_rt.planning import planner
from offload_rt.runner.loading import BASE
from offload_rt.session.options import settings_from
from offload_rt.session.shared import fastest_room


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))


def stored_of(form, outputs, inputs, heads=0):
    return Stored(
        module="m",
        form=form,
        outputs=outputs,
        inputs=inputs,
        bits=4,
        groups=1,
        parts={},
        heads=heads,
    )


def brought(form, data, inputs, dtype, heads=0):
    data = torch.from_numpy(data)
    out = torch.full((len(data), inputs), torch.nan, dtype=dtype)
    dequantise(stored_of(form, len(data), inputs, heads), {"weight": data}, out)
    return out


@pytest.mark.parametrize("form", BLOCKS)
def test_blocks_are_what_the_formula_says(monkeypatch, form):
    """In order and in pairs of rows; at once and in blocks of outputs of odd sizes."""
    data = random_blocks(form, 24, 512, np.random.default_rng(2))
    data[3], data[4] = 0, data[4] | 0x33  # scales of nothing; large codes
    expected = torch.from_numpy(formula(form, data))
    for block in (2**22, 2**12):
        monkeypatch.setitem(BLOCK_NUMBERS, "cpu", block)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(brought(form, data, 512, dtype), expected.to(dtype)), dtype
            turned = brought(form, paired(data, 3), 512, dtype, heads=3)
            assert torch.equal(turned, expected.to(dtype)), dtype


@pytest.mark.parametrize(
    ("form", "heads"), [*((form, 0) for form in BLOCKS), (Form.Q8_0, 2), (Form.Q6_K, 2)]
)
def test_products_with_blocks_as_they_lie_have_torchs_bits(form, heads, monkeypatch):
    """Of one row and of several; rows of the weight in order and in pairs.

    In matrix registers, where there are any, those of a plain weight there.
    """
    if problem() or not multiplies(stored_of(form, 128, 512, heads), "bfloat16"):
        pytest.skip(f"no kernels here: {problem()}")
    data = torch.from_numpy(random_blocks(form, 128, 512, np.random.default_rng(4)))
    stored = stored_of(form, 128, 512, heads)
    product = direct_for(stored, torch.bfloat16, data.device, exact=False, in_order=False)
    weight = brought(form, data.numpy(), 512, torch.bfloat16, heads)
    bias = torch.linspace(-1, 1, 128).to(torch.bfloat16)
    for count in (1, 2, 7):
        rows = torch.randn(count, 512, generator=torch.Generator().manual_seed(count))
        rows = rows.to(torch.bfloat16)
        expected = torch.nn.functional.linear(rows, weight, bias)
        assert torch.equal(product(rows, {"weight": data}, bias), expected), count
    if not registers_problem():
        monkeypatch.setattr(stored_kernels, "multiplies_in_registers", lambda *_: True)
        product = direct_for(stored, torch.bfloat16, data.device, exact=True, in_order=False)
        plain = plain_for(512, 128, torch.bfloat16, data.device, exact=True)
        assert torch.equal(product(rows, {"weight": data}, bias), plain(rows, weight, bias))


def test_plans_count_on_kernels_where_torch_adds_up_as_they_do(monkeypatch):
    """Not with AMX, unless passes are row-invariant or oneDNN is kept from it."""
    stored, flags = stored_of(Form.Q6_K, 128, 512), {"avx512_bf16"}
    for module in (stored_module, system):
        monkeypatch.setattr(module, "processor_flags", lambda: flags)
    monkeypatch.setattr(stored_module.compiled, "problem", lambda: "")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert multiplies(stored, "bfloat16")
    flags.add("amx_bf16")
    assert not multiplies(stored, "bfloat16")
    assert multiplies(stored, "bfloat16", exact=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert multiplies(stored, "bfloat16")


@pytest.mark.parametrize("form", BLOCKS)
def test_blocks_are_those_of_the_package(form):
    """Of any bytes: also scales that are infinite, NaN or subnormal."""
    gguf = pytest.importorskip("gguf")
    data = np.random.default_rng(3).integers(0, 256, (64, BLOCKS[form][1] * 4), dtype=np.uint8)
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[block_name(form)]
        expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    made = brought(form, data, BLOCKS[form][0] * 4, torch.float32)
    assert expected.isnan().any() or form is Form.BLOCK_MXFP4  # whose scales are all numbers
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(made.nan_to_num(0.5), expected.nan_to_num(0.5))


MIXED = {  # as Q4_K_M files are: few types, which differ by matrix and layer
    "q_proj": "Q4_K",
    "k_proj": "Q8_0",
    "v_proj": "Q6_K",
    "o_proj": "Q5_0",
    "gate": "Q4_K",
    "up_proj": "Q5_K",
    "down": "Q6_K",
    "qkv": "Q5_K",
    "embed": "Q6_K",
}
SMALL = {
    "gate": "Q4_0",
    "up_proj": "Q4_1",
    "down": "Q5_1",
    "q_proj": "Q8_0",
    "embed": "Q5_0",
    "lm_head": "Q8_0",
}
OTHERS = {  # as files of few bits are
    "q_proj": "IQ4_XS",
    "v_proj": "Q3_K",
    "o_proj": "Q4_0",
    "gate_proj": "Q2_K",
    "up_proj": "IQ4_NL",
    "down_proj": "Q3_K",
    "w": "Q4_K",
    "embed": "Q4_1",
    "lm_head": "Q6_K",
}
RUNS = {
    "llama": MIXED,
    "qwen2": SMALL,
    "qwen3": SMALL | {"k_proj": "Q5_0"},
    "phi3": MIXED,
    "gemma2": OTHERS,
    "gemma3_text": MIXED,
    "mixtral": OTHERS,
    "qwen2_moe": OTHERS,
    "qwen3_moe": OTHERS | {"down_proj": "MXFP4"},
}
ENDS = ("model.embed_tokens.weight", "lm_head.weight")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
OWN = {
    "gemma2": {"head_dim": 64, "sliding_window": 4, "query_pre_attn_scalar": 64},
    "gemma3_text": {
        "head_dim": 64,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 64,
        "rope_theta": 5e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 256},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
}
SAID = {
    "gemma3_text": {
        "gemma3.attention.sliding_window_pattern": [1, 0],
        "gemma3.rope.freq_base": 5e4,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    },
    "mixtral": {"llama.expert_count": 4},
    "qwen3_moe": {"qwen3moe.expert_count": 4},
}
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def files(make_tiny, tmp_path_factory):
    made = {}

    def make(family, **options):
        key = json.dumps([family, options])
        if key not in made:
            tied = RUNS[family] is MIXED
            shape = SHAPE | OWN.get(family, {})
            source = make_tiny(family, tokenizer=True, tie_word_embeddings=tied, **shape)
            options.setdefault("more", SAID.get(family, {}))
            path = tmp_path_factory.mktemp("gguf") / f"tiny-{family}.gguf"
            made[key] = write_gguf(
                source, path, RUNS[family], tokenizer=tokenizer_settings(source), **options
            )
        return made[key]

    return make


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in RUNS), ("llama", "bfloat16")]
)
def test_a_run_is_that_of_its_numbers_bit_for_bit(files, monkeypatch, family, dtype):
    """L2 and L3: wherever the weights are, and as transformers computes it.

    Embedding and head are dequantised when they are loaded, and then stay as they are stored: each
    in each place where the two are one matrix (llama) and where they are two (qwen2), in one of
    them for the other networks.
    """
    path, plain = files(family)
    folder = resolve_model(str(path))
    options = {"dtype": dtype, "resident_layers": 0}
    with engine_for(plain, **options) as engine:
        expected, answer = all_logits(engine), generate(engine, tokens=4)
    streamed, kept_in_host = {"slots": 1}, {"resident_layers": 1, "home": HomeKind.HOST}
    both = (streamed, kept_in_host) if family in ("llama", "qwen2") else ()
    for placed in both or (kept_in_host,):
        with engine_for(folder, **options | placed) as engine:
            assert torch.equal(all_logits(engine), expected), placed
            assert generate(engine, tokens=4) == answer
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
    whole_bytes = engine.placement.base_bytes
    monkeypatch.setattr(planner, "forms_of_ends", lambda made, *_: (with_stored_ends(made),))
    monkeypatch.setattr(ends, "AT_ONCE", 64 * 256)  # five products make the logits
    monkeypatch.setattr("engines.opened_once", lambda opens, folder, _: opens(folder))  # says so
    for placed in both or (streamed,):
        with engine_for(folder, **options | placed) as engine:
            assert torch.equal(all_logits(engine), expected), placed
            assert generate(engine, tokens=4) == answer
            stored, demand = engine.checkpoint, engine.placement.demand
            if "slots" in placed:  # as in the file, not as they compute
                assert engine.bytes_per_pass == sum(map(stored.layer_bytes, range(2)))
            kept = {stored.stored[n] for n in ENDS if n in stored.stored}
            assert {each.at_once for each in kept} == {64}
            by_rows = stored.head is not None and "slots" in placed  # no other home has files
            numbers = sum(stored.tensors[n].nbytes for n in ENDS if n in stored.tensors)
            numbers -= demand.file_base_bytes // 4096 * 4096 if by_rows else 0
            assert (demand.file_base_bytes > 0) == by_rows
            assert engine.device.ledger()[BASE] == engine.placement.base_bytes
            assert 0 < engine.placement.base_bytes - numbers < 4 * 4096 < whole_bytes
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
    if dtype == "bfloat16":
        return
    with torch.inference_mode():
        theirs = reference_model(plain)(torch.tensor([PROMPT])).logits[:, -1]
    assert torch.allclose(expected[:1], theirs, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("form", [*BLOCKS])
def test_scales_are_told_from_codes(form):
    """Codes may be any bytes; NaN and infinite of either sign are counted, once each."""
    data = random_blocks(form, 6, 4 * BLOCKS[form][0], np.random.default_rng(1))
    places = methods.SCALES.get(form, ())
    assert sorted(places) == sorted(SCALES.get(form, (0,))) or form is Form.BLOCK_MXFP4
    if not places:
        return
    blocks = data.reshape(-1, BLOCKS[form][1])
    assert ggml.broken_scales(data, form) == 0
    for count, number in enumerate((np.inf, -np.inf, np.nan), 1):
        at = places[count % len(places)]
        blocks[5 * count, at : at + 2] = np.array([number], np.float16).view(np.uint8)
        assert ggml.broken_scales(data, form) == count


def test_scales_that_are_no_numbers_are_refused_at_the_first_read(files, tmp_path):
    """Of a layer, resident, in host memory and streamed; of the ends, whichever form they have."""
    path, _ = files("llama")
    whole = path.read_bytes()
    checkpoint = open_checkpoint(resolve_model(str(path)))
    layer = next(s for s in checkpoint.stored.values() if s.form in methods.SCALES)
    end = next(s for s in checkpoint.stored_ends.values() if s.form in methods.SCALES)
    for number, stored in enumerate((layer, end)):
        broken, (extent,) = bytearray(whole), stored.parts.values()
        at = extent.offset + extent.nbytes - BLOCKS[stored.form][1]  # the last block
        broken[at + methods.SCALES[stored.form][0] + 1] |= 0x7C
        copy = tmp_path / f"broken-{number}.gguf"
        copy.write_bytes(broken)
        streamed = {"resident_layers": 0, "slots": 1}
        for placed in (streamed, {"resident_layers": 1, "home": HomeKind.HOST}, {}):
            with (
                pytest.raises(
                    CheckpointError, match="holds 1 scales of .* that are NaN or infinite"
                ),
                engine_for(resolve_model(str(copy)), dtype="float32", **placed) as engine,
            ):
                all_logits(engine)


def test_blocks_of_an_embedding_in_a_gpus_host_memory(files, monkeypatch):
    """Rows are found there and dequantised on the device; the head is, in each pass."""
    path, _ = files("qwen2")
    made = open_checkpoint(resolve_model(str(path)))
    whole, kept = forms_of_ends(made, RuntimeConfig(), CUDA)
    assert whole is made and kept is with_stored_ends(made)
    monkeypatch.setattr(ends, "multiplies", lambda *_: True)
    assert forms_of_ends(made, RuntimeConfig(), CPU) == (kept,)
    assert forms_of_ends(made, RuntimeConfig(), CUDA) == (made, kept)
    # What a draft leaves room for does not choose the kernels of an answer.
    assert forms_of_ends(made, RuntimeConfig(exact=Exact.ON), CUDA) == (kept,)
    monkeypatch.setattr(ends, "multiplies", lambda *_: False)
    for exact in (Exact.AUTO, Exact.ON):
        assert forms_of_ends(made, RuntimeConfig(exact=exact), CPU) == (kept,)
    assert forms_of_ends(made, RuntimeConfig(exact=Exact.OFF), CPU) == (made, kept)
    (head,) = parts_of(kept, "auto", CUDA).head_decoded
    assert (head.form, head.numbers) == ("q8_0", 300 * 256)
    assert not parts_of(made, "auto", CUDA).head_decoded
    options = {"dtype": "float32", "resident_layers": 0, "slots": 2, "home": HomeKind.HOST}
    open_as(monkeypatch, CpuDevice())  # images that lie alike are computed alike
    with engine_for(made.folder, device_limit_bytes=2**31, **options) as engine:
        expected = all_logits(engine)
    monkeypatch.setattr(planner, "forms_of_ends", lambda made, *_: (with_stored_ends(made),))
    open_double(monkeypatch)
    with engine_for(made.folder, device_limit_bytes=2**31, **options) as engine:
        assert torch.equal(all_logits(engine), expected)
        demand = engine.placement.demand
        own = engine.checkpoint.tensors["model.embed_tokens.weight"]
        assert 0 <= demand.host_base_bytes - own.nbytes < 4096
        assert engine.device.ledger()[BASE] == engine.placement.base_bytes < 3 * own.nbytes


@pytest.mark.parametrize(("outputs", "last"), [(1500, 476), (1100, 332), (1024, 512), (40, 40)])
def test_products_of_a_head_in_parts_are_those_that_are_compared(outputs, last):
    """None has so few outputs that torch adds up in another order, nor more than scratch has."""
    sizes = {"outputs": outputs, "inputs": 256, "bits": 4, "groups": 8, "at_once": 512}
    sizes["parts"] = {"weight": SimpleNamespace(shape=(outputs, 144), dtype="U8")}
    stored = Stored(module="head", form=Form.Q4_0, **sizes)
    with torch.device("meta"):
        made = WiredLinear(stored, torch.nn.Linear(256, outputs, dtype=torch.float32))
    made.bias = None
    made.weight = torch.from_numpy(random_blocks(Form.Q4_0, outputs, 256, np.random.default_rng(2)))
    made.lend(torch.empty(512 * 256 * 4, dtype=torch.uint8), in_order=True, exact=True)
    multiplied = set()

    def product(rows, weight, bias):
        multiplied.add(weight.shape[::-1])
        return torch.nn.functional.linear(rows, weight, bias)

    made.compute_by(product)
    rows, weight = torch.randn(16, 256), torch.empty(outputs, 256)
    dequantise(stored, {"weight": made.weight}, weight)
    assert torch.equal(made(rows), torch.nn.functional.linear(rows, weight))
    assert multiplied == product_shapes(made)
    assert min(size for _, size in multiplied) >= min(256, outputs)
    assert max(size for _, size in multiplied) <= 512 and (256, last) in multiplied


def test_simulate_looks_at_ends_in_their_blocks(files, monkeypatch, offload_run):
    path, _ = files("qwen2")
    ask, counts = ("simulate", path, "--profile", "rtx4090-pcie4x16", "--draft", "none"), []
    for forms in (lambda made, *_: (made,), lambda made, *_: (with_stored_ends(made),)):
        monkeypatch.setattr(planner, "forms_of_ends", forms)
        counts.append(json.loads(offload_run(*ask, "--json").out)["quantised"]["weights"])
    assert counts[1] - counts[0] == 2 * 300 * 256


def test_simulate_refuses_with_what_suffices_in_some_form(files, monkeypatch, offload_run):
    """Whichever form is looked at first."""
    path, _ = files("llama")
    ask = ("simulate", path, "--profile", "rtx4090-pcie4x16", "--draft", "none")
    ask += ("--device-memory", "1KiB", "--resident-layers", 0)
    monkeypatch.setattr(ends, "AT_ONCE", 64 * 256)
    said = []
    for order in (1, -1):
        forms = lambda made, *_, order=order: (made, with_stored_ends(made))[::order]  # noqa: E731
        monkeypatch.setattr(planner, "forms_of_ends", forms)
        said.append(offload_run(*ask).err)
    assert "needs" in said[0] and said[0] == said[1]


def test_rooms_of_a_batch_are_planned_as_the_engine_plans(files, monkeypatch):
    """In each form of weights and ends: what fits in one is not refused."""
    path, _ = files("llama")
    made = SimpleNamespace(checkpoint=open_checkpoint(resolve_model(str(path))))
    there = CPU, FreeMemory(device_bytes=2**34, host_bytes=2**34)
    monkeypatch.setattr(ends, "AT_ONCE", 64 * 256)  # else scratch is as large as what it saves
    asked, wires_of = [], planner.wires_of
    monkeypatch.setattr(planner, "wires_of", lambda *of: asked.append(of[1]) or wires_of(*of))

    def rooms(nbytes, *forms):
        monkeypatch.setattr(planner, "forms_of_ends", lambda made, *_: [f(made) for f in forms])
        chosen = {"device": "cpu", "draft": "none", "resident_layers": 0, "device_memory": nbytes}
        return fastest_room(made, settings_from(chosen), *there, [(20, 12)] * 2)

    def as_they_compute(checkpoint):
        return checkpoint

    with pytest.raises(PlanError) as refused:
        rooms("1KiB", with_stored_ends)
    suffices = str(refused.value.needed_bytes)
    assert [room.sequences for room in rooms(suffices, as_they_compute, with_stored_ends)] == [1]
    with pytest.raises(PlanError, match="needs"):
        rooms(suffices, as_they_compute)
    assert set(asked) == {settings_from({}).runtime.wire}


@pytest.mark.parametrize("plain", ["F16", "BF16", "F32"])
def test_plain_numbers_are_read_too(make_tiny, tmp_path, plain):
    """Of llama only the rows of queries and keys lie in another order."""
    source = make_tiny("llama", tie_word_embeddings=False, **SHAPE)
    path, folder = write_gguf(source, tmp_path / "a.gguf", {}, plain=plain)
    made = resolve_model(str(path))
    checkpoint = open_checkpoint(made)
    assert {stored.form for stored in checkpoint.stored.values()} == {Form.PAIRED}
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    assert checkpoint.config.dtype == names[plain] and checkpoint.config.quantised is None
    with engine_for(folder, dtype="float32", resident_layers=0) as engine:
        expected = all_logits(engine)
    with engine_for(made, dtype="float32", resident_layers=0) as engine:
        assert torch.equal(all_logits(engine), expected)


def test_experts_of_the_first_files_lie_apart(make_tiny, tmp_path):
    """A tensor of each, as files had them before 2024-04: the same names, shapes and bytes."""
    source, read = make_tiny("mixtral", **SHAPE | OWN["mixtral"]), []
    for apart in (False, True):
        path = tmp_path / str(apart) / "a.gguf"
        write_gguf(source, path, OTHERS, more=SAID["mixtral"], apart=apart)
        data, found = path.read_bytes(), open_checkpoint(resolve_model(str(path)))
        read.append(
            {
                name: (extent.shape, data[extent.offset : extent.offset + extent.nbytes])
                for name, extent in found.tensors.items()
            }
        )
        assert {s.form for s in found.stored.values() if s.of_expert} == {Form.Q4_K}
    assert read[0] == read[1]


def test_a_gguf_file_drafts(files):
    """For itself and for the model it is the numbers of; a row out of place would not."""
    path, plain = files("llama")
    draft = DraftConfig(draft=f"model:{path}", draft_tokens=3, draft_weights=DraftWeights.SAME)
    for target in (plain, resolve_model(str(path))):
        with engine_for(target, dtype="float32", resident_layers=0) as engine:
            alone = generate(engine, tokens=8)
        with engine_for(target, dtype="float32", resident_layers=1, draft=draft) as engine:
            assert generate(engine, tokens=8) == alone


def settings_of(family="llama", **changed):
    base = {
        "general.architecture": family,
        f"{family}.block_count": 1,
        f"{family}.context_length": 64,
        f"{family}.embedding_length": 32,
        f"{family}.feed_forward_length": 32,
        f"{family}.attention.head_count": 2,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return base | {key.replace("__", "."): value for key, value in changed.items()}


EMBEDDING = ("token_embd.weight", "F32", (8, 32), bytes(8 * 32 * 4))
QUERY = ("blk.0.attn_q.weight", "Q8_0", (32, 32), bytes(32 * 34))


def factors_for(name):
    """Eight numbers that divide frequencies."""
    return name, "F32", (8,), struct.pack("<8f", *[1.0] * 8)


def refused(tmp_path, data, name="a.gguf"):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(resolve_model(str(tmp_path / name)))
    said = str(caught.value)
    assert "\n" not in said
    return said


OF_EXPERTS = settings_of(llama__expert_count=4, llama__expert_used_count=2)
QUARTER = bytes(32 * 8 * 4)
GEMMA = settings_of("gemma3", gemma3__attention__sliding_window=8)
REFUSED = {
    "version 1": (gguf_bytes({}, [], version=1), "is of version 1: read are versions 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big endian, version 3"),
    "another file": (b"<!DOCTYPE html>" * 9, "is a web page"),
    "countless": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"has {2**60} tensors"),
    "no end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**50), f"has {2**50} settings"),
    "no network": (gguf_bytes({}, []), "general.architecture is None"),
    "another network": (
        gguf_bytes({"general.architecture": "mamba"}, [EMBEDDING]),
        "network of kind 'mamba' (1.00 KiB): read from GGUF are llama, qwen2, qwen3, gemma2",
    ),
    "experts": (
        gguf_bytes(settings_of("qwen2", qwen2__expert_count=8), [EMBEDDING]),
        "network of kind 'qwen2 with experts'",
    ),
    "one expert's matrix as all": (
        gguf_bytes(OF_EXPERTS, [EMBEDDING, ("blk.0.ffn_up_exps.weight", "F32", (32, 8), QUARTER)]),
        "ffn_up_exps.weight' is [32, 8], expected are up to 4096 matrices",
    ),
    "countless experts": (
        gguf_bytes(
            OF_EXPERTS, [EMBEDDING, ("blk.0.ffn_up_exps.weight", "F32", (8192, 1, 1), bytes(2**15))]
        ),
        "ffn_up_exps.weight' is [8192, 1, 1], expected are up to 4096 matrices",
    ),
    "three dimensions of no experts": (
        gguf_bytes(settings_of(), [EMBEDDING, ("output.weight", "F32", (3, 8, 32), bytes(3072))]),
        "'output.weight' has three dimensions, here a matrix has two",
    ),
    "a matrix in two forms": (
        gguf_bytes(
            OF_EXPERTS,
            [
                EMBEDDING,
                ("blk.0.ffn_up_exps.weight", "F32", (8, 1, 1), bytes(32)),
                ("blk.0.ffn_up.0.weight", "F32", (1, 1), bytes(4)),
            ],
        ),
        "'blk.0.ffn_up.0.weight' is there in two forms",
    ),
    "scaling of Gemma": (
        gguf_bytes(GEMMA | {"gemma3.rope.scaling.type": "yarn"}, [EMBEDDING]),
        "scales rotary positions by 'yarn': not supported",
    ),
    "no sliding layers": (
        gguf_bytes(GEMMA | {"gemma3.attention.sliding_window_pattern": 0}, [EMBEDDING]),
        "has one layer in 0 of 1 that sees all: not supported",
    ),
    "a norm of few bits": (
        gguf_bytes(GEMMA, [EMBEDDING, ("output_norm.weight", "BF16", (32,), bytes(64))]),
        "'output_norm.weight' is BF16 [32], a norm is a row of F32",
    ),
    "type that is not read": (
        gguf_bytes(settings_of(), [EMBEDDING, ("output.weight", "IQ2_S", (8, 256), bytes(656))]),
        "weights of type IQ2_S (656 B) among its 1.64 KiB, read are F32, F16, Q4_0",
    ),
    "type that is not known": (
        gguf_bytes(settings_of(), [("token_embd.weight", 77, (8, 32), b"")]),
        "'token_embd.weight' is of type 77, which is not known here",
    ),
    "broken rows": (
        gguf_bytes(settings_of(), [("token_embd.weight", "Q8_0", (8, 33), bytes(999))]),
        "rows of 33 numbers, Q8_0 has them in blocks of 32",
    ),
    "nothing of a side": (
        gguf_bytes(settings_of(), [("token_embd.weight", "F32", (0, 32), b"")]),
        "the shape [32, 0]",
    ),
    "a side of petabytes": (
        gguf_bytes(settings_of(), [("token_embd.weight", "F32", (2**40, 2**40), bytes(64))]),
        "ends at",
    ),
    "twice": (
        gguf_bytes(settings_of(), [EMBEDDING, EMBEDDING]),
        "tensor 'token_embd.weight' twice",
    ),
    "a stranger": (
        gguf_bytes(settings_of(), [EMBEDDING, ("blk.0.ssm_a.weight", "F32", (8,), bytes(32))]),
        "'blk.0.ssm_a.weight' is none of those that llama",
    ),
    "a bias": (
        gguf_bytes(settings_of(), [EMBEDDING, ("blk.0.attn_q.bias", "F32", (32,), bytes(128))]),
        "'blk.0.attn_q.bias' is none of those that llama",
    ),
    "alignment": (
        gguf_bytes(settings_of() | {"general.alignment": 24}, [EMBEDDING]),
        "general.alignment of 24",
    ),
    "heads that do not fit": (
        gguf_bytes(settings_of(llama__attention__head_count=5), [EMBEDDING, QUERY]),
        "32 rows, which are not those of 5 heads",
    ),
    "sizes by layer": (
        gguf_bytes(settings_of(llama__feed_forward_length=[32, 64]), [EMBEDDING]),
        "feed_forward_length is one for each layer",
    ),
    "part of a head turned": (
        gguf_bytes(settings_of(llama__rope__dimension_count=8), [EMBEDDING]),
        "turns 8 of the 16 numbers",
    ),
    "scaling": (
        gguf_bytes(settings_of(llama__rope__scaling__yarn_beta_fast=1.0), [EMBEDDING]),
        "yarn_beta_fast', which is not known here",
    ),
    "scaling of Phi-3": (
        gguf_bytes(settings_of("phi3", phi3__rope__scaling__type="linear"), [EMBEDDING]),
        "scales rotary positions by 'linear': not supported",
    ),
    "one of two factors": (
        gguf_bytes(settings_of("phi3"), [EMBEDDING, factors_for("rope_factors_long.weight")]),
        "has rope_factors_long.weight alone, of two",
    ),
    "factors of another network": (
        gguf_bytes(settings_of(), [EMBEDDING, factors_for("rope_factors_long.weight")]),
        "has rope_factors_long.weight, which llama is not known to have",
    ),
    "no base": (
        gguf_bytes(
            settings_of(llama__rope__freq_base=-1.0), [EMBEDDING, factors_for("rope_freqs.weight")]
        ),
        "a rope.freq_base of -1.0, which is none",
    ),
    "a matrix of one dimension": (
        gguf_bytes(settings_of(), [EMBEDDING, ("blk.0.attn_q.weight", "F32", (32,), bytes(128))]),
        "self_attn.q_proj.weight has 1 dimensions, a matrix has two",
    ),
    "tokens by scores": (
        gguf_bytes(
            settings_of() | {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["a"]},
            [EMBEDDING],
        ),
        "a tokenizer of kind 't5'",
    ),
    "splitting": (
        gguf_bytes(
            settings_of()
            | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]}
            | {"tokenizer.ggml.pre": "new"},
            [EMBEDDING],
        ),
        "splits text as 'new' does",
    ),
    "types of other tokens": (
        gguf_bytes(
            settings_of()
            | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}
            | {"tokenizer.ggml.token_type": [1, 1]},
            [EMBEDDING],
        ),
        "1 tokens and no tokenizer.ggml.token_type for each",
    ),
}


def test_a_file_needs_a_name(tmp_path):
    """Its folder in the cache has it."""
    for name in ("..gguf", "...gguf"):
        assert "needs a name before .gguf" in refused(tmp_path, gguf_bytes({}, []), name)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_gets_a_sentence(tmp_path, case):
    data, says = REFUSED[case]
    assert says in refused(tmp_path, data)


def test_tensors_lie_one_behind_the_other_within_the_file(tmp_path):
    data = gguf_bytes(settings_of(), [EMBEDDING, QUERY])
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16 + 4
    for offset in (0, 32, 2**62):
        moved = data[:at] + struct.pack("<Q", offset) + data[at + 8 :]
        assert "it ends so that it would begin at" in refused(tmp_path, moved)
    assert "the download is not complete" in refused(tmp_path, data[:-1])


def test_no_list_is_made_of_what_a_file_says_alone(tmp_path):
    """A header of 3 MB that would become 3 million numbers, and one that has not what it says."""
    key = "tokenizer.ggml.token_type"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(key) + struct.pack("<IIQ", 9, 0, 3 * 2**20)
    for data, says in ((bytes(3 * 2**20), "accepted are 2097152"), (b"", "does not fit")):
        (tmp_path / "a.gguf").write_bytes(head + data)
        with pytest.raises(CheckpointError, match=says):
            read_gguf(tmp_path, "a.gguf", (key,))
    (tmp_path / "a.gguf").write_bytes(head + bytes(3 * 2**20))
    assert read_gguf(tmp_path, "a.gguf").metadata == {}


def test_what_nobody_asked_for_takes_no_memory(tmp_path):
    """60,000 tokens, a text of 900 kB and a thousand lists, in a header of 9 MB."""
    lists = {f"list.{number}": [0.5] * 1025 for number in range(1000)}
    said = {"tokens": ["a" * 60] * 60_000, "template": "a" * 900_000, "kept": [1, 2]}
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(said | lists, []))
    tracemalloc.start()
    found = read_gguf(tmp_path, "a.gguf").metadata
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == {"kept": (1, 2)} and peak < 4 * 2**20
    wanted = read_gguf(tmp_path, "a.gguf", ("tokens", "template")).metadata
    assert len(wanted["tokens"]) == 60_000 and len(wanted["template"]) == 900_000


def test_matrices_of_countless_experts_are_refused(tmp_path, monkeypatch):
    """No name is made of each."""
    assert tensors_module._TENSOR_LIMIT == 2**18
    monkeypatch.setattr(tensors_module, "_TENSOR_LIMIT", 2**13)
    exps = [(f"blk.{n}.ffn_up_exps.weight", "F32", (4096, 1, 1), bytes(2**14)) for n in range(3)]
    said = refused(tmp_path, gguf_bytes(OF_EXPERTS, [EMBEDDING, *exps]))
    assert "has matrices of more than 8192 experts" in said


def whole():
    """A file with something of everything."""
    words = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, 1.0]}
    return gguf_bytes(settings_of(x__y=True) | words, [EMBEDDING, QUERY])


WHOLE = whole()


def test_a_file_that_ends_anywhere_gets_a_sentence(tmp_path):
    for end in range(0, len(WHOLE), 11):
        (tmp_path / f"{end}.gguf").write_bytes(WHOLE[:end])
        with pytest.raises(CheckpointError):
            read_gguf(tmp_path, f"{end}.gguf", ("tokenizer.ggml.tokens",))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 2300), st.integers(0, 255)), max_size=4))
def test_any_bytes_are_read_or_get_a_sentence(changes):
    data = bytearray(WHOLE)
    for at, byte in changes:
        data[at] = byte
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.gguf"
        path.write_bytes(data)
        os.environ["OFFLOAD_RT_CACHE"] = place
        try:
            found = read_gguf(path.parent, path.name, ("tokenizer.ggml.tokens",))
            assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in found.tensors)
            open_checkpoint(resolve_model(str(path)))
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_one_model_in_several_files(files, tmp_path):
    """Any of them, or their folder, means all; one too few does not."""
    path, _ = files("qwen2")
    header = read_gguf(path.parent, path.name, ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    data = path.read_bytes()
    tensors = [
        (t.name, t.type.name, t.shape, data[t.offset : t.offset + t.nbytes]) for t in header.tensors
    ]
    names = [f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        facts = {"split.no": number, "split.count": 3, "split.tensors.count": len(tensors)}
        kept = {k: v for k, v in header.metadata.items() if k.startswith(("general", "qwen2"))}
        facts |= {"general.alignment": 64} if number else kept
        part = gguf_bytes(facts, tensors[number::3], alignment=64)
        (tmp_path / name).write_bytes(part)
    found = resolve_model(str(tmp_path / names[1]))
    assert found == resolve_model(str(tmp_path)) and found.name == "m"
    options = {"dtype": "float32", "resident_layers": 0}
    with engine_for(resolve_model(str(path)), **options) as engine:
        expected = all_logits(engine)
    with engine_for(found, **options) as engine:
        assert torch.equal(all_logits(engine), expected)
    os.rename(tmp_path / names[2], tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="00003-of-00003.gguf is missing, 1 of the 3"):
        resolve_model(str(tmp_path / names[0]))
    with pytest.raises(CheckpointError, match="holds 2 models as GGUF"):
        resolve_model(str(tmp_path))


def test_files_that_change_or_go_are_not_mistaken(files, tmp_path):
    path, _ = files("qwen3")
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(path.read_bytes())
    first = resolve_model(str(mine))
    assert resolve_model(str(mine)) == first and open_checkpoint(first).name == "mine"
    os.utime(mine, (1, 1))
    assert resolve_model(str(mine)) != first
    mine.unlink()
    with pytest.raises(CheckpointError, match="is a link to a file that is gone"):
        open_checkpoint(first)
    resolve_model(str(path))
    assert not first.exists()


def test_factors_of_frequencies_are_those_of_llama_3(make_tiny, tmp_path):
    """Named where they are that, and otherwise taken number by number."""
    source = make_tiny("llama", **SHAPE)
    stated = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config = LlamaConfig(rope_theta=5e5, rope_scaling=dict(stated), **shape)
    turned, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = 5e5 ** -(torch.arange(0, 64, 2) / 64) / turned
    assert factors.min() == pytest.approx(1) and factors.max() > 31
    for change, kind in ((1.0, "llama3"), (1.25, "longrope")):
        data = (factors * change).numpy().astype("<f4").tobytes()
        more = {
            "llama.rope.freq_base": 5e5,
            "tensors": [("rope_freqs.weight", "F32", (32,), data)],
        }
        path, plain = write_gguf(source, tmp_path / kind / "a.gguf", {}, more=more)
        made = json.loads((resolve_model(str(path)) / "config.json").read_text())
        assert made["rope_scaling"]["rope_type"] == kind
        if kind == "llama3":
            said = made["rope_scaling"]
            assert said == {
                k: v if k == "rope_type" else pytest.approx(v) for k, v in stated.items()
            }
        again = LlamaConfig(rope_theta=5e5, rope_scaling=made["rope_scaling"], **shape)
        found, scale = ROPE_INIT_FUNCTIONS[kind](again, "cpu", seq_len=8)
        assert scale == 1.0 and torch.allclose(found, turned / change, rtol=1e-5)


def test_the_command_line_takes_the_file(files, offload_run):
    path, plain = files("llama")
    shared = ("quick brown fox", "--max-tokens", "8", "--dtype", "float32", "--raw")
    expected = offload_run("generate", plain, *shared)
    for draft in ("none", f"model:{path}"):
        done = offload_run("generate", path, *shared, "--draft", draft)
        assert done.code == 0 and done.out == expected.out, done.err
    done = offload_run("plan", path, "--device-memory", "512MiB")
    assert done.code == 0 and "GGUF, Q4_K and Q5_0 and Q5_K and Q6_K and Q8_0" in done.out


def tokenizer_of(tmp_path, metadata):
    from tokenizers import Tokenizer

    made = describe_text(tmp_path / "a.gguf", metadata).files["tokenizer.json"]
    return Tokenizer.from_str(json.dumps(made))


TEXTS = st.text() | st.lists(
    st.sampled_from(["the quick", " brown", "<|im_end|>", "12", "\n\n", "é", "'s", "  "])
).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_bytes_become_the_tokens_of_the_original(tiny_model, tmp_path_factory, text):
    from tokenizers import Tokenizer

    original = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in BYTES(tiny_model).items()}
    made = tokenizer_of(tmp_path_factory.getbasetemp(), lists)
    ids = original.encode(text, add_special_tokens=False).ids
    assert made.encode(text, add_special_tokens=False).ids == ids
    assert made.decode(ids, skip_special_tokens=False) == original.decode(
        ids, skip_special_tokens=False
    )


BYTES = functools.cache(tokenizer_settings)
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.tokens": (
        *("<unk>", "<s>", "</s>"),
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *("\u2581a", "ab", "\u2581ab", "bc", "\u2581", "a", "b", "c", "<mark>"),
    ),
    "tokenizer.ggml.token_type": (2, 3, 3, *[6] * 256, *[1] * 8, 4),
    "tokenizer.ggml.scores": (*[0.0] * 259, -3.0, -1.0, -4.0, -2.0, *[-9.0] * 4, 0.0),
}


def test_pieces_are_merged_by_their_scores(tmp_path):
    """`ab` (-1) before `bc` (-2) before `_a` (-3), whatever comes first in the text."""
    made = tokenizer_of(tmp_path, PIECES)
    assert made.encode("abc bc").tokens == ["<s>", "\u2581ab", "c", "\u2581", "bc"]
    assert made.encode("a<mark>b").tokens == ["<s>", "\u2581a", "<mark>", "\u2581", "b"]
    assert made.encode("\u00e9", add_special_tokens=False).ids == [263, 3 + 0xC3, 3 + 0xA9]
    for words in ("abc bc", "é 你好\n\tb", "  a", ""):
        ids = made.encode(words, add_special_tokens=False).ids
        assert made.decode(ids) == words
    plain = tokenizer_of(tmp_path, PIECES | {"tokenizer.ggml.add_space_prefix": False})
    assert plain.encode("abc").tokens == ["<s>", "ab", "c"]
    bare = tokenizer_of(tmp_path, PIECES | {"tokenizer.ggml.add_bos_token": False})
    assert bare.encode("c").tokens == ["\u2581", "c"]


def test_what_ends_an_answer_is_what_the_file_and_its_chat_say(tmp_path):
    tokens = {"tokenizer.ggml.tokens": ("a", "<|endoftext|>", "<|im_end|>", "<|im_end|>")}
    said = {"tokenizer.ggml.token_type": (1, 3, 3, 1), "tokenizer.ggml.merges": ()}
    named = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}
    sampled = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    found = describe_text(tmp_path, tokens | said | named | sampled)
    assert found.files["generation_config.json"] == {
        "eos_token_id": [1, 2],
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 20,
    }
    of_file = tokens | said | named | {"tokenizer.ggml.eos_token_id": 0}
    assert describe_text(tmp_path, of_file).config["eos_token_id"] == [0, 1, 2]


SPLIT = {  # by the expressions of the models' own tokenizer.json; Ġ is a space, Ċ a line's end
    "gpt-2": "We|'|LL|ĠpayTen|Ġ1234|/|ĊĊĠ|Ġwe|'ll",
    "smollm": "We|'|LL|ĠpayTen|Ġ|1|2|3|4|/|ĊĊĠ|Ġwe|'ll",
    "llama-bpe": "We|'LL|ĠpayTen|Ġ|123|4|/ĊĊ|Ġ|Ġwe|'ll",
    "qwen2": "We|'LL|ĠpayTen|Ġ|1|2|3|4|/ĊĊ|Ġ|Ġwe|'ll",
    "deepseek-coder": "We|'|LL|ĠpayTen|Ġ|1|2|3|4|/|Ċ|Ċ|Ġ|Ġwe|'|ll",
    "tekken": "We|'LL|Ġpay|Ten|Ġ|1|2|3|4|/ĊĊ|Ġ|Ġwe|'ll",
    "gpt-4o": "We'LL|Ġpay|Ten|Ġ|123|4|/ĊĊ|Ġ|Ġwe'll",
}


@pytest.mark.parametrize("pre", SPLIT)
def test_text_is_split_as_the_file_names_it(tmp_path, pre):
    lists = {"tokenizer.ggml.tokens": ("a",), "tokenizer.ggml.merges": ()}
    made = tokenizer_of(
        tmp_path, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, **lists}
    )
    found = made.pre_tokenizer.pre_tokenize_str("We'LL payTen 1234/\n\n  we'll")
    assert "|".join(word for word, _ in found) == SPLIT[pre]


def test_doctor_reads_from_the_disk_of_the_file(files, tmp_path):
    path, _ = files("llama")
    found = _disk(resolve_model(str(path)))
    assert found.folder == path.parent.resolve() and found.direct_reads is not None
