"""How many weights are dequantised in a second: as it was timed, or what is assumed beside that.

What a profile lacks is a share of what it says of integers of 4 bits (compressed-tensors), which
were timed wherever anything was; without these, of what is assumed of any machine. No torch here.
"""

from collections.abc import Mapping
from dataclasses import replace

from offload_rt.device import compiled
from offload_rt.device.kinds import Processor
from offload_rt.device.system import processor, takes_matrix_registers
from offload_rt.kernels.rows import ROW_TILE
from offload_rt.model.formats.methods import CODED_BITS, NESTED_BITS, Form
from offload_rt.model.formats.stored import kernels_multiply, kernels_multiply_plain
from offload_rt.profiling.profile import Decoder, HardwareProfile, Number, Obtained

_WHERE = 'docs/RESULTS.md, "Dequantising on the way"'
_INTEGERS = (Form.PACKED, 4)
# Of integers of 4 bits, in a pass. Torch and numba of two cores (measured); a GPU's kernels half of
# what a 4090's memory allows (350 GB/s written), torch there the rate of `_MOVED` below.
_PER_S: Mapping[tuple[Processor, Decoder], float] = {
    (Processor.CPU, Decoder.TORCH): 1.6e9,
    (Processor.CPU, Decoder.COMPILED): 6.5e9,
    (Processor.CUDA, Decoder.COMPILED): 175e9,
}
# bf16 in 12 bits by readers, beside two cores that compute: without numba a pass of 1.3 G weights
# took 1.33 s, of which reading was 0.75, with it one thread reached what is here (docs/RESULTS.md,
# "bf16 from disk in 12 bits"). A GPU: 230 GB/s written, a third less than integers, for 1.5 bytes a
# weight are read, and escapes are written twice. In 10.75 bits: of two cores (measured, "Fewer
# bytes on a GPU, simulated"); a GPU 100 GB/s written, half of what the 205 instructions a
# weight of a prototype leave a 4090 (the same section).
_CODED_PER_S: Mapping[tuple[Processor, Decoder, int], float] = {
    (Processor.CPU, Decoder.TORCH, CODED_BITS): 2.3e9,
    (Processor.CPU, Decoder.COMPILED, CODED_BITS): 6.5e9,
    (Processor.CUDA, Decoder.COMPILED, CODED_BITS): 115e9,
    (Processor.CPU, Decoder.TORCH, NESTED_BITS): 0.07e9,
    (Processor.CPU, Decoder.COMPILED, NESTED_BITS): 0.75e9,
    (Processor.CUDA, Decoder.COMPILED, NESTED_BITS): 50e9,
}
# Of what torch reaches with integers of 4 bits on a CPU, by forms and bits (measured side by side,
# same section); 0 bits: any other.
SHARES: Mapping[tuple[str, int], float] = {
    (Form.PACKED, 8): 0.95,
    (Form.PACKED, 2): 0.4,
    (Form.PACKED, 0): 0.08,
    (Form.AWQ, 0): 0.2,
    (Form.GPTQ, 4): 0.43,
    (Form.GPTQ, 2): 0.33,
    (Form.GPTQ, 8): 0.23,
    (Form.GPTQ, 0): 0.05,
    (Form.FP8, 0): 0.42,
    (Form.INT8, 0): 0.7,
    (Form.NVFP4, 0): 0.46,
    (Form.MXFP4, 0): 0.64,
    (Form.BNB4, 0): 0.59,
    (Form.BNB8, 0): 0.64,
    (Form.Q4_0, 0): 0.42,
    (Form.Q4_1, 0): 0.35,
    (Form.Q5_0, 0): 0.21,
    (Form.Q5_1, 0): 0.19,
    (Form.Q8_0, 0): 0.49,
    (Form.Q2_K, 0): 0.31,
    (Form.Q3_K, 0): 0.22,
    (Form.Q4_K, 0): 0.44,
    (Form.Q5_K, 0): 0.23,
    (Form.Q6_K, 0): 0.22,
    (Form.IQ4_NL, 0): 0.27,
    (Form.IQ4_XS, 0): 0.33,
    (Form.BLOCK_MXFP4, 0): 0.29,
}
# The same of numba, of the forms that it compiles.
_COMPILED_SHARES: Mapping[tuple[str, int], float] = {
    (Form.PACKED, 8): 0.7,
    (Form.AWQ, 0): 0.19,
    (Form.GPTQ, 4): 0.33,
    (Form.GPTQ, 0): 0.2,
}
# Bytes that torch's operators read and write for a weight on a GPU, of forms without a kernel
# (counted); at four fifths of what a 4090's memory moves.
_MOVED: Mapping[str, float] = {Form.BNB4: 19, Form.BNB8: 29}
_ODD_BITS = 145.0  # integers of bits that divide no word
_MOVED_BYTES_PER_S = 0.8 * 1008e9
_SAME = {Form.GPTQ_V2: Form.GPTQ, Form.NVFP4_PRODUCT: Form.NVFP4}


