"""A GPU that is not there: the driver of `device/cuda` as a double that records and checks.

Kernels: under `FakeTensorMode` torch computes shapes and devices of tensors on `cuda:0` without a
GPU. It raises by itself when devices are mixed or a value is read back (`.item()`). On top of it
`FakeKernels` sees every operation, notes which device buffers it reads and writes, and refuses
copies between host and device that do not go through the driver: on a GPU those make the host wait.

Streams: those of `device.sim`, with a vector clock each. An access that no event orders after the
work it depends on raises `StreamOrderError`. The host threads that fill staging buffers are streams
too: they know what they have waited for with `synchronize`.
"""

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from offload_rt.device.cuda import streams
from offload_rt.device.sim import SimBuffer, SimEvent, SimStream
from offload_rt.errors import StreamOrderError

GIB = 2**30
KERNEL_S = 1e-6
HOST_PART_BYTES = 1024  # that copies of rows home begin and end at, in the tests there are
LINK_BYTES_PER_S = 1e9


class HiddenSyncError(AssertionError):
    """A copy between host and device that makes the host wait."""


@dataclass(frozen=True, slots=True)
class FakeEvent:
    """A point in a simulated stream; a host thread that synchronises learns what came before."""

    gpu: "FakeCuda"
    event: SimEvent

    def synchronize(self):
        with self.gpu.lock:
            self.gpu.host_syncs[threading.current_thread().name] += 1
            self.gpu.host().wait(self.event)

    def done(self):
        return True

    def seconds_until(self, later):
        return later.event.time_s - self.event.time_s


@dataclass(frozen=True, slots=True)
class FakeStream:
    """A simulated stream behind the driver's protocol."""

    gpu: "FakeCuda"
    sim: SimStream

    def record(self):
        with self.gpu.lock:
            self.gpu.trace.append(("record", self.sim.name))
            return FakeEvent(self.gpu, self.sim.record())

    def wait(self, event):
        with self.gpu.lock:
            self.gpu.trace.append(("wait", self.sim.name))
            self.sim.wait(event.event)

    def copy(self, dst, src):
        assert (dst.shape, dst.dtype, src.dtype) == (src.shape, torch.uint8, torch.uint8)
        assert dst.is_contiguous() and src.is_contiguous()
        if key(src) in self.gpu.buffers:
            self._copy_back(dst, src)
            return
        if threading.current_thread() is threading.main_thread():  # elsewhere the mode is not ours
            assert dst.device in self.gpu.computes and src.device == torch.device("cpu")
        with self.gpu.lock:
            slot, source = self.gpu.buffers[key(dst)], self.gpu.host_buffers(src)
            self.gpu.trace.append(("copy", self.gpu.names[key(dst)]))
            self.gpu.copied_bytes += src.numel()
            self.gpu.copy_sizes.append(src.numel())
            self.gpu.unpinned_copies += not self.gpu.is_registered(src)
            seconds = src.numel() / LINK_BYTES_PER_S
            self.gpu.enqueue(self.sim)
            self.sim.kernel(reads=source, writes=[slot], seconds=seconds)

    def _copy_back(self, dst, src):
        assert dst.device == torch.device("cpu")
        with self.gpu.lock:
            home, source = self.gpu.host_buffers(dst), self.gpu.buffers[key(src)]
            self.gpu.trace.append(("copy back", self.gpu.names[key(src)]))
            self.gpu.copied_back_bytes += src.numel()
            self.gpu.unpinned_copies += not self.gpu.is_registered(dst)
            self.gpu.enqueue(self.sim)
            seconds = src.numel() / LINK_BYTES_PER_S
            self.sim.kernel(reads=[source], writes=home, seconds=seconds)

    def synchronize(self):
        FakeEvent(self.gpu, self.sim.record()).synchronize()


