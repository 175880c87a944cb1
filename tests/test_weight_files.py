"""Reading weights: exact bytes whatever the kernel does, and a sentence when files change."""

import errno
import os
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import DEEP

from offload_rt.device.base import PAGE_BYTES
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.host_memory import LARGE_PAGE_BYTES, allocate_host
from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.model import weight_files as files_module
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.layout import plan_layout
from offload_rt.model.weight_files import FileSource, WeightFiles


@pytest.fixture
def model(make_tiny, tmp_path):
    """A private copy, since these tests change it."""
    import shutil

    return shutil.copytree(make_tiny("llama", dtype="bfloat16", **DEEP), tmp_path / "model")


def read_layer(checkpoint, layout, files, device):
    image = allocate_host(layout.nbytes)
    device.copy.copy(image, FileSource(layout, files))
    device.copy.record().synchronize()
    return {
        p.name: image.tensor[p.offset : p.offset + p.nbytes]
        .view(getattr(torch, p.dtype))
        .view(p.shape)
        for p in layout.placements
    }


@pytest.fixture
def device():
    device = CpuDevice(readers=3)
    yield device
    device.close()


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tensor_arrives(model, device, packing, direct, dtype):
    checkpoint = open_checkpoint(model)
    expected = load_file(model / "model.safetensors")
    files = WeightFiles(checkpoint.files, direct=direct)
    for extents in checkpoint.layers:
        layout = plan_layout(extents, dtype, packing)
        got = read_layer(checkpoint, layout, files, device)
        assert got.keys() == {e.name for e in extents}
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype))
    files.close()