def compiles(profile: HardwareProfile) -> bool:
    """Whether kernels that numba compiles dequantise on the CPU of a profile.

    As it was timed; as it is here and now, where that is this CPU, the profile stands in for its
    own, or nothing was timed.
    """
    timed = {s.decoder for s in profile.dequantising if s.processor is Processor.CPU}
    if timed and Decoder.COMPILED not in timed:
        return False
    elsewhere = timed and profile.machine.kernels is not None and not _is_here(profile)
    return bool(elsewhere) or not compiled.problem()


def multiplies(profile: HardwareProfile, *, exact: bool = False) -> bool:
    """Whether kernels multiply bf16 with weights as they are stored on the CPU of a profile.

    As `compiles`; `exact`: in row-invariant passes.
    """
    machine = profile.machine
    if machine.kernels is None or _is_here(profile):
        return kernels_multiply(exact=exact)
    return machine.kernels and (exact or not machine.matrix_registers)


def rows_apart(profile: HardwareProfile) -> int:
    """Rows that a row-invariant product of the CPU takes at once, one after the other; 0: all.

    Where torch multiplies in matrix registers (`kernels/tiles.py`), unless kernels do instead: with
    plain weights, and with those that torch has dequantised.
    """
    apart = profile.machine.matrix_registers and not in_registers(profile)
    return 2 * ROW_TILE if apart else 0


def in_registers(profile: HardwareProfile) -> bool:
    """Whether kernels multiply bf16 in matrix registers in row-invariant passes of the CPU."""
    there = profile.machine.matrix_registers
    if _is_here(profile):  # whoever sets `ONEDNN_MAX_CPU_ISA` later does without
        there = takes_matrix_registers("bfloat16")
    return there and multiplies_plain(profile)


def multiplies_plain(profile: HardwareProfile) -> bool:
    """Whether kernels multiply with plain bf16 in row-invariant passes on the CPU of a profile."""
    kernels = profile.machine.kernels
    return kernels_multiply_plain() if kernels is None or _is_here(profile) else kernels


def times_old_experts(profile: HardwareProfile) -> bool:
    """Whether torch multiplied where few rows of an expert take kernels now.

    Of passes that need not be row-invariant: profiles of before December 2026 timed them so.
    """
    old = any(not curve.exact and curve.few_rows is None for curve in profile.experts)
    return old and multiplies_plain(profile)


def times_unlike(profile: HardwareProfile, *, exact: bool) -> bool:
    """Whether layers and heads of the CPU were timed otherwise than passes multiply in bf16.

    Where kernels multiply in matrix registers in row-invariant passes (`exact`), and torch in all
    others, only the first are timed; profiles of before December 2026 timed the others. Nothing is
    said of a profile that stands in for this machine.
    """
    timed = any(curve.processor is Processor.CPU for curve in profile.layers)
    own = timed and profile.machine.kernels is not None
    return own and profile.layers_exact is not exact and in_registers(profile)


def standing_in(profile: HardwareProfile) -> HardwareProfile:
    """A profile of another machine that stands in for this one: kernels are those that are here.

    Which those are is found out when a quantised model is priced.
    """
    registers = takes_matrix_registers("bfloat16")
    machine = replace(profile.machine, kernels=None, matrix_registers=registers)
    return replace(profile, machine=machine)


def decoded_per_s(
    profile: HardwareProfile, processor: Processor, decoder: Decoder, form: str, bits: int
) -> Number:
    """Weights dequantised in a second."""
    kind, form = (processor, decoder), _SAME.get(Form(form), form)
    mine = [s for s in profile.dequantising if (s.processor, s.decoder) == kind]
    alike = [s for s in mine if s.form == form]
    found = [s for s in alike if s.bits == bits]
    if found:
        return found[0].numbers_per_s
    if form == Form.CODED:
        why = "assumed: as readers decode beside what computes, " + _WHERE
        return Number(value=_CODED_PER_S[*kind, bits], obtained=Obtained.ASSUMED, source=why)
    if processor is Processor.CUDA and decoder is Decoder.TORCH:
        moved = _MOVED.get(form, _ODD_BITS)
        why = f"assumed: {moved:g} bytes a weight that torch's operators move on a 4090"
        return Number(value=_MOVED_BYTES_PER_S / moved, obtained=Obtained.ASSUMED, source=why)
    share = _share(kind, form, bits)
    timed = [s.numbers_per_s.value for s in mine if (s.form, s.bits) == _INTEGERS]
    what = "these were timed" if timed else "of two cores or of a 4090's memory"
    return Number(
        value=share * (timed[0] if timed else _PER_S[kind]),
        obtained=Obtained.ASSUMED,
        source=f"assumed: {share:g} times integers of 4 bits, {what}; {_WHERE}",
    )


def _share(kind: tuple[Processor, Decoder], form: str, bits: int) -> float:
    """Of the rate of integers of 4 bits."""
    if kind[0] is Processor.CUDA:
        return 1.0
    shares = SHARES if kind[1] is Decoder.TORCH else _COMPILED_SHARES
    if (form, bits) == _INTEGERS:
        return 1.0
    return shares.get((form, bits), shares.get((form, 0), 1.0))


def _is_here(profile: HardwareProfile) -> bool:
    return profile.machine.cpu == processor()[0]
