"""What can be known to be wrong before torch is imported, which takes seconds."""

from offload_rt.config import DraftConfig, RuntimeConfig
from offload_rt.device.kinds import check_device
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint


def check_early(checkpoint: Checkpoint, runtime: RuntimeConfig, draft: DraftConfig) -> None:
    """Refuse a run that cannot be.

    Raises:
        ConfigError: --context is longer than the model was made for, or --device is not known.
        DeviceError: the device is not there.
        CheckpointError: the draft model or the heads cannot be used.
    """
    check_device(runtime)
    if runtime.context_tokens is not None:
        check_context(checkpoint, runtime.context_tokens)
    if draft.heads:
        from offload_rt.speculative.medusa.checkpoint import open_draft_heads

        open_draft_heads(checkpoint, draft)
    elif draft.has_weights:
        from offload_rt.speculative.draft_model.pair import open_draft_checkpoint

        open_draft_checkpoint(checkpoint, draft)


def check_context(checkpoint: Checkpoint, context_tokens: int) -> None:
    """Refuse a context that is longer than the model was made for.

    Raises:
        ConfigError: it is.
    """
    config = checkpoint.config
    if context_tokens > config.max_positions:
        raise ConfigError(
            f"--context is {context_tokens}, {checkpoint.name} was made for up to "
            f"{config.longest} tokens: lower it"
        )