def test_images_have_room_for_whole_pages_and_no_two_runs_share_one(model):
    checkpoint = open_checkpoint(model)
    for extents in (*checkpoint.layers, checkpoint.others):
        layout = plan_layout(extents, "bfloat16", Packing.FILE)
        pages = []
        for run in layout.runs:
            assert run.in_place
            assert (run.file_offset - run.image_offset) % PAGE_BYTES == 0
            last = run.image_offset + run.nbytes - 1
            pages += range(run.image_offset // PAGE_BYTES, last // PAGE_BYTES + 1)
        assert len(pages) == len(set(pages))
        assert (max(pages) + 1) * PAGE_BYTES <= layout.nbytes


def test_device_packing_starts_tensors_where_kernels_like_them(model):
    checkpoint = open_checkpoint(model)
    layout = plan_layout(checkpoint.layers[0], "bfloat16", Packing.DEVICE)
    assert all(p.offset % 256 == 0 for p in layout.placements)
    ends = sorted((p.offset, p.offset + p.nbytes) for p in layout.placements)
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 6000), min_size=1, max_size=8), block=st.integers(1, 9))
def test_short_reads_are_completed(make_tiny, cuts, block):
    """Any read may return less than asked for; a direct one goes on at a page border."""
    checkpoint = open_checkpoint(make_tiny("llama", dtype="bfloat16", **DEEP))
    expected = load_file(checkpoint.folder / "model.safetensors")
    served = []

    def preadv(fd, buffers, offset):
        served.append(offset)
        size = min(len(buffers[0]), cuts[len(served) % len(cuts)] + PAGE_BYTES)
        return os.preadv(fd, [buffers[0][: size // PAGE_BYTES * PAGE_BYTES]], offset)

    device, before = CpuDevice(readers=1), files_module.PIECE_BYTES
    files_module.PIECE_BYTES = block * PAGE_BYTES
    try:
        files = WeightFiles(checkpoint.files, preadv=preadv)
        layout = plan_layout(checkpoint.layers[1], "bfloat16", Packing.FILE)
        got = read_layer(checkpoint, layout, files, device)
        assert all(torch.equal(got[name], expected[name]) for name in got)
    finally:
        files_module.PIECE_BYTES = before
        device.close()


def change_truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def change_rewrite(path):
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)


def change_replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def change_remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_truncate, "truncated while running|changed while running"),
        (change_rewrite, "changed while running"),
        (change_replace, "changed while running"),
        (change_remove, "removed while running"),
    ],
)
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_changes_ends_the_run_with_a_sentence(model, device, change, message, direct):
    checkpoint = open_checkpoint(model)
    files = WeightFiles(checkpoint.files, direct=direct)
    layout = plan_layout(checkpoint.layers[3], "bfloat16", Packing.FILE)
    read_layer(checkpoint, layout, files, device)
    change(model / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_layer(checkpoint, layout, files, device)
    assert "model.safetensors" in str(caught.value)


def test_single_rows_are_read_and_nothing_else(model):
    """Each once, through short reads; the file's end, and its change, get a sentence."""
    checkpoint, asked = open_checkpoint(model), []

    def preadv(fd, buffers, offset):
        part = buffers[0][:100]
        asked.append((offset, len(part)))
        return os.preadv(fd, [part], offset)

    own = checkpoint.embedding
    ids = torch.tensor([7, 299, 0, 7])
    with closing(WeightFiles(checkpoint.files, preadv=preadv, direct=False)) as files:
        whole = files.read(own)
        asked.clear()
        assert torch.equal(files.rows(own, ids), whole[ids])
        each = own.nbytes // 300
        for number in (0, 7, 299):
            start = own.offset + number * each
            reads = [(at, n) for at, n in asked if start <= at < start + each]
            assert sum(n for _, n in reads) == each
        assert sum(n for _, n in asked) == 3 * each
        os.truncate(own.path, own.offset + 250 * each)
        with pytest.raises(CheckpointError, match="truncated while running"):
            files.rows(own, ids)
        with pytest.raises(CheckpointError, match="changed while running"):
            files.rows(own, ids[:1])


def test_a_file_that_changed_between_header_and_open_is_refused(model):
    checkpoint = open_checkpoint(model)
    change_rewrite(model / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed while running"):
        WeightFiles(checkpoint.files)


def test_a_read_error_names_file_place_and_reason(model, device):
    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpoint = open_checkpoint(model)
    files = WeightFiles(checkpoint.files, preadv=broken)
    layout = plan_layout(checkpoint.layers[0], "bfloat16", Packing.FILE)
    with pytest.raises(CheckpointError, match="reading .* bytes at .* failed: Input/output error"):
        read_layer(checkpoint, layout, files, device)


def test_a_file_system_without_direct_reads_is_read_plainly(model, device, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    checkpoint = open_checkpoint(model)
    files = WeightFiles(checkpoint.files)
    assert not files.direct
    layout = plan_layout(checkpoint.layers[0], "bfloat16", Packing.FILE)
    expected = load_file(model / "model.safetensors")
    got = read_layer(checkpoint, layout, files, device)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_host_memory_is_exactly_what_was_asked_for():
    for nbytes in (1, 4096, 5_000_000):
        buffer = allocate_host(nbytes)
        assert buffer.nbytes == len(buffer.view) == nbytes
        assert buffer.tensor.data_ptr() % PAGE_BYTES == 0


def test_large_host_memory_begins_at_a_huge_page():
    """Else one of 4 MiB has one, and a direct read into small pages is hundreds of requests."""
    for nbytes in (2**21, 2**22 + 2 * PAGE_BYTES, 2**23 + 1):
        buffers = [allocate_host(nbytes) for _ in range(3)]
        for buffer in buffers:
            assert buffer.tensor.data_ptr() % LARGE_PAGE_BYTES == 0
            assert buffer.nbytes == len(buffer.view) == nbytes
            buffer.view[-1:] = b"x"
            assert buffer.tensor[-1] == ord("x")


def test_a_file_that_ends_inside_a_page_ends_the_read(model):
    files = WeightFiles(open_checkpoint(model).files)
    (file,) = files._files.values()
    os.truncate(file.identity.path, 2 * PAGE_BYTES + 100)
    with pytest.raises(CheckpointError, match=f"ends at byte {2 * PAGE_BYTES + 100}"):
        files._read(file, allocate_host(8 * PAGE_BYTES).view, 0, 4 * PAGE_BYTES)
    files.close()
