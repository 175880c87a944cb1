"""Profiles with other numbers."""

import pytest
from test_profile import PROJECT

from offload_rt.errors import ConfigError
from offload_rt.profiling.adjust import NAMES, adjust_profile
from offload_rt.profiling.profile import Direction, LinkLoad, Obtained
from offload_rt.profiling.rates import disk_bytes_per_s, link_bytes_per_s
from offload_rt.profiling.store import load_profile

MADE = load_profile(PROJECT / "profiles" / "2x-rtx4090-pcie4x16.json")
CPU = load_profile(PROJECT / "profiles" / "cpu-2core-avx512bf16.json")


def test_a_slower_link_is_slower_at_every_size_and_for_every_gpu():
    slow = adjust_profile(MADE, ["h2d_bytes_per_s=13e9"])
    for gpu in (0, 1):
        assert link_bytes_per_s(slow, 2**30, gpu=gpu).value == pytest.approx(13e9)
    before, after = (link_bytes_per_s(p, 65536).value for p in (MADE, slow))
    start_s = 65536 / before - 65536 / 26e9
    assert after == pytest.approx(65536 / (start_s + 65536 / 13e9))
    together = link_bytes_per_s(slow, 2**30, load=LinkLoad.TOGETHER)
    assert together.value == pytest.approx(13e9 * 25.4 / 26.0)
    assert together.obtained is Obtained.ASSUMED
    back = link_bytes_per_s(slow, 2**30, direction=Direction.D2H)
    assert back == link_bytes_per_s(MADE, 2**30, direction=Direction.D2H)


def test_disk_memory_and_any_number_can_be_set():
    settings = [
        "disk_bytes_per_s=1e9",
        "device_memory_bytes=12GiB",
        "ram_bytes=64GiB",
        "layers[1].times[0].layer_s=0.5",
        "machine.cores=3",
    ]
    made = adjust_profile(MADE, settings)
    deepest = max(disk.queue_depth for disk in made.disk)
    assert disk_bytes_per_s(made, deepest).value == pytest.approx(1e9)
    assert disk_bytes_per_s(made, 1).value == pytest.approx(0.5e9)
    assert [gpu.memory_bytes for gpu in made.machine.gpus] == [12 * 2**30] * 2
    assert (made.machine.ram_bytes, made.machine.cores) == (64 * 2**30, 3)
    number = made.layers[1].times[0].layer_s
    assert number.value == 0.5 and number.obtained is Obtained.ASSUMED
    assert adjust_profile(MADE, []) == MADE


def test_every_name_is_an_example_that_works():
    for name in NAMES:
        assert adjust_profile(MADE, [f"{name}=1e9"]) != MADE


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("h2d_bytes_per_s", "sets nothing: write KEY=VALUE"),
        ("=3", "sets nothing"),
        ("speed=3", "'speed' is no number of a profile: give h2d_bytes_per_s"),
        ("links[999].bytes_per_s=3", "'links.999..bytes_per_s' is no number"),
        ("links.bytes_per_s=3", "is no number"),
        ("machine.cpu=3", "is no number"),
        ("links[0]=3", "is no number"),
        ("a..b=3", "is no number"),
        ("ram_bytes=much", "ram_bytes is 'much': give a number above 0"),
        ("h2d_bytes_per_s=-1", "is '-1': give a number above 0"),
        ("h2d_bytes_per_s=nan", "is 'nan': give a number above 0"),
        ("h2d_bytes_per_s=inf", "is 'inf': give a number above 0"),
        ("h2d_bytes_per_s=1e30", "cannot be: .*at most"),
        ("h2d_bytes_per_s=0", "is '0': give a number above 0"),
        ("ram_bytes=1.5", "cannot be: machine.ram_bytes is 1.5, must be a whole number"),
    ],
)
def test_what_cannot_be_set_is_one_sentence(setting, says):
    with pytest.raises(ConfigError, match=says) as caught:
        adjust_profile(MADE, [setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["h2d_bytes_per_s", "device_memory_bytes"])
def test_a_machine_without_a_gpu_has_no_link(name):
    with pytest.raises(ConfigError, match="the profile has no"):
        adjust_profile(CPU, [f"{name}=1e9"])
