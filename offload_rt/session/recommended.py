"""The sampling that a model's authors recommend, in its generation_config.json."""

import dataclasses
from pathlib import Path

from offload_rt.config import SamplingConfig
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.session.observer import Observer
from offload_rt.session.settings import Settings, check_accept
from offload_rt.text.files import DeclaredSampling, declared_sampling
from offload_rt.units import join_words

_FIELDS = ("temperature", "top_k", "top_p", "min_p")


def with_recommended(settings: Settings, folder: Path, observer: Observer) -> Settings:
    """The same with the model's own sampling where --sampling model asks for it.

    What the command line itself says is kept. Where nobody chose, a note names what the authors
    recommend; a setting that is not there is named either way.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: it recommends nothing, or what --accept or another option contradicts.
    """
    if settings.own_sampling is None:
        if not settings.chose_sampling:
            _offer(folder, observer)
        return settings
    declared = declared_sampling(folder)
    if (found := _recommended(declared)) is None:
        raise ConfigError(
            f"--sampling model: generation_config.json of {folder.name} recommends no sampling; "
            "use --temperature, or --sampling greedy"
        )
    changes = {name: value for name, value in found.items() if name not in settings.own_sampling}
    sampling = dataclasses.replace(settings.sampling, **changes)  # type: ignore[arg-type]
    if sampling.greedy:
        sampling = SamplingConfig(seed=sampling.seed)
    check_accept(sampling, settings.draft)
    left_out = f"; {without}" if (without := _not_applied(declared)) else ""
    observer.note(f"sampling with {_words(sampling)}{left_out}")
    return dataclasses.replace(settings, sampling=sampling)


def _offer(folder: Path, observer: Observer) -> None:
    try:
        declared = declared_sampling(folder)
    except CheckpointError:
        return  # it is not used
    if (found := _recommended(declared)) is None:
        return
    try:
        words = _words(SamplingConfig(**found))  # type: ignore[arg-type]
    except ConfigError:
        return
    left_out = f" ({without})" if (without := _not_applied(declared)) else ""
    observer.note(
        f"answers are greedy, the model's authors recommend {words}: --sampling model{left_out}"
    )


def _recommended(declared: DeclaredSampling) -> dict[str, float] | None:
    """Values of the sampling options, or None where greedy answers or nothing are recommended."""
    found = {name: value for name in _FIELDS if (value := getattr(declared, name)) is not None}
    if declared.do_sample is False or not (declared.do_sample or found):
        return None
    found.setdefault("temperature", 1.0)
    return None if found["temperature"] == 0.0 else found


def _not_applied(declared: DeclaredSampling) -> str:
    """What of the file has no effect here; empty if nothing."""
    penalty = declared.repetition_penalty
    if penalty is None or penalty == 1.0:
        return ""
    return f"without its repetition_penalty {penalty:g}, as drafts are checked without regard to it"


def _words(sampling: SamplingConfig) -> str:
    if sampling.greedy:
        return "temperature 0"
    values = {name.replace("_", "-"): getattr(sampling, name) for name in _FIELDS}
    off = {"top-k": 0, "top-p": 1.0, "min-p": 0.0}
    return join_words(f"{name} {v:g}" for name, v in values.items() if v != off.get(name))
