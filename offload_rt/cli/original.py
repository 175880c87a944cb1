"""What this machine would do with the model that quantised weights were made from."""

from pathlib import Path

from offload_rt.cli.plan import device_there
from offload_rt.config import DraftConfig, RuntimeConfig, SamplingConfig
from offload_rt.costs.drafters import Drafting
from offload_rt.errors import OffloadError
from offload_rt.model.config import ModelConfig
from offload_rt.model.outline import outline_known
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.planner import plan_run
from offload_rt.session.means import means_for, speeds_for
from offload_rt.session.opening import AUTO_CONTEXT_TOKENS
from offload_rt.units import format_size

# Llama 405B has 126. Up to 200 layers it takes 0.2 s, with 1000 19 s (measured, one busy core).
_LAYERS_LIMIT = 200


def original_outlook(config: ModelConfig) -> str:
    """The size of the original and the predicted time of a token, without drafting.

    Of families whose sizes are known without torch; empty for others.
    """
    checkpoint = outline_known(config, Path(config.model_type))
    if checkpoint is None:
        return ""
    size = f"; with 16-bit weights it has {format_size(checkpoint.total_bytes)}"
    if config.num_layers > _LAYERS_LIMIT:
        return size
    draft = DraftConfig(draft="none")
    context = min(config.max_positions, AUTO_CONTEXT_TOKENS)
    load = RunLoad(capacities=[context], prompt_tokens=context, drafting=Drafting(draft, None, 0))
    try:
        runtime = RuntimeConfig()
        device, free = device_there(runtime)
        speeds = speeds_for(None, device)
        means = means_for(checkpoint, SamplingConfig(), speeds, draft)
        found = plan_run(checkpoint, runtime, device, load=load, free=free, means=means)
    except OffloadError:
        return f"{size}, which does not fit here"
    if found.prediction is None:
        return size
    stand_in = "" if speeds.own else "stand-in "
    return (
        f"{size} and should need {found.prediction.s_per_token:.3g} s/token here without drafting "
        f"({stand_in}profile {speeds.profile.name})"
    )
