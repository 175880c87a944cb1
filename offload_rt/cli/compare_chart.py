"""The bar chart of a comparison; matplotlib draws it where it is installed."""

import importlib.util
from pathlib import Path

from offload_rt.baselines.rows import RawRows
from offload_rt.baselines.summary import Figure, Summary, summaries
from offload_rt.printable import printable
from offload_rt.writing import replacing

_WIDTH_IN, _BAR_IN, _MARGIN_IN = 8.0, 0.42, 1.3


def draw(raw: RawRows, path: Path) -> str | None:
    """Draw tokens per second of each engine and batch size; returns why not, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no chart: matplotlib is not installed, `pip install matplotlib` gets it"
    bars = [(s, s.tokens_per_s) for s in summaries(raw) if s.tokens_per_s is not None]
    if not bars:
        return "no chart: nothing was measured"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH_IN, _MARGIN_IN + _BAR_IN * len(bars)), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    rows = range(len(bars))
    axes.barh(rows, [f.median for _, f in bars], color=[_colour(s) for s, _ in bars])
    axes.errorbar(
        [f.median for _, f in bars],
        rows,
        xerr=[_below(bars), _above(bars)],
        fmt="none",
        ecolor="black",
        capsize=3,
    )
    axes.set_yticks(rows, [printable(_label(s, raw)) for s, _ in bars], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s after the first (median of rounds; line: slowest to fastest round)")
    title = f"{raw.setup.model}, {raw.setup.dtype} on {raw.setup.device}"
    axes.set_title(printable(title), parse_math=False)
    with replacing(path) as temporary:  # without metadata: the same rows, the same bytes
        canvas.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    return None


def _label(summary: Summary, raw: RawRows) -> str:
    several = len(raw.setup.batches) > 1
    return f"{summary.engine}, batch {summary.batch}" if several else summary.engine


def _colour(summary: Summary) -> str:
    return "tab:blue" if summary.engine.startswith("offload-rt") else "tab:gray"


def _below(bars: list[tuple[Summary, Figure]]) -> list[float]:
    return [figure.median - figure.low for _, figure in bars]


def _above(bars: list[tuple[Summary, Figure]]) -> list[float]:
    return [figure.high - figure.median for _, figure in bars]
