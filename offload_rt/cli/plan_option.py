"""What `--plan` does to the other options of a command line."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from offload_rt.planning.plan_file import PlanFile, read_plan
from offload_rt.session import options


def with_plan(values: Mapping[str, Any]) -> tuple[dict[str, Any], PlanFile | None]:
    """The values of a command line, with those of its --plan in place of what was left open.

    Raises:
        ConfigError: the plan cannot be used, or an option contradicts it.
    """
    path = values.get("plan_path")
    if path is None:
        return dict(values), None
    context, plan = click.get_current_context(), read_plan(path)

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    here = {name: value for name, value in plan.options.items() if name in values}
    spoken = dataclasses.replace(plan, options=here)  # some verbs have fewer options
    return options.with_plan(values, spoken, path, given), plan
