"""What headers say about row-invariant passes (`exact.py`). No torch here."""

from offload_rt.config import Exact, KVPlace, RuntimeConfig
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.config import ModelConfig


def headers_problem(config: ModelConfig, runtime: RuntimeConfig, device: DeviceKind) -> str:
    """Why passes cannot be row-invariant, as far as is known before modules are built.

    Args:
        config: of the model.
        runtime: how it is run.
        device: what computes.

    Returns:
        a reason; empty if there is none.
    """
    if runtime.exact is Exact.OFF:
        return "--exact off"
    if runtime.kv is KVPlace.NONE:
        return "texts are read in one pass each"
    if not device.host_computes:
        return f"row-invariant passes are not proven on {device.called} yet"
    return ""


def passes_problem(
    config: ModelConfig, runtime: RuntimeConfig, device: DeviceKind, *, needed: bool
) -> str:
    """The same, or why they need not be: nothing streams, nobody drafts, and none compares."""
    found = headers_problem(config, runtime, device)
    if not found and runtime.exact is Exact.AUTO and not needed:
        return "all is on the device and nobody drafts"
    return found
