"""A run's page: one self-contained HTML file with tables and plots, and the plots as PNG files.

Names (of classes, rows, runs) are shown as they are, in HTML and in plots: `Report.figure` turns off formulas in the
texts of a figure, and `without_markup` does so for a figure that is saved otherwise.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import number_in, read_table, write_text, write_with
from common.run import Run

if TYPE_CHECKING:  # needs torch, and the table of runs does not
    from common.metrics import Metric

DOTS_PER_INCH = 80  # a page of ten plots stays below 5 MB
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } figure { margin: 1.5em 0 } figcaption { color: #666 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
"""


class Report:
    """Collects text, tables and figures in their order; `write` puts the page beside the PNG files."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = folder, title
        self.parts: list[str] = []

    def heading(self, words: str) -> None:
        self.parts.append(f"<h2>{html.escape(words)}</h2>")

    def text(self, words: str) -> None:
        self.parts.append(f"<p>{html.escape(words)}</p>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Add a table; floats are formatted by `shown`."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        lines = ("".join(f"<td>{html.escape(shown(value))}</td>" for value in row) for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")

    def figure(self, figure: Any, name: str, caption: str) -> Path:
        """Save a matplotlib figure as `name`.png, put it on the page and free it; returns its path."""
        without_markup(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")
        figure.clear()
        path = self.folder / f"{name}.png"
        write_with(path, lambda file: file.write(stream.getvalue()))
        data = base64.b64encode(stream.getvalue()).decode()
        words = html.escape(caption)
        self.parts.append(
            f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
        )
        return path

    def write(self, name: str = "report.html") -> Path:
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n"
        )
        path = self.folder / name
        write_text(path, page)
        return path


def subplots(width: float, height: float, *grid: int, **settings: Any) -> tuple[Any, Any]:
    """A figure of this size in inches and its axes. Not by pyplot, which keeps every figure and looks for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*grid, **settings)


def without_frame(axes: Any) -> None:
    """Leave only what is drawn inside the axes, and their title. `set_axis_off` still computes every hidden tick."""
    axes.set(xticks=[], yticks=[], frame_on=False)


