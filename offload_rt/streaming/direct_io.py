"""Files read and written past the page cache (O_DIRECT) where their file system allows it.

Then neither the page cache nor a mapping holds a second copy of what is streamed. Direct reads and
writes are whole pages, to and from page-aligned memory. No torch here.
"""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload_rt.device.base import PAGE_BYTES

PReadV = Callable[[int, Sequence[memoryview], int], int]
PWrite = Callable[[int, memoryview, int], int]

BUFFERED = (
    "%s are read through the page cache, as their file system has no direct reads: that takes "
    "memory beside --device-memory; keep the model on ext4 or xfs"
)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file.

    Attributes:
        direct: reads and writes bypass the page cache; they must then be whole pages.
    """

    fd: int
    direct: bool

    def read(
        self, target: memoryview, offset: int, need: int, *, preadv: PReadV = os.preadv
    ) -> int:
        """Read at least `need` bytes at `offset` into `target`, in as many calls as it takes.

        Returns:
            Bytes that were read; fewer than `need` only if the file ends there.
        """
        done = 0
        while done < need:
            count = preadv(self.fd, [target[done:]], offset + done)
            done += count
            if done < need:
                if count == 0 or offset + done >= os.fstat(self.fd).st_size:
                    break
                done -= self._partial(done)
        return done

    def write(self, source: memoryview, offset: int, *, pwrite: PWrite = os.pwrite) -> int:
        """Write all of `source` at `offset`, in as many calls as it takes.

        Returns:
            Bytes that were written; fewer only if the system takes no more.
        """
        done = 0
        while done < len(source):
            count = pwrite(self.fd, source[done:], offset + done)
            if count == 0:
                break
            done += count
            if done < len(source):
                done -= self._partial(done)
        return done

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)

    def _partial(self, done: int) -> int:
        """Bytes to move again: a direct read or write must start at a page border."""
        return done % PAGE_BYTES if self.direct else 0


def open_file(path: Path, flags: int, *, direct: bool = True) -> OpenFile:
    """Open a file, past the page cache if that works.

    Args:
        path: where it is.
        flags: os.O_RDONLY, or os.O_RDWR for an empty file of ours.
        direct: try to pass the page cache by.

    Raises:
        OSError: it cannot be opened.
    """
    flags |= os.O_CLOEXEC
    if direct:
        try:
            fd = os.open(path, flags | os.O_DIRECT)
        except OSError:
            pass  # tmpfs and some network file systems refuse it; other reasons come up below
        else:
            if _direct_works(fd, writes=bool(flags & os.O_RDWR)):
                return OpenFile(fd, True)
            os.close(fd)
    return OpenFile(os.open(path, flags), False)


def reads_directly(path: Path) -> bool:
    """Whether a file that is there can be read past the page cache."""
    file = open_file(path, os.O_RDONLY)
    file.close()
    return file.direct


def whole_pages(nbytes: int) -> int:
    """So many bytes rounded up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _direct_works(fd: int, *, writes: bool) -> bool:
    """Some file systems accept O_DIRECT at open and refuse it when it is used."""
    page = mmap.mmap(-1, PAGE_BYTES)
    try:
        return (os.pwrite(fd, page, 0) if writes else os.preadv(fd, [page], 0)) > 0
    except OSError as error:
        return error.errno == errno.ENOSPC  # what takes room next says it better
