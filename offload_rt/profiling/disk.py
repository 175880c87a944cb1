"""Disk reads by queue depth, with the readers and the O_DIRECT files that stream weights.

What is read is a model's own files: those of a folder that is named, else of the largest model in
the local caches. Where there is none it is a file of random bytes, which a profile then says, since
what was just written is read faster than what has been there. That file has lost its name before
it is written, so nothing is left behind, however the process ends. The page cache is told to forget
the file before each sample, and asked once whether it does: a speed of memory is refused. What a
virtual machine's host keeps in its memory cannot be seen from here.
"""

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

from offload_rt.device.base import (
    PAGE_BYTES,
    PIECE_BYTES,
    CopyBlock,
    CopyPiece,
    DeviceBuffer,
    Event,
)
from offload_rt.device.cpu import CpuCopyStream
from offload_rt.device.host_memory import HostBuffer, allocate_host
from offload_rt.device.system import file_system
from offload_rt.errors import CheckpointError, ProfileError
from offload_rt.model.files import FileIdentity
from offload_rt.model.layout import FileRun
from offload_rt.model.locate import demo_folder, hub_cache
from offload_rt.model.weight_files import WeightFiles
from offload_rt.profiling.curves import Place
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.profile import DiskSpeed
from offload_rt.profiling.timing import Curve, Sample, Tick, Timed, rate_of
from offload_rt.units import format_size
from offload_rt.writing import why_not

_IN_MEMORY = ("tmpfs", "ramfs")
_SMALLEST_BYTES = 256 * 2**10
_FORGETTINGS, _FORGETTING_S = 10, 0.05  # until a file system is thought to be memory
_RANDOM_BYTES = 16 * 2**20
_STARTING_S = 1e-3
JUST_WRITTEN = (
    "the disk was measured with a new file, as there is no model in the local caches: files that "
    "have been there may be read more slowly; measure again with --folder MODEL"
)


