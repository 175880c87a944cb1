"""What `--plan` does to the other options of a command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from offload_rt.errors import ConfigError
from offload_rt.planning.plan_file import PlanFile, read_plan


def with_plan(values: Mapping[str, Any]) -> tuple[dict[str, Any], PlanFile | None]:
    """The values of a command line, with those of its --plan in place of what was left open.

    Raises:
        ConfigError: the plan cannot be used, or an option contradicts it.
    """
    path = values.get("plan_path")
    if path is None:
        return dict(values), None
    plan = read_plan(path)
    return _merged(values, plan, path) | {"resident": plan.resident}, plan


def _merged(values: Mapping[str, Any], plan: PlanFile, path: Path) -> dict[str, Any]:
    context = click.get_current_context()
    merged = dict(values)
    for name, value in plan.options.items():
        if name not in values:
            continue  # this verb has no such option
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and str(values[name]) != str(value):
            flag = next(p.opts[-1] for p in context.command.params if p.name == name)
            raise ConfigError(
                f"{flag} is {values[name]}, --plan {path} has {value}: leave out one of them, or "
                "edit the plan"
            )
        merged[name] = value
    if context.get_parameter_source("resident_layers") is ParameterSource.COMMANDLINE:
        raise ConfigError(
            f"--resident-layers contradicts --plan {path}, which names the layers: leave out one"
        )
    return merged
