"""The configuration of ZeRO-Inference: how the memory it may use is spent. Needs Python only."""

from dataclasses import dataclass
from typing import Any

_LAYERS_AHEAD = 2
_STEP_BYTES = 128 * 2**20  # activations and logits of a pass, and the allocator's slack
_MARGIN_BYTES = (
    384 * 2**20
)  # of the process's cap: page tables, dirty pages while files are written


@dataclass(frozen=True, slots=True)
class Spending:
    """Where memory goes.

    Attributes:
        buffer_elements: of one NVMe buffer; the largest tensor of a layer fits.
        buffers: how many; all large tensors of the layers ahead fit.
        live_elements: parameters that may be present besides those that are kept.
        kept_elements: parameters that are not offloaded.
    """

    buffer_elements: int
    buffers: int
    live_elements: int
    kept_elements: int


def spend(settings: dict[str, Any], used_bytes: int) -> Spending:
    """Divide the device memory and, on the CPU, the cap of the process.

    Args:
        settings: the `load` request.
        used_bytes: memory of this process before anything is loaded.
    """
    item = settings["item_bytes"]
    layer = -(-settings["largest_layer_bytes"] // item)
    buffer = -(-settings["largest_layer_tensor_bytes"] // item)
    buffers = _LAYERS_AHEAD * settings["tensors_per_layer"]
    live = _LAYERS_AHEAD * layer
    on_device = settings["device_bytes"] - settings["kv_bytes"] - _STEP_BYTES - live * item
    if settings["device"] == "cpu" and settings["cap_bytes"] is not None:
        # Parameters are computed on where they were read to: buffers are the live parameters.
        staging = buffer * buffers * item if settings["offload"] == "nvme" else 0
        rest = settings["cap_bytes"] - used_bytes - _MARGIN_BYTES
        on_device = min(on_device, rest - staging - settings["kv_bytes"] - _STEP_BYTES)
    return Spending(buffer, buffers, live, max(0, on_device // item))


def zero_config(settings: dict[str, Any], spending: Spending) -> dict[str, Any]:
    """What `deepspeed.initialize` gets."""
    on_cpu = settings["device"] == "cpu"
    offload: dict[str, Any] = {"device": settings["offload"], "pin_memory": not on_cpu}
    if settings["offload"] == "nvme":
        offload |= {
            "nvme_path": settings["scratch"],
            "buffer_count": spending.buffers,
            "buffer_size": spending.buffer_elements,
            "max_in_cpu": spending.kept_elements,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": settings["dtype"] == "bfloat16"},
        "fp16": {"enabled": settings["dtype"] == "float16"},
        "zero_optimization": {
            "stage": 3,
            "offload_param": offload,
            "stage3_prefetch_bucket_size": spending.live_elements,
            "stage3_max_live_parameters": spending.live_elements + spending.kept_elements,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0 if on_cpu else spending.kept_elements,
            "stage3_model_persistence_threshold": 0 if on_cpu else spending.kept_elements,
        },
        "aio": {
            "block_size": 2**20,
            "queue_depth": 32,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        },
    }
