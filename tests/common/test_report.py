"""The page embeds its plots, text cannot become markup, and its numbers are those of the run's files."""

import base64
import csv
import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common import mistakes, report
from common.kaggle import board
from common.kaggle.ledger import Row
from common.metrics import accuracy, rmse
from common.report import Report, default_report, score_line
from common.run import Run

MARKUP = "price $\\frac{$ tag <b>"
RNG = np.random.default_rng(0)


def test_page_is_one_file_with_everything(tmp_path):
    page = Report(tmp_path, "A <run>")
    page.text("2 < 3 & 4")
    page.table(["name", "value"], [("<b>", 0.123456), ("count", 7)])
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    path = page.figure(figure, "curve", 'a "curve"')
    html = page.write().read_text()
    assert path == tmp_path / "curve.png" and path.read_bytes().startswith(b"\x89PNG")
    assert base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1)) == path.read_bytes()
    assert "A &lt;run&gt;" in html and "2 &lt; 3 &amp; 4" in html and "<td>&lt;b&gt;</td>" in html
    assert "<td>0.1235</td>" in html and "<td>7</td>" in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "report.html"]


def every_text(name):
    """A figure that shows `name` in every kind of text that a plot has."""
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar([name, "other"], [1, 2], label=name)
    left.set(title=name, xlabel=name, ylabel=name)
    left.legend(title=name)
    left.annotate(name, (0.5, 0.5))
    left.text(0, 1, name)
    right.semilogy([1, 2, 1000])
    right.set_xticks([0, 1], [name, "other"], rotation=90)
    figure.colorbar(left.imshow(np.eye(2)), ax=left, label=name)
    figure.suptitle(name)
    figure.legend()
    return figure


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_names_in_plots_are_never_markup(tmp_path):
    """The pixels are the same as with dollars escaped in matplotlib's own way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    page = Report(tmp_path, "names")
    for name in (MARKUP, "$x^2$", "\\$ and $", "a_b^c {"):
        page.figure(every_text(name), "plot", name)
        figures = [every_text(name), every_text(name.replace("$", "\\$"))]
        for figure in figures:
            FigureCanvasAgg(figure)
        report.without_markup(figures[0])
        assert np.array_equal(*map(pixels, figures)), name


def test_the_board_shows_names_as_they_are(tmp_path):
    rows = [Row(time="2018-01-01", file="a.csv", run=MARKUP, validation="0.5", public="0.4")]
    board.draw(rows, SimpleNamespace(slug=MARKUP), tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_labels_that_matplotlib_makes_of_numbers_stay(tmp_path):
    figure = Figure()
    axes = figure.subplots()
    axes.loglog([1, 10, 1000], [1, 10, 1000])
    report.without_markup(figure)
    assert all(label.get_parse_math() for label in axes.get_xticklabels() + axes.get_yticklabels())
    assert not axes.title.get_parse_math()


@pytest.fixture
def run(tmp_path):
    lines = ["fold,epoch,step,lr,loss,valid_loss,accuracy"]
    lines += [
        f"{fold},{e},{9 * e},{0.1 / e},{1 / e},{2 / e if e % 2 else ''},{0.1 * e + 0.01 * fold if e % 2 else ''}"
        for fold in (0, 1)
        for e in (1, 2, 3, 4)
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    result = {"monitor": "accuracy", "score": 0.9, "metrics": {"accuracy": 0.9, "log_loss": 0.3}, "rows": 1200}
    result |= {"errors": {"accuracy": 0.01}, "folds": [{"fold": 0, "seconds": 7.5}, {"fold": 1, "micro_batch": 8}]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    return Run(tmp_path, {"competition": MARKUP, "command": "make <this>"})


def test_every_run_has_a_page(run):
    page = default_report(run, {"lr": 0.1, "epochs": 4}, (accuracy(),), recipe={"lr": 0.2, "epochs": 4})
    html = page.write().read_text()
    assert "CV score: accuracy 0.90000 ± 0.01000 on 1,200 rows; log_loss 0.30000." in html
    assert "<td>fold 0</td><td>4</td><td>3</td><td>0.3333</td><td>0.3000</td>" in html
    assert "<td>mean</td><td></td><td></td><td></td><td>0.3050</td>" in html
    assert f"<td>standard deviation</td><td></td><td></td><td></td><td>{0.01 / 2**0.5:.4f}</td>" in html
    assert "<td>0</td><td>7.5000</td><td></td>" in html and "<td>1</td><td></td><td>8</td>" in html
    assert "Settings that differ from the recipe: lr." in html and "<td>lr</td><td>0.1</td><td>0.2</td>" in html
    assert "make &lt;this&gt;" in html and "<b>" not in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    lower = default_report(run, {}, (rmse().on(None, "accuracy"),), {}).write().read_text()
    assert "<td>fold 1</td><td>4</td><td>1</td><td>1.0000</td><td>0.1100</td>" in lower, "lower is better"


def test_curves_are_those_of_metrics_csv(run):
    with open(run.path / "metrics.csv", newline="") as stream:
        history = list(csv.DictReader(stream))
    figure = report.training_curves(history, ["accuracy"])
    assert [axes.get_title() for axes in figure.axes] == ["loss (dashed: validation)", "accuracy", "lr"]
    loss, score, _ = figure.axes
    assert [line.get_linestyle() for line in loss.lines] == ["-", "--", "-", "--"]
    np.testing.assert_allclose(loss.lines[1].get_xydata(), [[1, 2], [3, 2 / 3]])
    np.testing.assert_allclose(score.lines[1].get_xydata(), [[1, 0.11], [3, 0.31]])


def test_curves_of_one_epoch_can_be_read():
    line = {"fold": "None", "epoch": "1", "loss": "0.5", "valid_loss": "0.4"}
    axes = report.training_curves([line], []).axes[0]
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1], "an epoch is a whole number"
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker(), "a single point cannot be dashed"


def test_a_run_of_rules_names_both_of_its_scores():
    tuned = {"monitor": "f2", "score": 0.5, "metrics": {"f2": 0.6}, "rows": 10}
    assert score_line(tuned) == (
        "CV score: f2 0.50000 on 10 rows, with rules tuned on other rows (0.60000 with rules tuned on the same rows)."
    )
    same = {"monitor": "f2", "score": 0.6, "metrics": {"f2": 0.6}, "rows": 10, "tuned": {"cut": 0.3}}
    assert score_line(same) == "CV score: f2 0.60000 on 10 rows, with rules tuned on the same rows."
    assert "the same" not in score_line(same | {"tuned": {"cut": 0.3, "score": 0.6}})
    nan = float("nan")
    told = score_line({"monitor": "auc", "score": nan, "metrics": {"auc": nan}, "rows": 9})
    assert told == "CV score: auc nan on 9 rows.", "nothing was tuned"
    assert score_line({"score": None}) == "No CV score: no rows were held out."


class Told(Report):
    """A page that records its tables and plots."""

    def __init__(self, folder):
        super().__init__(folder, "told")
        self.tables, self.plots = [], {}

    def table(self, header, rows):
        self.tables.append([list(header), *map(list, rows)])

    def figure(self, figure, name, caption):
        figure.canvas.draw()
        self.plots[name] = figure


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_mistakes_of_classes(tmp_path):
    truth = RNG.integers(0, 3, 60)
    scores = np.full((60, 3), 0.1)
    scores[np.arange(60), truth] = 0.8
    truth[7], truth[20], truth[33] = 1, 1, -1  # the last is unknown
    scores[7], scores[20] = (0.55, 0.05, 0.4), (0.0, 0.3, 0.7)
    page = Told(tmp_path)
    images = torch.from_numpy(RNG.integers(0, 255, (60, 1, 9, 9)).astype(np.uint8))
    names = [MARKUP, "b", "c"]
    mistakes.mistakes(page, scores, truth, [f"r{row}" for row in range(60)], names, lambda rows: images[rows])
    assert titles(page.plots["worst"]) == [
        f"r7\ntrue b (0.05)\npredicted {MARKUP} (0.55)",
        "r20\ntrue b (0.3)\npredicted c (0.7)",
    ]
    np.testing.assert_array_equal(page.plots["worst"].axes[0].images[0].get_array(), images[7, 0])
    confusion = np.array(page.plots["confusion"].axes[0].images[0].get_array())
    known = truth >= 0
    b = (truth == 1).sum()
    np.testing.assert_allclose(confusion[1], [1 / b, 1 - 2 / b, 1 / b])
    rows = {row[0]: row[1:] for row in page.tables[0][1:]}
    assert rows["b"][:3] == pytest.approx([b, 1 - 2 / b, 1.0]) and rows["b"][4] == f"{MARKUP} (1)"
    assert sum(row[0] for row in rows.values()) == known.sum() and "59 of 60 rows" in "".join(page.parts)


def test_mistakes_of_one_probability_are_those_of_two_classes(tmp_path):
    truth, chance = RNG.integers(0, 2, 50), RNG.random(50)
    one, two = Told(tmp_path), Told(tmp_path)
    mistakes.mistakes(one, chance[:, None], truth.astype(float))
    mistakes.mistakes(two, np.stack([1 - chance, chance], 1), truth)
    assert one.tables == two.tables and len(one.tables) == 3


def test_mistakes_of_labels(tmp_path):
    truth = RNG.random((80, 5)) < 0.3
    scores = np.clip(0.5 * truth + 0.5 * RNG.random((80, 5)), 0, 1)
    truth[3], scores[3] = (True, False, False, False, False), (0.01, 0.1, 0.99, 0.1, 0.1)
    page = Told(tmp_path)
    mistakes.mistakes(page, scores, truth.astype(np.uint8), names="abcde")
    labels, worst = page.tables
    values = [row[2] for row in labels[1:]]
    assert values == sorted(values) and {row[0] for row in labels[1:]} == set("abcde")
    assert worst[1][:3] == ["3", "a (0.01)", "c (0.99)"]


def test_mistakes_of_numbers(tmp_path):
    truth = RNG.normal(size=(90, 2)) * [1, 1000]
    found = truth + RNG.normal(size=(90, 2)) * [0.1, 100]
    truth[5, 0], found[11, 1] = np.nan, truth[11, 1] + 9000
    page = Told(tmp_path)
    mistakes.mistakes(page, found, truth, names=["price", MARKUP])
    columns, worst = page.tables
    errors = np.delete(found - truth, 5, 0)
    assert columns[1][:3] == [
        "price",
        pytest.approx(errors[:, 0].mean()),
        pytest.approx(np.abs(errors[:, 0]).mean(), 1e-5),
    ]
    assert columns[2][3] == pytest.approx(np.sqrt((errors[:, 1] ** 2).mean()), 1e-5)
    assert worst[1][:2] == ["11", MARKUP] and worst[1][4] == pytest.approx(9000, 1e-4)
    assert list(page.plots) == ["residuals"]


class OnCard(torch.Tensor):
    """A tensor that numpy cannot read, as one on a card."""

    def __array__(self, *_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_images_that_the_training_has_left_on_the_card_are_shown():
    class Moved:
        """A dataset that makes its batches where the loader has moved it to."""

        images = torch.arange(4 * 9 * 9).reshape(4, 1, 9, 9).to(torch.uint8)

        def __len__(self):
            return 4

        def batch(self, indices, keys):
            return self.images.as_subclass(OnCard)[torch.from_numpy(indices)], torch.zeros(len(indices))

    shown = [mistakes.as_image(one) for one in mistakes.samples(Moved(), np.array([2, 0]))]
    np.testing.assert_array_equal(shown, Moved.images[[2, 0], 0])


def test_what_has_no_mistakes_to_show_leaves_the_page_alone(tmp_path):
    page = Told(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mistakes.mistakes(page, np.zeros((4, 2, 8, 8)), np.zeros((4, 2, 8, 8)))
        mistakes.mistakes(page, np.zeros((4, 3)), np.zeros((4, 2)))
        mistakes.mistakes(page, np.zeros(4), np.full(4, np.nan))
    assert not page.parts and not page.tables and not page.plots


class Dataset:
    def __len__(self):
        return 9

    def batch(self, indices, keys):
        indices = torch.as_tensor(indices)
        return {
            "numbers": torch.zeros(len(indices), 4),
            "image": indices[:, None, None, None] * torch.ones(3, 20, 30),
        }, indices


def test_images_of_any_inputs():
    for row, inputs in zip((7, 2), mistakes.samples(Dataset(), np.array([7, 2])), strict=True):
        assert mistakes.as_image(inputs).shape == (20, 30, 3) and inputs["image"].unique() == row
    grey = RNG.integers(0, 255, (1, 40, 50)).astype(np.uint8)
    np.testing.assert_array_equal(mistakes.as_image(grey), grey[0])
    np.testing.assert_array_equal(mistakes.as_image(torch.from_numpy(grey[0])), grey[0])
    colours = RNG.integers(0, 255, (40, 50, 3)).astype(np.uint8)
    np.testing.assert_array_equal(mistakes.as_image(colours), colours)
    np.testing.assert_array_equal(mistakes.as_image(colours.transpose(2, 0, 1)), colours)
    stretched = mistakes.as_image(RNG.normal(size=(3, 40, 50)))
    assert stretched.dtype == np.uint8 and stretched.min() == 0 and stretched.max() == 255
    assert mistakes.as_image(np.zeros((5, 600, 300))).shape == (200, 100)
    assert mistakes.as_image(np.zeros(5)) is None and mistakes.as_image(np.zeros((4, 3))) is None
