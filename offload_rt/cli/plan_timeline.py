"""One step as a picture: the streams of a simulated pass, as text, HTML, PNG or a Chrome trace."""

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path

from offload_rt.cli.columns import columns, hanging
from offload_rt.errors import ConfigError
from offload_rt.printable import printable
from offload_rt.trace import Lane, TraceEvent, lanes_of, write_trace
from offload_rt.writing import replacing, write_text

_FORMS = (".html", ".png", ".json")
# Up to which share of a column's time a lane may be busy to get the mark; above all: `#`.
_MARKS = {" ": 0.01, ".": 1 / 3, ":": 2 / 3, "=": 0.99}
_COLUMNS, _NAME = 60, 17  # of the text
_WIDTH, _LEFT, _ROW, _BAR, _TOP = 1600, 140, 44, 30, 16  # of the picture, in pixels
_LETTER = 7  # pixels of a letter in a bar
_COLOURS = {
    Lane.COPY: ("#c2703d", "#dd9a6c"),
    Lane.KV: ("#8a6fb3", "#b09bd0"),
    Lane.KV_BACK: ("#b36f9a", "#d09bbf"),
    Lane.COMPUTE: ("#3b76af", "#76a5d3"),
    Lane.DRAFTING: ("#4b8f5c", "#7fb98d"),
}
_OTHER = ("#777777", "#aaaaaa")
_TICKS = 10


def check_picture(path: Path) -> None:
    """Refuse a file that no picture can be written to, before there is one.

    Raises:
        ConfigError: its name ends in no known form, what draws a PNG is not installed, or the file
            could not be written.
    """
    if path.suffix.lower() not in _FORMS:
        raise ConfigError(
            f"--timeline {path} ends in no known form: give a file that ends in .html, .png or "
            ".json (a trace for https://ui.perfetto.dev)"
        )
    if path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
        raise ConfigError(
            f"--timeline {path} needs matplotlib, which is not installed: `pip install "
            "matplotlib`, or give a file that ends in .html"
        )


def write_picture(path: Path, events: Sequence[TraceEvent], title: str) -> None:
    """Write a picture of a step in the form that the file's name ends in.

    Raises:
        ConfigError: it could not be written.
    """
    form = path.suffix.lower()
    if form == ".json":
        write_trace(path, events, title)
    elif form == ".html":
        write_text(path, _html(events, title))
    else:
        _png(path, events, title)


def timeline_lines(events: Sequence[TraceEvent]) -> list[str]:
    """A step as text of at most 80 columns: how busy each lane is in each part of the time."""
    end_s = max((event.end_s for event in events), default=0.0)
    if not end_s:
        return []
    room = min(columns() - _NAME - 2, _COLUMNS)
    lines = [f"one step of {end_s:.3g} s, {end_s / room:.2g} s a column"]
    for lane in lanes_of(events):
        mine = [event for event in events if event.lane == lane]
        marks = "".join(_mark(mine, column, end_s / room) for column in range(room))
        lines.append(f"  {lane:<{_NAME}}{marks}".rstrip())
    legend = "busy: . up to a third, : up to two thirds, = more, # all of the time"
    return [*lines, hanging(legend, 2)]


def _mark(events: Sequence[TraceEvent], column: int, width_s: float) -> str:
    start_s, end_s = column * width_s, (column + 1) * width_s
    inside = (min(e.end_s, end_s) - max(e.start_s, start_s) for e in events)
    busy = sum(max(0.0, seconds) for seconds in inside) / width_s
    return next((mark for mark, most in _MARKS.items() if busy <= most), "#")


def _html(events: Sequence[TraceEvent], title: str) -> str:
    """A page with one drawing in it; it loads nothing."""
    lanes, end_s = lanes_of(events), max((event.end_s for event in events), default=1.0)
    height = _TOP + _ROW * len(lanes) + 24
    scale = (_WIDTH - _LEFT - 10) / end_s
    parts = [_axis(end_s, scale, height)]
    for row, lane in enumerate(lanes):
        y = _TOP + _ROW * row
        parts.append(f'<text x="4" y="{y + 20}" class="lane">{escape(printable(lane))}</text>')
        mine = [event for event in events if event.lane == lane]
        parts += [_bar(event, index, y, scale) for index, event in enumerate(mine)]
    name = escape(printable(title))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5em; background: #fff; color: #222 }}
div {{ overflow-x: auto }}
.lane {{ font-size: 13px }} .tick {{ font-size: 11px; fill: #666 }}
.in {{ font-size: 11px; fill: #fff; pointer-events: none }}
rect:hover {{ stroke: #000 }}
</style></head><body>
<h1 style="font-size:1.1em">{name}</h1>
<p>One step in the steady state: its pass, then drafting for the next. Point at a bar for what it
is. Copies run ahead: what is copied during the last layers is for the first ones of the next
step.</p>
<div><svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}">
{chr(10).join(parts)}
</svg></div></body></html>
"""


def _axis(end_s: float, scale: float, height: int) -> str:
    lines = []
    for tick in range(_TICKS + 1):
        x = _LEFT + scale * end_s * tick / _TICKS
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 20}" stroke="#ddd"/>')
        anchor = "end" if tick == _TICKS else "middle"
        lines.append(
            f'<text x="{x:.1f}" y="{height - 6}" class="tick" text-anchor="{anchor}">'
            f"{end_s * tick / _TICKS:.3g} s</text>"
        )
    return "\n".join(lines)


def _bar(event: TraceEvent, index: int, y: int, scale: float) -> str:
    x, width = _LEFT + scale * event.start_s, scale * (event.end_s - event.start_s)
    name = escape(printable(event.name))
    seconds = event.end_s - event.start_s
    moved = event.details.get("bytes")
    about = f"{name}: {seconds:.4g} s" + (f", {moved / 1e6:.4g} MB" if moved else "")
    bar = (
        f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.2):.2f}" height="{_BAR}" '
        f'fill="{_colour(event.lane, index)}"><title>{about}</title></rect>'
    )
    if width < _LETTER * (len(event.name) + 1):
        return bar
    return f'{bar}<text x="{x + 4:.1f}" y="{y + 20}" class="in">{name}</text>'


def _colour(lane: str, index: int) -> str:
    found = (pair for known, pair in _COLOURS.items() if lane.startswith(known))
    return next(found, _OTHER)[index % 2]


def _png(path: Path, events: Sequence[TraceEvent], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = lanes_of(events)
    canvas = Figure(figsize=(16, 1.2 + 0.6 * len(lanes)), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    for row, lane in enumerate(lanes):
        mine = [event for event in events if event.lane == lane]
        axes.broken_barh(
            [(event.start_s, event.end_s - event.start_s) for event in mine],
            (row - 0.35, 0.7),
            facecolors=[_colour(lane, index) for index in range(len(mine))],
        )
    axes.set_yticks(range(len(lanes)), [printable(lane) for lane in lanes], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.01)
    axes.set_xlabel("seconds of one step in the steady state")
    axes.set_title(printable(title), parse_math=False)
    with replacing(path) as temporary:  # without metadata: the same step, the same bytes
        canvas.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
