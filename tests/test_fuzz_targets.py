"""What `tools/fuzz` begins with is read, so that what it changes is near to what people have."""

import sys
from pathlib import Path

import pytest

from offload_rt.errors import OffloadError

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "fuzz"))
from targets import TARGETS, as_json

# What one seed of each is refused for.
REFUSED = {"template": b"raise_exception"}


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_and_rubbish_is_refused(name):
    target = TARGETS[name]
    for seed in target.seeds():
        if REFUSED.get(name, b"\n\n") in seed:
            with pytest.raises(OffloadError):
                target.read(seed)
        else:
            target.read(seed)
    with pytest.raises(OffloadError):
        target.read(as_json([{"{{ 1": 2}]))
