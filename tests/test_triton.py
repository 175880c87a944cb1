"""Kernels for a GPU, in Triton's interpreter: bit for bit what torch and numpy make of a weight."""

import importlib
import os

import numpy as np
import pytest
import torch
from gguf_files import formula, paired, random_blocks
from quantised import CASES
from test_formats import found
from torch._subclasses.fake_tensor import FakeTensorMode

from offload_rt.model.formats import on_gpu
from offload_rt.model.formats.methods import BLOCKS, Form
from offload_rt.model.formats.planes import encode
from offload_rt.model.formats.stored import Stored
from offload_rt.model.formats.wired import dequantise
from offload_rt.model.layout import CODED_PART
from offload_rt.model.packed_files import NAMED, piece_weights
from offload_rt.model.weight_files import WeightFiles

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
FORMATS = (torch.bfloat16, torch.float16, torch.float32)
MEMORY = torch.device("cpu")
# Numbers that need no kernel of their own: tables of bitsandbytes, and bits that no word holds.
BY_TORCH = {Form.BNB4, Form.BNB8}


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernels as Triton's interpreter runs them, on memory of the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        for name in ("sum", "cumsum"):  # made when triton was imported
            patch.setattr(tl, name, triton.jit(getattr(tl, name).fn))
        from offload_rt.model.formats import triton_kernels

        importlib.reload(triton_kernels)
        on_gpu._launches.cache_clear()
        yield
    importlib.reload(triton_kernels)
    on_gpu._launches.cache_clear()


def both(stored, parts, dtype):
    """A weight by its kernel and by torch; and what no kernel wrote stays 7."""
    made = on_gpu.bring_for(stored, MEMORY)
    out, expected = (
        torch.full((stored.outputs, stored.inputs), 7.0, dtype=dtype) for _ in range(2)
    )
    made(stored, parts, out)
    dequantise(stored, parts, expected)
    return out, expected


@pytest.mark.parametrize("case", CASES)
def test_kernels_make_the_numbers_of_the_law(tmp_path, case):
    """Of sizes that fill no block, too: by the formula in fp64 and by torch's way."""
    tensors, numbers, files = found(tmp_path, case, (72, 192))
    (stored,) = set(tensors.by_part.values())
    if stored.form in BY_TORCH or 32 % stored.bits:
        assert on_gpu.bring_for(stored, MEMORY) is None
        return
    reader = WeightFiles(files)
    parts = {word: reader.read(extent) for word, extent in stored.parts.items()}
    reader.close()
    for dtype in FORMATS:
        made, expected = both(stored, parts, dtype)
        assert torch.equal(made, numbers.float().to(dtype)), dtype
        assert torch.equal(made, expected)
    word = next(iter(parts))  # of codes
    parts[word] = parts[word].clone()
    parts[word].view(-1).view(torch.uint8)[0] ^= 1
    assert not torch.equal(both(stored, parts, torch.float32)[0], numbers.float())


@pytest.mark.parametrize("form", BLOCKS)
def test_blocks_of_gguf_are_one_launch(monkeypatch, form):
    """Any bytes, of sizes that fill no block of a program; rows in order and in pairs."""
    inputs = BLOCKS[form][0] * (9 if BLOCKS[form][0] == 32 else 2)
    data = random_blocks(form, 18, inputs, np.random.default_rng(2))
    numbers = torch.from_numpy(formula(form, data))
    launched, run = [], on_gpu.dequantise
    monkeypatch.setattr(
        on_gpu, "dequantise", lambda name, *rest: (launched.append(name), run(name, *rest))
    )
    ways = (0, data, FORMATS), (3, paired(data, 3), FORMATS[:1])
    for heads, rows, formats in ways:
        stored = Stored(
            module="m",
            form=form,
            outputs=18,
            inputs=inputs,
            bits=4,
            groups=1,
            parts={},
            heads=heads,
        )
        for dtype in formats:
            made, expected = both(stored, {"weight": torch.from_numpy(rows)}, dtype)
            assert torch.equal(made, numbers.to(dtype)), dtype
            assert torch.equal(made, expected)
    assert len(launched) == len(FORMATS) + 1
    wild = np.random.default_rng(3).integers(0, 256, data.shape, dtype=np.uint8)
    made, expected = both(stored, {"weight": torch.from_numpy(wild)}, torch.float32)
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(made.nan_to_num(0.5), expected.nan_to_num(0.5))


