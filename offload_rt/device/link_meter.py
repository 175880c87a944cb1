"""What crosses a link, counted, and a link of a given bandwidth, emulated. No torch here."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from offload_rt.device.base import CopyBlock, CopyStatistics


@dataclass(slots=True)
class LinkMeter:
    """Counts bytes and the time in which anything was in flight."""

    bytes_copied: int = 0
    busy_s: float = 0.0
    in_flight: int = 0
    since: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """A copy begins."""
        with self.lock:
            if self.in_flight == 0:
                self.since = time.perf_counter()
            self.in_flight += 1

    def stop(self, nbytes: int) -> None:
        """A copy has ended; `nbytes` arrived."""
        with self.lock:
            self.in_flight -= 1
            self.bytes_copied += nbytes
            if self.in_flight == 0:
                self.busy_s += time.perf_counter() - self.since

    @contextmanager
    def measure(self, nbytes: int) -> Iterator[None]:
        """Count what runs inside as one copy; if it raises, nothing arrived."""
        self.start()
        try:
            yield
        except BaseException:
            self.stop(0)
            raise
        self.stop(nbytes)

    def statistics(self) -> CopyStatistics:
        """Totals so far, a copy in flight included in the time."""
        with self.lock:
            busy_s = self.busy_s
            if self.in_flight:
                busy_s += time.perf_counter() - self.since
            return CopyStatistics(bytes_copied=self.bytes_copied, busy_s=busy_s)


class Pacer:
    """Makes copies take as long as they would over a link of the given bandwidth."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def run(self, block: CopyBlock) -> None:
        """Do the copy, then sleep until the emulated link would have finished it."""
        with self._lock:
            start = max(time.perf_counter(), self._free_at)
            self._free_at = end = start + block.nbytes / self._bytes_per_s
        block.run()
        time.sleep(max(0.0, end - time.perf_counter()))