@dataclass(frozen=True, slots=True)
class _Window:
    """A stretch of a file that one sample reads; a source for a copy stream."""

    run: FileRun
    files: WeightFiles
    fd: int  # through the page cache, to ask and to clear it

    @property
    def nbytes(self) -> int:
        return self.run.nbytes

    @property
    def image(self) -> None:
        return None

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        assert isinstance(dst, HostBuffer)
        return list(self.files.blocks(self.run, dst))

    def pieces(self) -> Sequence[CopyPiece]:
        return list(self.files.pieces(self.run))

    def check(self) -> None:
        """What a file that is only timed holds does not matter."""

    def forget(self) -> None:
        """Drop the file from the page cache, all of it: part of a large folio would stay."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def require_forgetting(self) -> None:
        """See once that the page cache does forget.

        Raises:
            ProfileError: the stretch stays there.
        """
        start, nbytes = self.run.file_offset, self.run.nbytes
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)  # asking must not read ahead
        pages = {start, start + nbytes // 2 // PAGE_BYTES * PAGE_BYTES, start + nbytes - PAGE_BYTES}
        for _ in range(_FORGETTINGS):  # pages another core still holds a list of stay at first
            self.forget()
            if not all(_cached(self.fd, page) for page in pages):
                return
            time.sleep(_FORGETTING_S)
        raise _in_memory(self.run.path.parent)


def default_folder() -> Path:
    """Where runs keep large temporary files: $TMPDIR or /var/tmp (/tmp is often memory)."""
    lasting = Path("/var/tmp")
    given = "TMPDIR" in os.environ or not os.access(lasting, os.W_OK)
    return Path(tempfile.gettempdir()) if given else lasting


def folder_to_read(least_bytes: int) -> Path:
    """The folder of the largest model in the local caches, else where temporary files are kept.

    On a virtual disk files of models were read at 2.3 to 2.6 GB/s, minutes after a copy of one and
    a file of random bytes at 2.9 to 3.0; neither contents nor extents made the difference
    (docs/RESULTS.md, "Plans that read from the disk").

    Args:
        least_bytes: that a file of it has to have.
    """
    folders = [demo_folder(), *hub_cache().glob("models--*/snapshots/*")]
    sizes = {folder: max(_readable_sizes(folder), default=0) for folder in folders}
    largest = max(sizes, key=sizes.__getitem__)
    return largest if sizes[largest] >= least_bytes else default_folder()


def _readable_sizes(folder: Path) -> Iterator[int]:
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):  # a link to what is gone
            if os.access(path, os.R_OK) and file_system(path.resolve()) not in _IN_MEMORY:
                yield path.stat().st_size


def reads_a_model(folder: Path) -> bool:
    """Whether the disk of a folder is measured with weights in it."""
    return any(size >= _SMALLEST_BYTES for size in _readable_sizes(folder))


def measure_disk(folder: Path, curve: Curve, tick: Tick) -> tuple[DiskSpeed, ...]:
    """Measure the disk of a folder; a folder with safetensors files has these read.

    Raises:
        ProfileError: the folder is not on a disk, is full, or cannot be written.
    """
    kind = _checked_kind(folder)
    with _readable(folder, curve.effort) as windows:
        return tuple(_measure(windows, kind, curve, tick))


@contextmanager
def open_for_reading(
    folder: Path, effort: Effort, readers: int
) -> Iterator[Callable[[], AbstractContextManager[Callable[[], int]]]]:
    """Open the disk of a folder to be read while something else is timed.

    Yields:
        What keeps that many reads in flight while the `with` of its result lasts, from the first
        that is done. It tells how many bytes have come.

    Raises:
        ProfileError: the folder is not on a disk, is full, or cannot be written.
    """
    _checked_kind(folder)
    with _readable(folder, replace(effort, disk_sample_bytes=effort.beside_read_bytes)) as windows:
        windows[0].require_forgetting()
        images = [allocate_host(windows[0].nbytes) for _ in range(2)]
        turns = cycle(windows)
        stream = CpuCopyStream(readers, lambda block: block.run())

        def come() -> int:
            return stream.statistics().bytes_copied

        def keep_reading(ended: threading.Event) -> None:
            begun: deque[Event] = deque()
            while not ended.is_set():
                stream.copy(images[len(begun)], next(turns))
                begun.append(stream.record())
                if len(begun) == len(images):
                    begun.popleft().synchronize()
                    images.reverse()

        @contextmanager
        def reading() -> Iterator[Callable[[], int]]:
            ended, before = threading.Event(), come()
            thread = threading.Thread(target=keep_reading, args=(ended,), name="reading")
            thread.start()
            while thread.is_alive() and come() == before:
                time.sleep(_STARTING_S)
            try:
                yield come
            finally:
                ended.set()
                thread.join()
                stream.record().synchronize()

        try:
            yield reading
        finally:
            stream.close()


@contextmanager
def _readable(folder: Path, effort: Effort) -> Iterator[list[_Window]]:
    """Stretches of the folder's weights or of a temporary file; what fails is a ProfileError."""
    try:
        with _open_windows(folder, effort) as windows:
            yield windows
    except (OSError, CheckpointError) as error:
        reason = why_not(error, folder) if isinstance(error, OSError) else str(error)
        raise ProfileError(
            f"the disk of {folder} cannot be measured: {reason}; give a folder that can be "
            "written, or a model's, with --folder"
        ) from error


def _measure(
    windows: Sequence[_Window], kind: str, curve: Curve, tick: Tick
) -> Iterator[DiskSpeed]:
    nbytes = windows[0].nbytes
    image = allocate_host(nbytes)
    image.tensor.zero_()
    turns = cycle(windows)
    windows[0].require_forgetting()

    def sample_s(stream: CpuCopyStream) -> float:
        window = next(turns)
        window.forget()
        return Timed(lambda: _read(stream, window, image))()

    with ExitStack() as undo:
        passes: dict[Place, Sample] = {}
        for depth in curve.effort.disk_depths:
            stream = CpuCopyStream(depth, lambda block: block.run())
            undo.callback(stream.close)
            passes[(-depth,)] = partial(sample_s, stream)
        taken = curve.take(passes)
    for (fewer,), time_s in curve.numbers(taken).items():
        yield DiskSpeed(
            file_system=kind,
            direct=windows[0].files.direct,
            block_bytes=min(PIECE_BYTES, nbytes),
            queue_depth=-fewer,
            bytes_per_s=rate_of(nbytes, time_s),
        )
        tick()