def test_every_fp8_number_is_what_torch_says():
    """Subnormals and both zeros; two codes are no numbers."""
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(4, 64)
    stored = Stored(
        module="m", form=Form.FP8, outputs=4, inputs=64, bits=8, groups=1, parts={}, block=(4, 64)
    )
    out = torch.empty(4, 64)
    parts = {"weight": codes, "weight_scale": torch.ones(1)}
    on_gpu.bring_for(stored, MEMORY)(stored, parts, out)
    expected = codes.float()
    same = torch.equal(out.nan_to_num(9e9), expected.nan_to_num(9e9))
    assert same and torch.equal(out.signbit()[:3], expected.signbit()[:3])


WORDS = {
    "trained": lambda dice, n: dice.normal(size=n) * 0.02,
    "zeros": lambda dice, n: dice.normal(size=n) * (dice.random(n) < 0.7),
    "wide": lambda dice, n: dice.normal(size=n) * 2.0 ** dice.integers(-30, 30, n),
}


codes = pytest.mark.parametrize("bits", NAMED.values(), ids=NAMED)


@codes
@pytest.mark.parametrize("which", [*WORDS, "any bits"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 333), (60, 620)])
def test_coded_bits_come_back(which, shape, bits, monkeypatch):
    """Pieces that are coded and pieces as they are, escapes in several groups, NaN and infinite."""
    monkeypatch.setattr("offload_rt.model.packed_files.PIECE_WEIGHTS", 2**14 + 64)
    monkeypatch.setattr("offload_rt.model.formats.on_gpu.piece_weights", piece_weights)
    dice, count = np.random.default_rng(5), shape[0] * shape[1]
    if which == "any bits":
        words = dice.integers(0, 2**16, count).astype(np.uint16)
    else:
        numbers = WORDS[which](dice, count).astype(np.float32)
        words = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        words[::97] = dice.integers(0, 2**16, words[::97].size)
    each = piece_weights(count)
    pieces = [encode(words[at : at + each], bits) for at in range(0, count, each)]
    starts = np.concatenate([[0], np.cumsum([piece.size for piece in pieces])])
    stored = Stored(
        module="m",
        form=Form.CODED,
        outputs=shape[0],
        inputs=shape[1],
        bits=bits,
        groups=1,
        parts={},
        pieces=tuple(map(int, starts)),
    )
    parts = {CODED_PART: torch.from_numpy(np.concatenate(pieces))}
    made, expected = both(stored, parts, torch.bfloat16)
    assert np.array_equal(made.view(torch.int16).numpy().reshape(-1).view(np.uint16), words)
    assert torch.equal(made.view(torch.int16), expected.view(torch.int16))
    if which == "wide" or (which != "any bits" and count < 1000):
        wide = made.float().nan_to_num(3.0, 1e30, -1e30)
        for dtype in FORMATS[1:]:
            other, _ = both(stored, parts, dtype)
            bound = torch.finfo(dtype).max
            near = other.float().nan_to_num(3.0, 1e30, -1e30)
            inside = wide.abs() < bound
            assert torch.equal(near[inside], wide.to(dtype).float()[inside])


@codes
def test_damaged_pieces_write_nowhere_else(bits):
    """Random bytes behind a head: nothing outside of the weight changes."""
    dice = np.random.default_rng(1)
    words = dice.integers(0x3C00, 0x3F00, 5000).astype(np.uint16)
    words[::50] = 0xFFFF
    piece = encode(words, bits)
    for _ in range(5):
        bad = piece.copy()
        bad[-900:] = dice.integers(0, 256, 900)
        stored = Stored(
            module="m",
            form=Form.CODED,
            outputs=50,
            inputs=100,
            bits=bits,
            groups=1,
            parts={},
            pieces=(0, bad.size),
        )
        room = torch.full((5000 + 2 * 4096,), 7.0, dtype=torch.bfloat16)
        out = room[4096:-4096].view(50, 100)
        on_gpu.bring_for(stored, MEMORY)(stored, {CODED_PART: torch.from_numpy(bad)}, out)
        assert (room[:4096] == 7).all() and (room[-4096:] == 7).all()


def test_fake_tensors_see_an_operator():
    """What traces a pass runs no kernel."""
    stored = Stored(module="m", form=Form.PACKED, outputs=8, inputs=64, bits=4, groups=2, parts={})
    with FakeTensorMode():
        parts = {
            "weight_packed": torch.empty(8, 8, dtype=torch.int32, device="cuda"),
            "weight_scale": torch.empty(8, 2, device="cuda"),
        }
        out = torch.empty(8, 64, device="cuda")
        on_gpu.bring_for(stored, out.device)(stored, parts, out)
