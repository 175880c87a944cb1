"""`offload-run config`: which defaults are in force, and where each comes from."""

import json as json_format
from typing import Any

import click

from offload_rt.cli import options
from offload_rt.cli.columns import hanging
from offload_rt.cli.defaults import (
    COMMON,
    ConfigFile,
    Default,
    config_path,
    defaults_of,
    read_config,
    variables_of,
    verb_options,
)
from offload_rt.cli.options import option_key, section_names
from offload_rt.cli.pages import load_verb


@click.command()
@click.option("--template", is_flag=True, help="Print a file with all options, to be edited.")
@options.json_option
@click.pass_context
def config(context: click.Context, template: bool, json: bool) -> int:
    """Show the defaults in force, and where each comes from.

    A flag counts before a variable, a variable before the file, the file before what is built in.
    --device-memory of all verbs is OFFLOAD_RT_DEVICE_MEMORY, or device-memory below [common] in the
    file; of one verb OFFLOAD_RT_BENCH_DEVICE_MEMORY, or below [bench]. OFFLOAD_RT_CONFIG names
    another file, `offload-run --no-config VERB` goes without it.
    """
    if template:
        click.echo(_template())
        return 0
    root = context.find_root()
    file = None if root.params.get("no_config") else read_config()
    found = _in_force(file)
    if json:
        click.echo(json_format.dumps(_as_json(file, found)))
    else:
        click.echo(_as_text(file, found))
    return 0


def _in_force(file: ConfigFile | None) -> dict[tuple[str, str], list[tuple[str, Default]]]:
    """The verbs that an option's default is of, by flag and origin."""
    found: dict[tuple[str, str], list[tuple[str, Default]]] = {}
    for verb, params in verb_options():
        command = load_verb(verb)
        assert command is not None
        flags = {option.name: option.opts[-1] for option in params}
        for name, default in defaults_of(verb, command, file).items():
            found.setdefault((flags[name], default.origin), []).append((verb, default))
    return found


def _as_json(
    file: ConfigFile | None, found: dict[tuple[str, str], list[tuple[str, Default]]]
) -> dict[str, Any]:
    return {
        "file": str(config_path()),
        "read": file is not None,
        "defaults": [
            {
                "option": flag,
                "value": uses[0][1].value,
                "from": origin,
                "verbs": [v for v, _ in uses],
            }
            for (flag, origin), uses in found.items()
        ],
    }


def _as_text(
    file: ConfigFile | None, found: dict[tuple[str, str], list[tuple[str, Default]]]
) -> str:
    lines = [f"file: {config_path()}{'' if file else ', not read'}"]
    for (flag, origin), uses in found.items():
        verbs = ", ".join(verb for verb, _ in uses)
        origin = origin.removeprefix(str(config_path())).strip()
        lines.append(hanging(f"  {flag} {_shown(uses[0][1].value)}  from {origin}, for {verbs}", 6))
    if not found:
        lines.append("all defaults are built in; `offload-run config --template` prints a file")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _template() -> str:
    """A file with every option as a comment."""
    lines = [
        "# Defaults of offload-run: save this as the file that `offload-run config` names.",
        "# Take away the # before a line to set it. A flag counts before a variable, named",
        "# behind each, a variable before this file.",
        "",
        f"[{COMMON}]  # all verbs that have the option",
    ]
    shared = dict.fromkeys(section_names())
    own: dict[str, list[click.Option]] = {}
    for verb, params in verb_options():
        for option in params:
            key = option_key(option)
            if key not in shared:
                own.setdefault(verb, []).append(option)
            elif shared[key] is None and len(variables_of(verb, key)) > 1:
                shared[key] = _entry(verb, option)
    lines += [entry for entry in shared.values() if entry]
    for verb, params in own.items():
        lines += ["", f"[{verb}]  # options of [common] may be set here, too"]
        lines += [_entry(verb, option) for option in params]
    return "\n".join(lines)


def _entry(verb: str, option: click.Option) -> str:
    key = option_key(option)
    default = option.to_info_dict()["default"]
    if option.is_flag:
        value = "false"
    elif isinstance(default, (int, float)):
        value = str(default)
    else:
        value = f'"{default}"' if isinstance(default, str) else '"..."'
    return f"# {key} = {value}  # {variables_of(verb, key)[0]}"
