"""Files past the page cache: short reads and writes are finished, at page borders where direct."""

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_rt.device.base import PAGE_BYTES
from offload_rt.streaming.direct_io import OpenFile, open_file, whole_pages

DATA = bytes(os.urandom(5 * PAGE_BYTES))
counts = st.lists(st.integers(1, 2 * PAGE_BYTES), min_size=1, max_size=5)


class Halting:
    """System calls that move fewer bytes than asked for; of a direct file from page borders."""

    def __init__(self, counts, direct):
        self.counts, self.direct, self.calls = counts, direct, 0
        self.written = bytearray(len(DATA))

    def next(self, wanted, offset):
        assert not self.direct or offset % PAGE_BYTES == 0
        count = self.counts[self.calls % len(self.counts)]
        self.calls += 1
        # A direct call that ends inside the page it began in would never get on.
        return min(wanted, max(count, PAGE_BYTES) if self.direct else count)

    def preadv(self, fd, buffers, offset):
        count = self.next(len(buffers[0]), offset)
        buffers[0][:count] = DATA[offset : offset + count]
        return count

    def pwrite(self, fd, data, offset):
        count = self.next(len(data), offset)
        self.written[offset : offset + count] = data[:count]
        return count


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "data"
    path.write_bytes(DATA)
    return path


@given(counts=counts, direct=st.booleans(), need=st.integers(1, len(DATA)))
def test_short_reads_are_finished(path, counts, direct, need):
    file = OpenFile(os.open(path, os.O_RDONLY), direct)
    target = bytearray(whole_pages(need))
    done = file.read(memoryview(target), 0, need, preadv=Halting(counts, direct).preadv)
    file.close()
    assert done >= need and target[:need] == DATA[:need]


@given(counts=counts, direct=st.booleans(), pages=st.integers(1, 5))
def test_short_writes_are_finished(counts, direct, pages):
    calls, nbytes = Halting(counts, direct), pages * PAGE_BYTES
    source = memoryview(DATA)[:nbytes]
    assert OpenFile(-1, direct).write(source, 0, pwrite=calls.pwrite) == nbytes
    assert calls.written[:nbytes] == DATA[:nbytes]


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_past_the_end_says_where_that_is(path, direct):
    file = open_file(path, os.O_RDONLY, direct=direct)
    target = mmap.mmap(-1, len(DATA) + PAGE_BYTES)
    assert file.read(memoryview(target), 0, len(DATA) + 1) == len(DATA)
    file.close()


def test_a_write_that_stops_says_how_far_it_came():
    taken = iter([PAGE_BYTES, 0])
    file = OpenFile(-1, True)
    assert file.write(memoryview(DATA), 0, pwrite=lambda *_: next(taken)) == PAGE_BYTES
