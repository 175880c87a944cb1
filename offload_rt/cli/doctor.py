"""`offload-run doctor`: what this machine offers, what is wrong, and how to fix it."""

import dataclasses
import json as json_format

import click

from offload_rt.cli import options
from offload_rt.cli.checks import Finding, Level, diagnose
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.machine import inspect_machine
from offload_rt.cli.options import Output
from offload_rt.model.checkpoint import resolve_model
from offload_rt.printable import printable

_WHAT_WIDTH = 13


@click.command()
@click.argument("model", required=False)
@options.json_option
def doctor(model: str | None, json: bool) -> int:
    """Check this machine; with MODEL also the disk it is on.

    Exit code 0 when runs are possible (there may be warnings), 1 when something is broken.
    """
    quiet_libraries(Output())
    folder = resolve_model(model) if model else None
    with Console(Output()).waiting("looking at this machine"):
        findings = diagnose(inspect_machine(folder))
    broken = any(finding.level is Level.FAIL for finding in findings)
    if json:
        records = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json_format.dumps({"usable": not broken, "findings": records}))
    else:
        click.echo("\n".join(map(_line, findings)))
        click.echo(_verdict(findings))
    return 1 if broken else 0


def _line(finding: Finding) -> str:
    head = printable(f"{finding.level:<6}{finding.what:<{_WHAT_WIDTH}}{finding.detail}")
    fix = printable(finding.fix)
    return f"{head}\n{'':<6}{'':<{_WHAT_WIDTH}}-> {fix}" if fix else head


def _verdict(findings: list[Finding]) -> str:
    failures = sum(finding.level is Level.FAIL for finding in findings)
    warnings = sum(finding.level is Level.WARN for finding in findings)
    if failures:
        return f"not usable: {failures} broken, {warnings} to look at"
    return f"usable, {warnings} to look at" if warnings else "usable"
