"""Run language models that do not fit in device memory, with exactly their own output.

    import offload_rt

    with offload_rt.load("qwen-32b", device_memory="20GiB") as model:
        print(model.plan)
        print(model.generate("Why is the sky blue?", max_tokens=64).text)

Importing this imports nothing heavy: `load` brings torch along.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload_rt.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DeviceError,
        NumbersError,
        OffloadError,
        PlanError,
        ProfileError,
        SessionError,
    )
    from offload_rt.session.answering import Answer, Piece
    from offload_rt.session.scoring import Score
    from offload_rt.session.session import Session, Stream, load
    from offload_rt.session.summary import PlanSummary

_HOMES = {
    "offload_rt.errors": (
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "DeviceError",
        "NumbersError",
        "OffloadError",
        "PlanError",
        "ProfileError",
        "SessionError",
    ),
    "offload_rt.session.answering": ("Answer", "Piece"),
    "offload_rt.session.scoring": ("Score",),
    "offload_rt.session.session": ("Session", "Stream", "load"),
    "offload_rt.session.summary": ("PlanSummary",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "NumbersError",
    "OffloadError",
    "Piece",
    "PlanError",
    "PlanSummary",
    "ProfileError",
    "Score",
    "Session",
    "SessionError",
    "Stream",
    "load",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever is public
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
