"""The CPU as a device: memory is RAM within a limit, reader threads are the copy engine.

Computation is synchronous, so a compute event is reached the moment it is recorded. Copies are cut
into blocks that several threads work off in the order they were enqueued and finish in any order; a
copy event fires when every block enqueued before it is done. This is all the ordering there is:
compute blocks on `filled`; a slot is only enqueued for refilling after its reader returned.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch

from offload_rt.device.base import (
    CopyBlock,
    CopyStatistics,
    DeviceBuffer,
    DeviceUsage,
    Event,
    HomeSource,
    HomeTarget,
    MadeT,
    Replay,
)
from offload_rt.device.host_memory import HostBuffer, allocate_host
from offload_rt.device.idle import IdleCopies, LateOffer, Steps
from offload_rt.device.kinds import CPU
from offload_rt.device.link_meter import LinkMeter, Pacer
from offload_rt.device.system import (
    LIBRARIES,
    free_memory_bytes,
    give_back_code,
    give_back_holes,
    give_back_large_blocks,
    most_read,
    peak_rss_bytes,
    restart_peak,
    rss_bytes,
)
from offload_rt.errors import DeviceError


class Copies:
    """A countdown of unfinished blocks of one `copy` call.

    Attributes:
        dropped: nobody wants to know of an error.
        left: blocks that are not done.
    """

    def __init__(self, blocks: int) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.dropped = False
        self.done_s = 0.0
        self.left = blocks
        self._lock = threading.Lock()
        if not blocks:
            self.finish()

    def finish(self) -> None:
        """All blocks are done."""
        self.done_s = time.perf_counter()
        self.done.set()

    def finish_block(self, error: BaseException | None) -> bool:
        """Count one block; returns whether it was the last."""
        with self._lock:
            self.error = self.error or error
            self.left -= 1
            return self.left == 0


@dataclass(frozen=True, slots=True)
class CpuEvent:
    """Reached when the copies it names are done; an event of the compute stream names none."""

    copies: tuple[Copies, ...] = ()

    def synchronize(self) -> None:
        """Block until reached; raise what a copy raised."""
        for copies in self.copies:
            copies.done.wait()
            if copies.error is not None and not copies.dropped:
                raise copies.error


class CpuComputeStream:
    """The calling thread itself."""

    def __init__(self) -> None:
        self._stalled_s = 0.0

    def record(self) -> CpuEvent:
        """Everything computed so far is already done."""
        return CpuEvent()

    def wait(self, event: Event) -> None:
        """Block until `event` is reached and count the time as stall."""
        start = time.perf_counter()
        event.synchronize()
        self._stalled_s += time.perf_counter() - start

    def follow(self, event: Event) -> None:
        """Nothing to order: the calling thread computes for all CPU devices, in turn."""

    def stalled_s(self) -> float:
        """Seconds spent blocked in `wait`."""
        return self._stalled_s


class CpuCopyStream:
    """Reader threads that work off blocks in the order they were enqueued.

    Args:
        threads: blocks in flight at once.
        run: how a block is run; a `Pacer`'s, or straight away.
        streams: all of the device, to which it adds itself: what is offered waits for each.
    """

    def __init__(
        self,
        threads: int,
        run: Callable[[CopyBlock], None],
        streams: "list[CpuCopyStream] | None" = None,
    ) -> None:
        self._run = run
        self._streams = [] if streams is None else streams
        self._streams.append(self)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._meter = LinkMeter()
        self._pending: list[Copies] = []
        self._closed = threading.Event()
        self._idle = IdleCopies(self._quiet)
        self._threads = [
            threading.Thread(target=self._work, name=f"reader-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def copy(self, dst: DeviceBuffer, src: HomeSource) -> None:
        """Enqueue all blocks of `src`."""
        self._enqueue(src.blocks(dst), src.check)

    def offer(
        self, dst: DeviceBuffer, src: HomeSource, after: Sequence[Event], *, last: bool = False
    ) -> "CpuOffer | LateOffer":
        """Have blocks of `src` read while no copy that was asked for is under way."""
        return LateOffer(self, self._idle, dst, src) if last else self._offer(dst, src, after)

    def offer_last(self, dst: DeviceBuffer, src: HomeSource) -> "CpuOffer":
        """The same behind all that is offered, cut into blocks now."""
        return self._offer(dst, src, (), last=True)

    def reached(self) -> CpuEvent:
        """What was offered and is there needs no event."""
        return CpuEvent()

    def _offer(
        self, dst: DeviceBuffer, src: HomeSource, after: Sequence[Event], *, last: bool = False
    ) -> "CpuOffer":
        blocks = src.blocks(dst)
        copies = Copies(len(blocks))

        def finish(block: CopyBlock) -> None:
            self._finish(block, copies, src.check, after)

        def step(block: CopyBlock) -> None:
            if (error := self._run_block(block, after)) is not None:
                raise error
            if copies.left == 1:
                src.check()  # what is told of it is told to whoever asks
            self._count(copies, None, src.check)

        return CpuOffer(self, copies, finish, self._idle.add(blocks, step, last=last))

    def ask_for(self, offer: "CpuOffer") -> CpuEvent:
        """Enqueue what is left of an offered copy; so, too, a step under way that fails yet."""

        def enqueue(block: CopyBlock) -> None:
            self._queue.put(partial(offer.finish, block))

        self._pend(offer.copies)
        for block in self._idle.take_back(offer.steps, enqueue):
            enqueue(block)
        return CpuEvent((offer.copies,))

    def drop(self, offer: "CpuOffer") -> CpuEvent:
        """Leave what is left of an offered copy."""

        def leave(_: CopyBlock) -> None:
            self._count(offer.copies, None, lambda: None)

        offer.copies.dropped = True
        for block in self._idle.take_back(offer.steps, leave):
            leave(block)
        return CpuEvent((offer.copies,))

    def store(self, dst: HomeTarget, src: torch.Tensor) -> None:
        """Enqueue all blocks of a copy to `dst`."""
        self._enqueue(dst.write_blocks(src), lambda: None)

    def record(self) -> CpuEvent:
        """Return an event for all copies enqueued so far."""
        return CpuEvent(tuple(self._pending))

    def wait(self, event: Event) -> None:
        """Block the host: events of the CPU's compute stream are always reached already."""
        event.synchronize()

    def statistics(self) -> CopyStatistics:
        """Bytes that arrived and seconds with at least one block in flight."""
        return self._meter.statistics()

    def close(self) -> None:
        """Drop what is not started, wait for what is in flight, end the threads."""
        self._closed.set()
        self._idle.close()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        if self in self._streams:  # nobody waits for what is asked of it from now on
            self._streams.remove(self)

    def _enqueue(self, blocks: Sequence[CopyBlock], check: Callable[[], None]) -> None:
        copies = Copies(len(blocks))
        self._pend(copies)
        for block in blocks:
            self._queue.put(partial(self._finish, block, copies, check))

    def _pend(self, copies: Copies) -> None:
        """Have later events wait for them."""
        self._pending = [c for c in self._pending if not c.done.is_set() or c.error]
        self._pending.append(copies)

    def _quiet(self) -> None:
        while asked := [
            copies
            for stream in [*self._streams]
            for copies in stream._pending
            if not copies.done.is_set()
        ]:
            for copies in asked:
                copies.done.wait()

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            item()
            del item  # nothing of it is held on to while waiting for the next: it may be a layer

    def _finish(
        self,
        block: CopyBlock,
        copies: Copies,
        check: Callable[[], None],
        after: Sequence[Event] = (),
    ) -> None:
        """Run a block, and with the last of a copy say how that went."""
        error = self._run_block(block, after) if copies.error is None else copies.error
        self._count(copies, error, check)

    def _count(
        self, copies: Copies, error: BaseException | None, check: Callable[[], None]
    ) -> None:
        """A block of a copy is over."""
        if copies.finish_block(error):
            try:
                check()
            except Exception as changed:  # noqa: BLE001 - handed to whoever waits for the copy
                copies.error = copies.error or changed
            copies.finish()

    def _run_block(self, block: CopyBlock, after: Sequence[Event]) -> BaseException | None:
        if self._closed.is_set():
            return DeviceError("the device was closed while a copy was waiting")
        try:
            for event in after:
                event.synchronize()
            with self._meter.measure(block.nbytes):
                self._run(block)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the copy
            return error
        return None


