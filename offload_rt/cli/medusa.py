"""`offload-run medusa`: look at Medusa heads, measure how often they are right."""

import json
from typing import Any

import click

from offload_rt.cli import options
from offload_rt.cli.calibrate import calibrate
from offload_rt.model.checkpoint import resolve_model
from offload_rt.printable import printable
from offload_rt.speculative.medusa.calibration import (
    CALIBRATION_FILE,
    Calibration,
    best_trees,
    read_calibration,
)
from offload_rt.speculative.medusa.checkpoint import (
    CONVERT,
    HeadsCheckpoint,
    base_model,
    open_heads,
    stated_heads,
)
from offload_rt.speculative.medusa.names import TOKEN_MAP, HeadsShape, LmHead
from offload_rt.speculative.medusa.trees import DEFAULT_TREE, cut, named_trees
from offload_rt.units import format_size

_WHAT_WIDTH = 14
_SIZES = (16, 32, 63, 128, 256)


class _Group(click.Group):
    """Its verbs; one that went says where it is now."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == "convert":
            ctx.fail(f"no verb convert here: use `{CONVERT} HEADS FOLDER` of the source repository")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group)
def medusa() -> None:
    """Look at Medusa heads, measure how often they are right.

    HEADS is a folder with heads, a full model that has them inside, or a hub id in the local cache.
    They draft with `--draft medusa:HEADS`.
    """


@medusa.command()
@click.argument("heads")
@options.json_option
def info(heads: str, json: bool) -> int:
    """Show what heads are made of and what they are worth.

    Reads headers only.
    """
    source = open_heads(resolve_model(heads))
    calibration = read_calibration(source.folder)
    if json:
        click.echo(_as_json(source, calibration))
    else:
        rows = [*_rows(source), *_worth(source.names.shape, calibration)]
        click.echo("\n".join(f"{what:<{_WHAT_WIDTH}}{printable(detail)}" for what, detail in rows))
    return 0


medusa.add_command(calibrate)


def _output_heads(source: HeadsCheckpoint) -> str:
    shape = source.names.shape
    text = {
        LmHead.MODEL: "the model's",
        LmHead.COMMON: f"one stored for all, {shape.head_rows} rows",
        LmHead.OWN: f"one stored for each, {shape.head_rows} rows",
    }[shape.lm_head]
    if source.token_map is not None:
        text += f", of which a token map names {source.token_map.shape[0]}"
    return text


def _nbytes(source: HeadsCheckpoint) -> int:
    return sum(extent.nbytes for extent in source.extents.values())


def _rows(source: HeadsCheckpoint) -> list[tuple[str, str]]:
    shape = source.names.shape
    stated = stated_heads(source.config)
    dtypes = sorted({e.dtype for name, e in source.extents.items() if name != TOKEN_MAP})
    heads = f"{shape.heads}, {shape.layers} layer{'s' * (shape.layers > 1)} each"
    if stated is not None and stated != shape.heads:
        heads += f" (config.json says {stated} heads; the tensors decide)"
    rows = [
        ("heads", heads),
        ("hidden size", f"{shape.hidden_size}, {'with' if shape.bias else 'no'} biases"),
        ("output heads", _output_heads(source)),
        ("size", f"{format_size(_nbytes(source))}, {', '.join(dtypes)}"),
        ("names", f"{source.names.naming}'s"),
        ("made for", base_model(source.config) or "not stated"),
    ]
    return rows


def _worth(shape: HeadsShape, calibration: Calibration | None) -> list[tuple[str, str]]:
    """What is known about how often the heads are right."""
    if calibration is None:
        tree = cut(named_trees()[DEFAULT_TREE], nodes=10**9, heads=shape.heads)
        return [
            ("calibration", "none: `offload-run medusa calibrate HEADS MODEL --prompts FILE`"),
            ("tree", f"{DEFAULT_TREE}, {len(tree)} nodes"),
        ]
    trees = best_trees(calibration.accuracy, max(_SIZES))
    worth = ", ".join(f"{trees.tokens_per_pass(n):.2f} with {n}" for n in _SIZES)
    rows = [
        ("calibration", f"{calibration.places[0]} places in answers of {calibration.model}"),
        ("tree", f"best first, {len(trees.choices)} nodes of use"),
        ("tokens/pass", f"{worth} nodes, as the calibration predicts"),
    ]
    for head, row in enumerate(calibration.accuracy, start=1):
        shares = f"{row[0]:.0%} at once, {sum(row[:5]):.0%} among 5, {sum(row):.0%} of {len(row)}"
        rows.append((f"head {head}", f"right {shares}"))
    return rows


def _as_json(source: HeadsCheckpoint, calibration: Calibration | None) -> str:
    shape = source.names.shape
    record: dict[str, Any] = {
        "heads": shape.heads,
        "layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "bias": shape.bias,
        "lm_head": str(shape.lm_head),
        "head_rows": shape.head_rows,
        "truncated": shape.truncated,
        "naming": str(source.names.naming),
        "bytes": _nbytes(source),
        "base_model": base_model(source.config),
        "config_heads": stated_heads(source.config),
        "pickled": False,
        "calibration": None,
    }
    if calibration is not None:
        trees = best_trees(calibration.accuracy, max(_SIZES))
        record["calibration"] = {
            "file": CALIBRATION_FILE,
            "model": calibration.model,
            "places": list(calibration.places),
            "accuracy": calibration.accuracy,
            "tokens_per_pass": {str(n): trees.tokens_per_pass(n) for n in _SIZES},
        }
    return json.dumps(record)
