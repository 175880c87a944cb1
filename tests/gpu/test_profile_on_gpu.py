"""A profile measured on a real GPU: its links, its layers, and which machine it names."""

from dataclasses import replace

from test_measure import QUICK

from offload_rt.device.kinds import Processor
from offload_rt.profiling.codec import decode, encode
from offload_rt.profiling.identity import find_changes
from offload_rt.profiling.measure import measure
from offload_rt.profiling.profile import Direction, LayerWork
from offload_rt.profiling.rates import attention_s, layer_s, link_bytes_per_s

MIB = 2**20
BLOCKS = (64 * 2**10, 64 * MIB)


def test_a_profile_of_this_gpu():
    effort = replace(QUICK, link_blocks=BLOCKS, link_sample_bytes=256 * MIB, most_samples=5)
    made = measure("gpu", device="cuda", effort=effort)
    assert decode(encode(made)) == made and find_changes(made) == []
    assert made.machine.gpus and made.machine.gpus[0].link_width > 0
    for direction in Direction:
        small, large = (link_bytes_per_s(made, n, direction=direction).value for n in BLOCKS)
        pageable = link_bytes_per_s(made, BLOCKS[1], direction=direction, pinned=False).value
        assert 1e9 < large < 1e12
        assert small < large and pageable < 1.05 * large
    assert made.pinning.bytes_per_s.value > 1e8
    work = LayerWork(weight_bytes=MIB, flops_per_token=MIB)
    for processor in Processor:
        assert layer_s(made, work, 1, processor=processor).value > 0
        assert attention_s(made, MIB, 1, processor=processor).value > 0