def shown(value: Any) -> str:
    """The text of a table's cell: floats have four decimals, or six significant digits if very small or large."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.6g}"
    return str(value)


def without_markup(figure: Any) -> None:
    """Turn off formulas in every text of a matplotlib figure: a class called "$5 $\\frac" is no formula.

    The tick labels of numeric axes stay as matplotlib writes them.
    """
    from matplotlib.category import StrCategoryFormatter
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    numbers = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = axis.get_ticklabels(which="both")  # creates the labels that drawing would create
            if not isinstance(axis.get_major_formatter(), (StrCategoryFormatter, FixedFormatter, FuncFormatter)):
                numbers |= set(labels)
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)


def default_report(run: Run, settings: dict[str, Any], metrics: Sequence["Metric"], recipe: dict[str, Any]) -> Report:
    """The page of any finished run, not yet written: `common.mistakes` and the competition's own plots are added later.

    `settings` are the config's values, `recipe` those of its recipe; the first of `metrics` chose the best epoch.
    """
    page, result = Report(run.path, f"{run.provenance['competition']}: {run.name}"), run.result
    page.text(score_line(result))
    if (run.path / "metrics.csv").is_file():
        history = list(read_table(run.path / "metrics.csv"))
        if history and "epoch" in history[0]:  # a competition's own tables have other columns
            _training(page, history, metrics)
    if folds := result["folds"]:
        columns = list(dict.fromkeys(name for facts in folds for name in facts))
        page.heading("Folds")
        page.table(columns, [[facts.get(name, "") for name in columns] for facts in folds])
    page.heading("Settings")
    changed = {name for name, value in settings.items() if recipe.get(name) != value}
    page.text(f"Settings that differ from the recipe: {', '.join(sorted(changed)) or 'none'}.")
    names = sorted(settings, key=lambda name: name not in changed)
    page.table(["setting", "value", "recipe"], [(name, str(settings[name]), str(recipe.get(name))) for name in names])
    page.heading("Provenance")
    page.table(["fact", "value"], run.provenance.items())
    return page


def score_line(result: dict[str, Any]) -> str:
    """The score of result.json in one line, with its standard error ("errors", by metric): for the log and the page."""
    if result["score"] is None:
        return "No CV score: no rows were held out."
    name, values, errors = result["monitor"], result["metrics"], result.get("errors", {})

    def told(metric: str, value: float) -> str:
        return f"{metric} {with_error(value, errors.get(metric))}"

    words = f"CV score: {told(name, result['score'])} on {result['rows']:,} rows"
    if result["score"] != values[name] and not math.isnan(values[name]):
        words += f", with rules tuned on other rows ({values[name]:.5f} with rules tuned on the same rows)"
    elif result.get("tuned") and "score" not in result["tuned"]:
        words += ", with rules tuned on the same rows"
    others = ", ".join(told(metric, value) for metric, value in values.items() if metric != name)
    return words + (f"; {others}" if others else "") + "."


def with_error(score: float, error: float | None) -> str:
    """A score, with its standard error where it has one."""
    return f"{score:.5f}" + (f" ± {error:.5f}" if error is not None else "")


def _training(page: Report, history: list[dict[str, str]], metrics: Sequence["Metric"]) -> None:
    """Add the curves of metrics.csv, and the best epoch of every fold."""
    page.heading("Training")
    curves = training_curves(history, [metric.name for metric in metrics])
    page.figure(curves, "training", "Every epoch of every fold, before TTA and tuning")
    metric, rows = metrics[0], []
    for fold in dict.fromkeys(line["fold"] for line in history):
        lines = [line for line in history if line["fold"] == fold]
        scored = [line for line in lines if math.isfinite(_number(line.get(metric.name)))]
        if scored:
            top = max(scored, key=lambda line: metric.sign * _number(line[metric.name]))
            rows.append((_called(fold), len(lines), top["epoch"], _number(top["loss"]), _number(top[metric.name])))
    if rows:
        scores = [row[-1] for row in rows]
        spread = np.std(scores, ddof=1) if len(scores) > 1 else ""
        rows += [("mean", "", "", "", np.mean(scores)), ("standard deviation", "", "", "", spread)]
        called = f"its {metric.name}, before TTA and tuning"
        page.table(["", "epochs", "best epoch", "its training loss", called], rows)


def _called(fold: str) -> str:
    return f"fold {fold}" if fold.isdigit() else "all rows"


def _number(cell: str | None) -> float:
    found = number_in(cell or "")
    return math.nan if found is None else found


def training_curves(history: list[dict[str, str]], first: Sequence[str]) -> Any:
    """A figure of every column of metrics.csv against the epoch, one colour per fold.

    "loss" and "valid_loss" (dashed) share the first plot, the columns `first` follow. Constant columns are left out.
    """
    columns = dict.fromkeys(["loss", *first, *history[0]])
    columns = [name for name in columns if name not in ("fold", "epoch", "step", "valid_loss")]
    columns = [name for name in columns if len({line.get(name) for line in history} - {"", None}) > 1 or name == "loss"]
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure, grid = subplots(4.4 * across, 3.2 * down, down, across, squeeze=False)
    for axes, column in zip(grid.flat, columns, strict=False):
        for number, fold in enumerate(dict.fromkeys(line["fold"] for line in history)):
            for name, style in ((column, "-"), ("valid_loss", "--")) if column == "loss" else ((column, "-"),):
                points = [(int(line["epoch"]), _number(line.get(name))) for line in history if line["fold"] == fold]
                points = [point for point in points if math.isfinite(point[1])]
                if points:
                    label = _called(fold) if name == column else None
                    mark = ("." if style == "-" else "x") if len(points) < 30 else ""  # one point has no dashes
                    axes.plot(*zip(*points, strict=True), style, marker=mark, color=f"C{number % 10}", label=label)
        axes.set(xlabel="epoch", title="loss (dashed: validation)" if column == "loss" else column)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)  # one epoch: no halves around it
        axes.grid(alpha=0.3)
    for unused in figure.axes[len(columns) :]:
        unused.set_axis_off()
    if figure.axes[0].lines:
        figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