@dataclass(frozen=True, slots=True)
class CpuOffer:
    """A copy that is made while no other one is asked for."""

    stream: CpuCopyStream
    copies: Copies
    finish: Callable[[CopyBlock], None]
    steps: Steps

    @property
    def begun_bytes(self) -> int:
        """Of the blocks that have begun."""
        return self.steps.begun_bytes

    def ask(self) -> CpuEvent:
        """Enqueue the blocks that have not begun."""
        return self.stream.ask_for(self)

    def drop(self) -> CpuEvent:
        """Leave the blocks that have not begun."""
        return self.stream.drop(self)


class CpuDevice:
    """RAM within a limit, computed on by this process.

    Args:
        readers: reads kept in flight; they wait for the disk, so no quota of cores bounds them.
        link_bytes_per_s: emulate a link of this bandwidth between host memory and the device.
        beside: another one of the same run; their memory is the same, and counted together.
    """

    name = "cpu"
    kind = CPU
    torch_device = torch.device("cpu")

    def __init__(
        self,
        *,
        readers: int = 4,
        link_bytes_per_s: float | None = None,
        beside: "CpuDevice | None" = None,
    ) -> None:
        self._readers = readers
        self._pacer = None if link_bytes_per_s is None else Pacer(link_bytes_per_s)
        self._streams = list[CpuCopyStream]()
        self.load = CpuCopyStream(readers, lambda block: block.run(), self._streams)
        self.copy = self.load if self._pacer is None else self.new_copy_stream()
        self.compute = CpuComputeStream()
        self._ledger: dict[str, int] = {}
        give_back_large_blocks()
        self._memory: MemoryMeter = MemoryMeter() if beside is None else beside._memory

    def new_copy_stream(self) -> CpuCopyStream:
        """Start more reader threads; an emulated link is shared by all its streams."""
        if self._pacer is not None:
            return CpuCopyStream(1, self._pacer.run, self._streams)
        return CpuCopyStream(self._readers, lambda block: block.run(), self._streams)

    def allocate(self, nbytes: int, purpose: str) -> HostBuffer:
        """Allocate memory for the whole run and enter it in the ledger."""
        buffer = allocate_host(nbytes)
        self.enter(nbytes, purpose)
        return buffer

    def enter(self, nbytes: int, purpose: str) -> None:
        """Enter in the ledger what something else allocated for the whole run."""
        self._ledger[purpose] = self._ledger.get(purpose, 0) + nbytes

    def ledger(self) -> dict[str, int]:
        """Bytes allocated so far by purpose."""
        return dict(self._ledger)

    def peak_bytes(self) -> int:
        """Peak growth of the process's memory since the device was made, less what is home."""
        return max(0, self._memory.growth_bytes() - self._memory.home_bytes)

    def usage(self) -> DeviceUsage:
        """All that is taken of the process's memory counts in the peak."""
        return DeviceUsage(reserved_bytes=self.peak_bytes())

    def free_bytes(self) -> int:
        """Memory this process may still take."""
        return free_memory_bytes()

    def pin(self, buffer: HostBuffer) -> None:
        """Take it out of the count; the CPU reads all its memory at one speed."""
        self._memory.home_bytes += buffer.nbytes

    def mapped(self, buffer: HostBuffer) -> HostBuffer:
        """It is the CPU's own memory."""
        return buffer

    def address(self, tensor: torch.Tensor) -> int:
        """Return where a tensor lies."""
        return tensor.data_ptr()

    def upload(self, values: Sequence[int]) -> torch.Tensor:
        """Return [len(values)] int64; a pass begins with it, or a part of one."""
        self._memory.look()
        return torch.tensor(values, dtype=torch.int64)

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return it: all CPU devices compute in the same memory."""
        return tensor

    def download(self, values: torch.Tensor) -> list[int]:
        """Return the values as Python integers."""
        return [int(v) for v in values.flatten().tolist()]  # host sync

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """Return them: they are in the host's memory."""
        return data

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a copy."""
        return rows.clone()

    def record(self, work: Callable[[], MadeT], vary: Callable[[], object]) -> Replay[MadeT]:
        """The work itself; what it launches costs the same each time."""
        return work

    def reached_s(self, event: Event, recorded_s: float) -> float:
        """When the copies an event names were done, or else when it was recorded."""
        assert isinstance(event, CpuEvent)
        return max([recorded_s, *(copies.done_s for copies in event.copies)])

    def close(self) -> None:
        """Stop the reader threads."""
        self.copy.close()
        self.load.close()


class MemoryMeter:
    """Peak resident memory of this process since the meter was made.

    Linux keeps the peak itself (`VmHWM`); writing 5 to `clear_refs` restarts it. Where that is not
    allowed the peak since the start of the process is used, which can only be too high.

    What was read of program files meanwhile is no memory of a run: where memory is short Linux
    drops those of torch (119 MB) from a process that waits, and their return counted as growth. It
    may drop them again before the end, so the most that was there at any `look` is left out.

    Attributes:
        home_bytes: of it, what layers and KV have as their home.
    """

    def __init__(self) -> None:
        give_back_holes()  # else what an earlier engine freed is used again and counts as nothing
        give_back_code(LIBRARIES)  # importing reads more of them than runs do
        self.home_bytes = 0
        restart_peak()
        self._start_bytes, self._start_file_bytes = rss_bytes()
        self._most_file_bytes, self._next_look_s = self._start_file_bytes, 0.0
        _, self._given_back = most_read(0)

    def look(self) -> None:
        """Note what there is of files now; 20 times a second at most."""
        if (now_s := time.perf_counter()) >= self._next_look_s:
            self._next_look_s = now_s + 0.05
            self._note_files()

    def _note_files(self) -> None:
        read, _ = most_read(self._given_back)  # as by LLVM, which is there between two looks
        self._most_file_bytes = max(self._most_file_bytes, rss_bytes()[1], read)

    def growth_bytes(self) -> int:
        """Peak resident bytes above those at the start, without files."""
        self._note_files()
        files = self._most_file_bytes - self._start_file_bytes
        return max(0, peak_rss_bytes() - self._start_bytes - files)