@dataclass(eq=False)
class FakeCuda:
    """The driver double.

    Attributes:
        gpus: devices this machine pretends to have; 0 pretends that torch has no CUDA.
        free_bytes: device memory that is left.
        refuse_from: buffers of at least this many bytes cannot be registered.
        pinnable_bytes: that can be pinned in all, as on WSL.
        allocates_pinned: it has pinned memory of its own.
        strict: refuse copies that pass the driver by (while a step runs).
    """

    gpus: int = 2
    free_bytes: int = 8 * GIB
    refuse_from: int = 64 * GIB
    pinnable_bytes: int = 64 * GIB
    allocates_pinned: bool = False
    strict: bool = False
    inside: bool = False
    device: torch.device | None = None
    trace: list = field(default_factory=list)
    buffers: dict = field(default_factory=dict)
    kept: list = field(default_factory=list)
    names: dict = field(default_factory=dict)
    registered: dict = field(default_factory=dict)
    allocated_pinned: dict = field(default_factory=dict)
    unregistered: list = field(default_factory=list)
    host_syncs: Counter = field(default_factory=Counter)
    downloads: int = 0
    captures: int = 0
    refuses_captures: bool = False
    replaying: bool = False
    copied_bytes: int = 0
    copy_sizes: list = field(default_factory=list)
    copied_back_bytes: int = 0
    unpinned_copies: int = 0
    uploads: int = 0
    mapped_bytes: int = 0
    unpinned_uploads: int = 0

    def __post_init__(self):
        self.lock = threading.RLock()
        self.computes, self.hops = {}, 0
        self._streams = Counter()  # of each GPU
        self._received = {}  # by source: the hop its later kernels have to come after
        self._hosts, self._host_buffers = {}, WeakIdKeyDictionary()

    def missing(self, index):
        if index >= self.gpus:
            return f"this machine has {self.gpus} GPUs"
        return None

    @property
    def compute(self):
        return self.computes[self.device]

    def open(self, device):
        self.device = self.device or device
        number = f" {len(self.computes)}" if self.computes else ""
        compute, copies = SimStream(f"compute{number}"), SimStream(f"copy{number}")
        self.computes[device] = compute
        return FakeStream(self, compute), FakeStream(self, copies)

    def stream(self, device):
        number = [*self.computes].index(device)
        self._streams[number] += 1
        name = "kv" if self._streams[number] % 2 else "kv back"  # as `KVSpace` asks for them
        return FakeStream(self, SimStream(f"{name} {number}" if number else name))

    def receive(self, tensor, device):
        """A hop: both compute streams are ordered around it by whoever asks."""
        with self.lock:
            source, target = self.computes[tensor.device], self.computes[device]
            self._require(
                target, source.name, source._clock[source.name], "read before it was made"
            )
            target.kernel(reads=[], writes=[], seconds=KERNEL_S)
            self._received[source.name] = target.name, target._clock[target.name]
            self.hops += 1
        with self.inside_driver():
            return tensor.to(device, non_blocking=True)

    def _require(self, stream, other, tick, what):
        if stream._clock.get(other, 0) < tick:
            raise StreamOrderError(f"{stream.name}: a hidden state is {what} by {other}")

    def allocate(self, nbytes, device):
        if nbytes > self.free_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.free_bytes -= nbytes
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.kept.append(tensor)  # what is freed must not lend its key to something else
        self.buffers[key(tensor)] = SimBuffer(nbytes)
        self.names[key(tensor)] = f"buffer {len(self.names)}"
        return tensor

    def memory(self, device):
        return self.free_bytes, 8 * GIB

    def peak_bytes(self, device):
        return 8 * GIB - self.free_bytes

    def peak_reserved_bytes(self, device):
        return self.peak_bytes(device)

    def register(self, address, nbytes):
        if nbytes >= self.refuse_from or not self._has_room(nbytes):
            return "out of memory"
        self.registered[address] = nbytes
        return None

    def unregister(self, address):
        del self.registered[address]
        self.unregistered.append(address)

    def allocate_pinned(self, nbytes):
        if not self.allocates_pinned or not self._has_room(nbytes):
            return None
        with _disable_current_modes():
            tensor = torch.zeros(nbytes, dtype=torch.uint8)
        self.allocated_pinned[tensor.data_ptr()] = nbytes
        return tensor

    def _has_room(self, nbytes):
        taken = sum((*self.registered.values(), *self.allocated_pinned.values()))
        return taken + nbytes <= self.pinnable_bytes

    def mapped(self, memory, device):
        self.mapped_bytes += memory.numel()
        with self.inside_driver():
            return torch.empty(memory.numel(), dtype=torch.uint8, device=device)

    def address(self, tensor):
        return 0  # fake tensors are nowhere

    def upload(self, source, device):
        self.uploads += 1
        self.unpinned_uploads += not self.is_registered(source)
        with self.inside_driver():  # no copy: in inference mode the fake mode would make a real one
            return torch.empty(source.shape, dtype=source.dtype, device=device)

    def download(self, values):
        assert values.device == self.device, f"{values.device} is not {self.device}"
        self.downloads += 1
        self.host().wait(self.compute.record())
        return [5] * values.numel()

    def fetch(self, data):
        assert data.device == self.device, f"{data.device} is not {self.device}"
        self.downloads += 1
        self.host().wait(self.compute.record())
        with self.inside_driver():
            return torch.zeros(data.shape, dtype=data.dtype)

    def capture(self, work, device):
        """The kernels themselves each time, so that what they touch is seen each time."""
        if self.refuses_captures:
            raise RuntimeError("operation not permitted when stream is capturing\nand more of it")
        self.captures += 1
        work()

        def replay():
            self.trace.append(("replay",))
            self.replaying = True
            try:
                return work()
            finally:
                self.replaying = False

        return replay, 4096

    @contextmanager
    def inside_driver(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def host(self):
        """The clock of the calling thread."""
        name = f"host {threading.current_thread().name}"
        return self._hosts.setdefault(name, SimStream(name))

    def enqueue(self, stream):
        """What is enqueued now comes after everything the calling thread has waited for."""
        stream.wait(self.host().record())

    def host_buffers(self, tensor):
        """The host memory a tensor is a view of, in parts of `HOST_PART_BYTES`."""
        owner = tensor if tensor._base is None else tensor._base
        parts = -(-owner.numel() * owner.element_size() // HOST_PART_BYTES)
        if owner not in self._host_buffers:
            self._host_buffers[owner] = [SimBuffer(HOST_PART_BYTES) for _ in range(parts)]
        start = (tensor.storage_offset() - owner.storage_offset()) * tensor.element_size()
        stop = start + tensor.numel() * tensor.element_size()
        return self._host_buffers[owner][start // HOST_PART_BYTES : -(-stop // HOST_PART_BYTES)]

    def host_write(self, tensor):
        """The calling thread overwrites host memory that copies read."""
        with self.lock:
            self.host().kernel(reads=[], writes=self.host_buffers(tensor), seconds=0.0)

    def is_registered(self, tensor):
        address = tensor.untyped_storage().data_ptr()
        return address in self.registered or address in self.allocated_pinned

    def kernel(self, func, arguments, device):
        """An operation of the network: note which device buffers it touches."""
        reads, writes = [], []
        for declared, values in arguments:
            touched = writes if declared.alias_info and declared.alias_info.is_write else reads
            keys = map(key, tensors_in(values))
            touched += [self.buffers[k] for k in keys if k in self.buffers]
        with self.lock:
            if not self.replaying:
                self.trace.append(("kernel", str(func), len(reads), len(writes)))
            compute = self.computes[device]
            self.enqueue(compute)
            if compute.name in self._received:
                self._require(compute, *self._received[compute.name], "overwritten while read")
            compute.kernel(reads=reads, writes=writes, seconds=KERNEL_S)


# Views and products. The mode takes most of them apart in Python, each time: half of a test's time.
NAMES = """alias detach expand flatten linear matmul mm bmm permute reshape select slice split
split_with_sizes squeeze t transpose unflatten unsqueeze view"""
AT_ONCE = {getattr(torch.ops.aten, name) for name in NAMES.split()}


class FakeTensors(FakeTensorMode):
    """Of each thread whether it is inside an operator: those that offer copies cut tensors, too.

    Attributes:
        alike: by device, what all its tensors there have.
    """

    _threads = threading.local()

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.alike = {}

    def dispatch(self, func, types, args=(), kwargs=None):
        """Have torch compute shapes of a view or a product of one device at once."""
        given = tensors_in((args, kwargs)) if func.overloadpacket in AT_ONCE else []
        ours = given and all(self.is_our_fake(t) and t.constant is None for t in given)
        if not ours or len({t.fake_device for t in given}) > 1:
            return super().dispatch(func, types, args, kwargs)
        with in_kernel_invocation_manager(self):
            made = func(*args, **kwargs or {})

        def known(tensor):
            is_new = not isinstance(tensor, FakeTensor)
            return FakeTensor(self, tensor, given[0].fake_device) if is_new else tensor

        return type(made)(map(known, made)) if isinstance(made, list | tuple) else known(made)

    @property
    def in_kernel_invocation(self):
        return getattr(self._threads, "inside", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, inside):
        self._threads.inside = inside


@dataclass(frozen=True, slots=True)
class Made:
    """What an operator makes of tensors of some layout, and where.

    Attributes:
        form: list or tuple of what is made; None: it is one tensor.
        parts: of each tensor the place of what was given that it is, or how it lies in memory:
            the place of what was given whose memory that is (None: its own), shape, strides,
            offset, type and device.
        crosses: it is between host and device.
        device: whose kernel it is; None: nobody's.
    """

    form: type | None
    parts: tuple
    crosses: bool
    device: torch.device | None

    @classmethod
    def of(cls, func, given, result):
        """Look at what an operator made."""
        made, memory = tensors_in(result), [*map(key, given)]
        devices = {t.device.type for t in [*given, *made] if t.dim()}
        is_view, device = func.is_view and {*map(key, made)} <= {*memory}, None
        if "cuda" in devices and not is_view:
            (device,) = {t.device for t in [*given, *made] if t.device.type == "cuda"}
        parts = []
        for tensor in made:
            same = next((place for place, t in enumerate(given) if t is tensor), None)
            owner = memory.index(key(tensor)) if key(tensor) in memory else None
            lies = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
            parts.append((owner, *lies, tensor.device) if same is None else same)
        form = type(result) if isinstance(result, list | tuple) else None
        return cls(form, tuple(parts), {"cpu", "cuda"} <= devices, device)

    def again(self, mode, given):
        """Make it of other tensors of that layout."""
        made = [
            given[part] if isinstance(part, int) else _lying(mode, given, *part)
            for part in self.parts
        ]
        return made[0] if self.form is None else self.form(made)

    def is_all(self, func, mode, given, result):
        """Whether what it makes again is as what the operator made."""
        parts = [result] if self.form is None else result
        if func in _TO_BE_ASKED or not all(isinstance(part, FakeTensor) for part in parts):
            return False
        keys = torch._C._dispatch_key_set
        again = tensors_in(self.again(mode, given))
        return all(
            one.constant is None and keys(one) == keys(other)
            for one, other in zip(parts, again, strict=True)
        )


def _lying(mode, given, owner, shape, stride, offset, dtype, device):
    """A fake tensor, by what is the same of all that a mode has on a device."""
    with torch._C._DisableTorchDispatch():
        if owner is None:
            blank = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            blank = torch.empty(0, dtype=dtype, device="meta")
            blank.set_(given[owner].untyped_storage(), offset, shape, stride)
        if device not in mode.alike:
            mode.alike[device] = {**FakeTensor(mode, blank, device).__dict__}
        made = torch.Tensor._make_subclass(
            FakeTensor, blank, dispatch_device=True, device_for_backend_keys=device
        )
        made.__dict__.update(mode.alike[device])
    return made


_TO_BE_ASKED = {torch.ops.aten.as_strided.default}  # what it makes may not be in the memory
_made = {}  # by operator, and by what decides on what it makes


def told(values, words, given):
    """Put down what decides on what an operator makes of this; whether that is all."""
    kind = type(values)
    if kind is FakeTensor:
        given.append(values)
        words += (values.shape, values.stride(), values.storage_offset(), values.dtype)
        words += (values.fake_device, values.is_inference())
        return values.constant is None and not values.requires_grad
    words.append(kind)
    if kind is tuple or kind is list:
        words.append(len(values))
        return all([told(value, words, given) for value in values])
    if kind is dict:
        words += values
        return all([told(value, words, given) for value in values.values()])
    if isinstance(values, torch.Tensor):
        given.append(values)
        return False
    words.append(values)
    return not isinstance(values, list | tuple | dict)


class FakeKernels(TorchDispatchMode):
    """Shows the double every operation torch runs.

    Attributes:
        gpu: the double.
        tensors: what makes tensors; asked once for what an operator makes of some layouts.
    """

    def __init__(self, gpu, tensors):
        super().__init__()
        self.gpu, self.tensors = gpu, tensors

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here: each operator would switch that off and on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # as often as all others together
            return args[0].device
        if self.gpu.inside or func.namespace == "prim":
            return func(*args, **kwargs)
        given = []
        words = [func, torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
        words.append(torch.get_default_dtype())
        asked = told((args, kwargs), words, given) and tuple(words)
        if asked and asked in _made:
            made = _made[asked]
            result = made.again(self.tensors, given)
        else:
            lay = [(t.shape, t.stride()) for t in given]
            result = func(*args, **kwargs)
            made = Made.of(func, given, result)
            moved = lay != [(t.shape, t.stride()) for t in given]
            if asked and not moved and made.is_all(func, self.tensors, given, result):
                _made[asked] = made
        if self.gpu.strict and made.crosses:
            raise HiddenSyncError(f"{func} between host and device passes the driver by")
        if made.device is not None:
            schema = func._schema.arguments
            named = [(a, kwargs[a.name]) for a in schema if a.name in kwargs]
            self.gpu.kernel(func, [*zip(schema, args, strict=False), *named], made.device)
        return result


def tensors_in(values):
    """Of what an operator is given or makes, which is in lists, tuples and dicts alone."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def key(tensor):
    """Identifies the memory a tensor is a view of."""
    return tensor.untyped_storage()._cdata


@contextmanager
def fake_gpu(gpu):
    """Run everything inside on the double."""
    # Rotary tables are made before; they become fake where the network is attached to the device.
    # Parts of host memory are to be real, with an address, and known as parts of the whole.
    with (
        FakeTensors() as tensors,
        FakeKernels(gpu, tensors),
        patch.object(streams, "_cut", build_for_real(streams._cut)),
    ):
        yield gpu


def build_for_real(make):
    """Let `make` build something outside the double: modules on the meta device want no modes."""

    def build(*arguments, **options):
        with _disable_current_modes():
            return make(*arguments, **options)

    return build
