"""The least device memory of a training, checked before it begins."""

import math
from collections.abc import Sequence

from offload_rt.config import RuntimeConfig
from offload_rt.costs.sizes import number_bytes_of
from offload_rt.errors import PlanError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.speculative.medusa.names import HeadsShape
from offload_rt.training.corpus import Sample
from offload_rt.training.settings import Method, TrainConfig
from offload_rt.units import format_size

# A parameter, its gradient and AdamW's two moments, fp32 each.
PARAMETER_BYTES = 16
# A logit in bf16 and fp32, its softmax and the gradients of both.
LOGIT_BYTES = 16


def check_memory(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    config: TrainConfig,
    shape: HeadsShape,
    samples: Sequence[Sample],
) -> None:
    """Refuse a training that cannot keep to --device-memory.

    Raises:
        PlanError: its parts alone are larger.
    """
    limit = runtime.only_limit_bytes
    output = checkpoint.head or checkpoint.embedding
    rows = shape.head_rows or output.shape[0]
    output_bytes = math.prod(output.shape) * number_bytes_of(checkpoint, runtime.dtype)
    heads_bytes = PARAMETER_BYTES * sum(math.prod(s) for s in shape.tensors().values())
    needed = heads_bytes + output_bytes + config.batch_tokens * rows * LOGIT_BYTES
    advice = "--batch-tokens or --vocabulary"
    if config.method is Method.MEDUSA_2:
        longest = max(len(sample.places) for sample in samples)
        logits = longest * (shape.heads * rows + 3 * output.shape[0]) * LOGIT_BYTES
        needed = max(needed, heads_bytes + checkpoint.total_bytes + logits)
        advice += ", shorten texts with --context"
    if limit is not None and needed > limit:
        raise PlanError(
            f"training needs {format_size(needed)} of device memory, the limit is "
            f"{format_size(limit)}: raise --device-memory, or lower {advice}",
            needed,
        )