def _read(stream: CpuCopyStream, window: _Window, image: HostBuffer) -> None:
    stream.copy(image, window)
    stream.record().synchronize()


def _checked_kind(folder: Path) -> str:
    if not folder.is_dir():
        raise ProfileError(f"{folder} is no folder: give one on the disk to measure with --folder")
    kind = file_system(folder.resolve())
    if kind in _IN_MEMORY:
        raise _in_memory(folder)
    return kind


@contextmanager
def _open_windows(folder: Path, effort: Effort) -> Iterator[list[_Window]]:
    """Cut the folder's weights, or a temporary file, into stretches of one size."""
    models = [
        p
        for kind in ("safetensors", "packed")
        for p in sorted(folder.glob(f"*.{kind}"))
        if p.stat().st_size >= _SMALLEST_BYTES
    ]
    if not models:
        with _temporary(folder, effort.disk_file_bytes) as (path, files, fd):
            nbytes = min(effort.disk_sample_bytes, effort.disk_file_bytes)
            yield _cut(files, path, fd, effort.disk_file_bytes, nbytes)
        return
    sizes = {path: path.stat() for path in models}
    files = WeightFiles({path: FileIdentity.of(path, size) for path, size in sizes.items()})
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in models]
    try:
        largest = max(size.st_size for size in sizes.values()) // PAGE_BYTES * PAGE_BYTES
        nbytes = min(effort.disk_sample_bytes, largest)
        yield [
            window
            for path, fd in zip(models, fds, strict=True)
            for window in _cut(files, path, fd, sizes[path].st_size, nbytes)
        ]
    finally:
        files.close()
        for fd in fds:
            os.close(fd)


def _cut(files: WeightFiles, path: Path, fd: int, size: int, nbytes: int) -> list[_Window]:
    starts = range(0, size - nbytes + 1, nbytes)
    runs = (
        FileRun(path=path, file_offset=start, nbytes=nbytes, image_offset=0, in_place=True)
        for start in starts
    )
    return [_Window(run, files, fd) for run in runs]


@contextmanager
def _temporary(folder: Path, nbytes: int) -> Iterator[tuple[Path, WeightFiles, int]]:
    """A file of random bytes on the disk; its name is gone before they are written."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < 2 * nbytes:
        raise ProfileError(
            f"{folder} has {format_size(free)} free, measuring its disk needs "
            f"{format_size(2 * nbytes)} for a moment: give another folder, or that of a model, "
            "with --folder"
        )
    fd, name = tempfile.mkstemp(prefix=".offload-run-profile-", dir=folder)
    path = Path(name)
    try:
        os.truncate(fd, nbytes)
        files = WeightFiles({path: FileIdentity.of(path, os.fstat(fd))})
    except BaseException:
        os.close(fd)
        raise
    finally:
        path.unlink()
    try:
        _fill(fd, nbytes)
        yield path, files, fd
    finally:
        files.close()
        os.close(fd)


def _fill(fd: int, nbytes: int) -> None:
    """Write bytes no disk can compress, and wait until it has them."""
    block = os.urandom(min(_RANDOM_BYTES, nbytes))
    done = 0
    while done < nbytes:
        done += os.pwrite(fd, block[: nbytes - done], done)
    os.fsync(fd)


def _cached(fd: int, offset: int) -> bool:
    """Whether a page is in the page cache: a read that must not wait succeeds."""
    with suppress(OSError):  # it would have to wait, or the file system does not know this read
        return os.preadv(fd, [bytearray(PAGE_BYTES)], offset, os.RWF_NOWAIT) > 0
    return False


def _in_memory(folder: Path) -> ProfileError:
    return ProfileError(
        f"{folder} is served from memory ({file_system(folder.resolve())}): give a folder on a "
        "disk with --folder"
    )
