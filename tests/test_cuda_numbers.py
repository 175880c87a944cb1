"""The CUDA device over CPU memory: what it copies gives the same logits bit for bit."""

import pytest
import torch
from engines import all_logits, engine_for

from offload_rt.config import HomeKind
from offload_rt.device.base import STAGING_BYTES
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda import pinned as pinned_module
from offload_rt.device.cuda import streams as streams_module
from offload_rt.device.cuda.device import CudaDevice
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import CUDA, Packing
from offload_rt.engine import engine as engine_module
from offload_rt.model import weight_files as files_module
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.network import Network
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.streaming import memory_home as home_module


class Eager:
    """A driver whose streams do everything at once, an event and a stream of it included."""

    def __init__(self, *, pin=True, allocates_pinned=False):
        self.pin, self.allocates_pinned = pin, allocates_pinned

    def missing(self, index):
        return None

    def open(self, device):
        return self, self

    def allocate(self, nbytes, device):
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN, if it were read

    def memory(self, device):
        return 2**30, 2**30

    def register(self, address, nbytes):
        return None if self.pin else "refused by the test"

    def unregister(self, address):
        pass

    def allocate_pinned(self, nbytes):
        return allocate_host(nbytes).tensor if self.allocates_pinned else None  # whole pages

    def upload(self, source, device):
        return source.clone()

    def record(self):
        return self

    def wait(self, event):
        pass

    def copy(self, dst, src):
        dst.copy_(src)

    def synchronize(self):
        pass

    def done(self):
        return True

    def seconds_until(self, later):
        return 0.0


@pytest.fixture
def open_as(monkeypatch):
    """Let the engine open this device, computing on the CPU, with layers laid out for a GPU."""

    def use(device):
        device.torch_device = torch.device("cpu")
        device.kind = CUDA  # of the CPU's, too: images that lie alike are computed alike
        monkeypatch.setattr(engine_module, "open_device", lambda _: device)

    return use


@pytest.mark.parametrize(
    ("home", "driver", "dtype"),
    [
        (HomeKind.HOST, Eager(), "bfloat16"),
        (HomeKind.HOST, Eager(pin=False), "float32"),
        (HomeKind.HOST, Eager(pin=False, allocates_pinned=True), "float32"),
        (HomeKind.DISK, Eager(), "bfloat16"),
    ],
)
def test_same_logits_as_resident(tiny_model, open_as, monkeypatch, home, driver, dtype):
    open_as(CpuDevice())
    with engine_for(tiny_model, dtype=dtype, resident_layers=4) as engine:
        resident = all_logits(engine)
    for module in (files_module, home_module):  # many pieces per tensor
        monkeypatch.setattr(module, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(pinned_module, "STAGING_BYTES", 20_000 + 2 * 4096)
    monkeypatch.setattr(streams_module, "COPY_BYTES", 30_000)
    monkeypatch.setattr(pinned_module, "UPLOAD_BYTES", 8 * 5)  # in parts, too
    open_as(CudaDevice(0, driver=driver))
    with engine_for(tiny_model, dtype=dtype, slots=2, resident_layers=1, home=home) as engine:
        assert torch.equal(all_logits(engine), resident)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "auto")]
)
def test_pieces_and_blocks_make_the_same_image(make_tiny, monkeypatch, stored, dtype):
    monkeypatch.setattr(files_module, "PIECE_BYTES", 20_000)
    checkpoint = open_checkpoint(make_tiny(dtype=stored))
    layout = Network(checkpoint, dtype, Packing.DEVICE).layouts[1]
    files = WeightFiles(checkpoint.files)
    source = FileSource(layout, files)
    by_blocks, by_pieces = allocate_host(layout.nbytes), allocate_host(layout.nbytes)
    for block in source.blocks(by_blocks):
        block.run()
    staging = allocate_host(STAGING_BYTES)
    for piece in reversed(source.pieces()):
        data = piece.load(staging)
        assert data.numel() == piece.image_bytes <= 20_000
        by_pieces.tensor[piece.offset : piece.offset + piece.image_bytes].copy_(data)
    assert by_blocks.tensor.any()
    assert torch.equal(by_blocks.tensor, by_pieces.tensor)
    assert sum(p.nbytes for p in source.pieces()) == source.nbytes
    files.close()
