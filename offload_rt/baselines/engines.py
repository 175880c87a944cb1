"""The engines a comparison knows: whose script runs them, in which Python. Imports no torch."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload_rt.config import DraftConfig
from offload_rt.errors import ConfigError

OURS, DRAFTED = "offload-rt", "offload-rt+draft"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine.

    Attributes:
        name: in reports.
        arguments: of its Python, to run the worker.
        environment: key of --engine-python; empty for ourselves.
        module: what its Python must be able to import.
        options: added to the `load` request.
        largest_batch: most sequences it runs at once; None for no limit.
    """

    name: str
    arguments: tuple[str, ...]
    environment: str
    module: str
    options: Mapping[str, str] = field(default_factory=dict)
    largest_batch: int | None = None


def _worker(name: str) -> tuple[str, ...]:
    return ("-m", f"offload_rt.baselines.workers.{name}")


KNOWN = {
    spec.name: spec
    for spec in (
        EngineSpec(name=OURS, arguments=_worker("run_offload_rt"), environment="", module="torch"),
        EngineSpec(
            name=DRAFTED, arguments=_worker("run_offload_rt"), environment="", module="torch"
        ),
        EngineSpec(
            name="deepspeed-nvme",
            arguments=_worker("run_deepspeed"),
            environment="deepspeed",
            module="deepspeed",
            options={"offload": "nvme"},
        ),
        EngineSpec(
            name="deepspeed-cpu",
            arguments=_worker("run_deepspeed"),
            environment="deepspeed",
            module="deepspeed",
            options={"offload": "cpu"},
        ),
        EngineSpec(
            name="accelerate",
            arguments=_worker("run_accelerate"),
            environment="accelerate",
            module="accelerate",
        ),
        EngineSpec(
            name="transformers",
            arguments=_worker("run_transformers"),
            environment="transformers",
            module="transformers",
        ),
        EngineSpec(
            name="transformers-assisted",
            arguments=_worker("run_transformers"),
            environment="transformers",
            module="transformers",
            largest_batch=1,  # `generate` refuses to assist more
        ),
    )
}
_GROUPS = {"deepspeed": ("deepspeed-nvme", "deepspeed-cpu")}


def choose_engines(against: str, draft: DraftConfig) -> list[EngineSpec]:
    """Ourselves and the engines of --against, in the order of a round.

    Args:
        against: comma-separated names; `deepspeed` and `transformers` mean all their kinds.
        draft: who drafts for us.

    Raises:
        ConfigError: a name is not known, or needs a draft model.
    """
    assists = bool(draft.model) and not draft.over_retrieval
    names = [OURS, DRAFTED] if draft.drafts else [OURS]
    for part in filter(None, (name.strip() for name in against.split(","))):
        if part == "transformers":
            assisted = ["transformers-assisted"] if assists else []
            names += [part, *assisted]
        else:
            names += _GROUPS.get(part, [part])
    for name in names:
        if name not in KNOWN or (name in (OURS, DRAFTED) and names.count(name) > 1):
            others = [name for name in KNOWN if name not in (OURS, DRAFTED)]
            raise ConfigError(
                f"--against {name} is not known: use {', '.join([*_GROUPS, *others])}"
            )
        if name == "transformers-assisted" and not assists:
            raise ConfigError("--against transformers-assisted needs a --draft model:MODEL")
    return [KNOWN[name] for name in dict.fromkeys(names)]


def read_pythons(given: Sequence[str], engines: Sequence[EngineSpec]) -> dict[str, Path]:
    """The values of --engine-python by environment.

    Raises:
        ConfigError: a value is not NAME=PATH, or its Python cannot be run or belongs to no engine.
    """
    wanted = dict.fromkeys(spec.environment for spec in engines if spec.environment)
    found = {}
    for value in given:
        name, equals, path = value.partition("=")
        if not equals or not path:
            raise ConfigError(f"--engine-python is {value}, accepted is ENGINE=PATH")
        if name not in wanted:
            raise ConfigError(
                f"--engine-python {name}=... has no effect: compared are {', '.join(wanted)}"
            )
        if not os.access(path, os.X_OK) or Path(path).is_dir():
            raise ConfigError(f"--engine-python {value}: {path} is no program that can be run")
        found[name] = Path(os.path.abspath(path))
    return found


def python_of(spec: EngineSpec, given: Mapping[str, Path]) -> Path | str:
    """The Python that runs an engine, or why there is none."""
    if spec.environment in given:
        return given[spec.environment]
    made = baselines_folder() / spec.environment / "bin" / "python"
    if spec.environment and made.exists():
        return made
    if importlib.util.find_spec(spec.module) is not None:
        return Path(sys.executable)
    return (
        f"{spec.module} is not installed: run tools/setup_baselines.sh, or name a Python that has "
        f"it with --engine-python {spec.environment}=PATH"
    )


def baselines_folder() -> Path:
    """Where `tools/setup_baselines.sh` makes environments."""
    import platformdirs  # not on every machine with a GPU (`tools/gpu_check.sh`)

    return platformdirs.user_data_path("offload-rt") / "baselines"
