"""What headers say about row-invariant passes (`exact.py`). No torch here."""

from offload_rt.config import Exact, KVPlace, RuntimeConfig
from offload_rt.device.kinds import DeviceKind
from offload_rt.device.system import takes_matrix_registers
from offload_rt.kernels.rows import fits_registers
from offload_rt.model.formats.stored import kernels_multiply_plain

_BF16 = "bfloat16"


def headers_problem(runtime: RuntimeConfig, device: DeviceKind) -> str:
    """Why passes cannot be row-invariant, as far as is known before modules are built; or empty."""
    if runtime.exact is Exact.OFF:
        return "--exact off"
    if runtime.kv is KVPlace.NONE:
        return "texts are read in one pass each"
    if not device.tile_rows:
        return ""
    if runtime.exact is Exact.AUTO:
        return f"what they cost on {device.called} is not measured: --exact on asks for them"
    return ""


def are_quickest(dtype: str, device: DeviceKind, *, in_registers: bool | None = None) -> bool:
    """Whether row-invariant passes are the quickest a CPU has, so that they are wanted anyway.

    Args:
        dtype: they compute in.
        device: what computes.
        in_registers: their kernels multiply bf16 in matrix registers (`kernels/registers.py`);
            None: as it is here and now.
    """
    if not device.host_computes or dtype != _BF16:
        return False
    if in_registers is None:
        return takes_matrix_registers(_BF16) and kernels_multiply_plain()
    return in_registers


def stays_as_it_lies(shape: tuple[int, int], exact: Exact, dtype: str, device: DeviceKind) -> bool:
    """Whether no copy is made of a matrix that stays, as matrix registers take it as it is.

    Args:
        shape: its outputs and inputs.
        exact: whether passes are to be row-invariant.
        dtype: they compute in.
        device: what computes.
    """
    outputs, inputs = shape
    return (
        fits_registers(inputs, outputs) and exact is not Exact.OFF and are_quickest(dtype, device)
    )


def passes_problem(
    runtime: RuntimeConfig, device: DeviceKind, *, needed: bool, kv_away: bool
) -> str:
    """The same, or why they need not be: nothing streams, nobody drafts, and none compares.

    Args:
        runtime: how it is run.
        device: what computes.
        needed: something streams, somebody drafts, answers are compared, or they are the quickest.
        kv_away: keys and values are not on the device.
    """
    found = headers_problem(runtime, device)
    if not found and device.tile_rows and kv_away:
        return f"on {device.called} keys and values would come once for each tile of a prompt"
    if not found and runtime.exact is Exact.AUTO and not needed:
        return "all is on the device and nobody drafts"
    return found
