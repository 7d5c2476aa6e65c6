"""The competition as a whole: file formats, faults reported before the training, losses, labels and report."""

import contextlib
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common.__main__ import main
from common.batch import Batch
from common.config import checked
from common.defaults import completed
from common.engine.optimizers import build_optimizer
from common.engine.step import Engine
from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.losses import SoftFBeta, batch_value, kind
from common.preflight import check_before, refuse_bad_training_images
from common.raw import RawData
from common.vision.backbones import Classifier, probe
from competitions.protein_atlas import config, demo, plots, task

COMPETITION = type("Competition", (), {"source": config.SOURCE})
SMOKE = replace(config.RECIPES["smoke"], workers=0, size=(32, 32))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Sixty small images in the real formats."""
    folder = tmp_path_factory.mktemp("protein")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN_IMAGES", 60)
        patch.setattr(demo, "TEST_IMAGES", 6)
        demo.write_demo(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A folder of links to the files of `made`: a test may replace files without changing the originals."""
    for path in made.rglob("*"):
        if path.is_file() and "cache" not in path.parts:
            own = tmp_path / "data" / path.relative_to(made)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(path)
    return tmp_path / "data"


def built(folder: Path, **changes):
    raw = RawData(folder, "protein_atlas")
    return completed(task.build(checked(replace(SMOKE, **changes)), raw, str), raw)


def checks(folder: Path, **changes) -> None:
    check_before(built(folder, **changes), COMPETITION)


def first_id(folder: Path, table: str = "train.csv") -> str:
    return (folder / table).read_text().splitlines()[1].split(",")[0]


def rewrite(path: Path, *changes: tuple[str, str]) -> None:
    words = path.read_text()
    path.unlink()
    for old, new in changes:
        assert old in words
        words = words.replace(old, new, 1)
    path.write_text(words)


# Files.


@pytest.mark.parametrize(
    "target, expected",
    [
        ("", "Target"),
        ("28", "label 28, expected whole numbers from 0 to 27"),
        ("0 -1", "label -1, expected"),
        ("0,5", "train.csv line 2"),
        ("1.0", "label 1.0, expected"),
        ("3 3", "a label appears twice"),
    ],
)
def test_a_target_that_is_none_is_named_with_file_and_line(folder, target, expected):
    line = (folder / "train.csv").read_text().splitlines()[1]
    rewrite(folder / "train.csv", (line, f"{line.split(',')[0]},{target}"))
    with pytest.raises(UserError, match=r"train\.csv line 2") as caught:
        built(folder)
    assert expected in str(caught.value)


def test_an_id_that_is_there_twice_is_named(folder):
    lines = (folder / "train.csv").read_text().splitlines()
    rewrite(folder / "train.csv", (lines[3], lines[1]))
    with pytest.raises(UserError, match=f"train.csv line 4: Id '{lines[1][:20]}.*first in line 2"):
        built(folder)


def test_further_columns_change_nothing(folder):
    """An index that pandas wrote in front, or a column of folds at the end."""
    before, path = built(folder), folder / "train.csv"
    lines = path.read_text().splitlines()
    path.unlink()
    path.write_text("\n".join([f",{lines[0]},fold", *(f"{row},{line},1" for row, line in enumerate(lines[1:]))]))
    after = built(folder)
    assert after.data.ids == before.data.ids
    assert all((after.data.train[row][1] == before.data.train[row][1]).all() for row in range(len(before.data.ids)))


@pytest.mark.parametrize("table, part", [("train.csv", "train"), ("sample_submission.csv", "test")])
def test_a_missing_colour_is_named_with_its_line(folder, table, part):
    name = (folder / table).read_text().splitlines()[3].split(",")[0]
    (folder / part / f"{name}_yellow.png").unlink()
    with pytest.raises(UserError, match=rf"{table} line 4 names {name}_yellow, not in .*{part} \(1 of"):
        built(folder)
    rewrite(folder / table, (name, "nobody"))
    with pytest.raises(UserError, match=r"line 4 names nobody_red, nobody_green, nobody_blue and 1 more"):
        built(folder)


@pytest.mark.parametrize("cache_gb", [0.0, 20.0])
def test_a_damaged_png_is_named_with_its_row_before_the_training(folder, cache_gb):
    path = folder / "train" / f"{first_id(folder)}_green.png"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{path.name} \(row 0\) is truncated"):
        refuse_bad_training_images(built(folder, cache_gb=cache_gb))
    checks(folder, cache_gb=cache_gb, bad_images="skip")
    path = folder / "test" / f"{first_id(folder, 'sample_submission.csv')}_red.png"
    path.unlink()
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"1 of 24 test images cannot be read .*{path.name} is empty"):
        checks(folder, cache_gb=cache_gb, bad_images="skip")


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_files_of_16_bits_and_of_other_sizes_give_the_same_pixels(folder, ending):
    before = built(folder).data.valid[0][0]
    for colour in demo.COLOURS:
        path = folder / "train" / f"{first_id(folder)}_{colour}.png"
        plane = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 257
        path.unlink()
        cv2.imwrite(str(path.with_suffix(ending)), plane.repeat(4, 0).repeat(4, 1))  # 512x512
    after = built(folder).data.valid[0][0]
    assert after.dtype == torch.uint8 and after.shape == (4, 32, 32)
    assert (after.int() - before.int()).abs().max() <= 1


def test_channels_are_red_green_blue_yellow_and_kept_in_a_mapped_file(folder):
    data = built(folder, size=(128, 128)).data
    name = data.ids[7]
    planes = [cv2.imread(str(folder / "train" / f"{name}_{c}.png"), cv2.IMREAD_GRAYSCALE) for c in task.COLOURS]
    assert torch.equal(data.valid[7][0], torch.from_numpy(np.stack(planes)))
    (kept,) = [file for file in (folder / "cache").glob("images-*x128x128x4.npy") if len(np.load(file)) == 60]
    assert isinstance(data.valid.images[7].base, np.memmap) and np.load(kept, mmap_mode="r").dtype == np.uint8
    assert data.train[7][1].nonzero().flatten().tolist() == sorted(
        int(label) for label in (folder / "train.csv").read_text().splitlines()[8].split(",")[1].split()
    )


def test_only_squares_are_turned(folder):
    with pytest.raises(UserError, match="--size 32,64: expected a square"):
        built(folder, size=(32, 64))


def test_taking_turns_needs_a_second_loss(folder):
    with pytest.raises(UserError, match="--alternate true --then none: expected a second loss"):
        built(folder, alternate=True, then="none")


# The network and its losses.


def test_nasnet_large_takes_four_channels_and_weights_of_three(monkeypatch):
    """Checked on the meta device, which has shapes but no values."""
    full = config.RECIPES["full"]
    assert full.backbone == "nasnetalarge" and full.size == (512, 512) and full.batch_size == 64
    assert full.micro_batch == "auto"
    seen = []
    build = lambda: seen.append(Classifier(full.backbone, (128, 128), 28, 4)) or seen[-1]  # noqa: E731
    probe(build, (128, 128), 4, "")
    (network,) = seen
    assert network.head.in_features == 4032 and next(network.backbone.parameters()).shape == (96, 4, 3, 3)


@pytest.mark.parametrize("yellow", ["mean", "red", "green", "blue"])
def test_the_fourth_channel_starts_as_the_flag_says(yellow, made, tmp_path):
    import timm

    three = timm.create_model("resnet10t", num_classes=0).eval()
    torch.save(three.state_dict(), tmp_path / "three.pth")
    found = built(made, encoder_weights=str(tmp_path / "three.pth"), yellow=yellow).network
    network = found.model().eval()
    found.pretrain(network)
    images = torch.randint(0, 256, (2, 4, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        normal = network.normalize(images)
        normal[:, 3] = 0  # a channel that equals its mean everywhere is 0 after normalisation
        torch.testing.assert_close(network.backbone(normal), three(normal[:, :3]))
        stem, own = (next(net.parameters()) for net in (network.backbone, three))
        copied = own.mean(1) if yellow == "mean" else own[:, ["red", "green", "blue"].index(yellow)]
        assert torch.equal(stem[:, :3], own) and torch.equal(stem[:, 3], copied)


def test_losses_follow_each_other_or_take_turns(made):
    def names(**changes):
        losses = task._losses(replace(SMOKE, **{"epochs": 8, "loss": "focal", "then": "soft_f1"} | changes))
        return ["then" if isinstance(loss, SoftFBeta) else "loss" for loss in losses]

    assert names(alternate=False, then_from=0.5) == ["loss"] * 4 + ["then"] * 4
    assert names(alternate=True, then_from=0.5) == ["loss"] * 4 + ["then", "loss"] * 2
    assert names(alternate=True, then_from=0.0) == ["then", "loss"] * 4
    assert names(then="none") == ["loss"] * 8
    network = built(made, then_from=0.5, alternate=False).network
    assert [kind(network.loss_of(epoch)) for epoch in range(2)] == ["per_sample", "sums"]


@pytest.mark.parametrize("name", config.Loss.__args__)
def test_every_loss_is_exact_over_a_batch_in_micro_batches(name):
    """Batch of 64 in micro-batches of 4 against one graph in float64; the network has no BatchNorm."""
    torch.manual_seed(0)
    model = four_channels().double()
    loss = task._losses(replace(SMOKE, loss=name, then="none"))[0]
    inputs = torch.randint(0, 256, (64, 4, 16, 16)).double()
    targets = (torch.rand(64, 28) < 0.1).double()
    value = batch_value(loss, model(inputs), targets)
    expected = torch.autograd.grad(value, list(model.parameters()))
    engine = Engine(model, loss, build_optimizer(model, SMOKE, {}), micro_batch=4, log=str)
    found = engine.gradients(Batch(inputs, targets, torch.arange(64)), 0)
    assert float(found) == pytest.approx(value.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-12 * gradient.norm()


def four_channels() -> torch.nn.Module:
    layers = torch.nn.Conv2d(4, 8, 3, 2), torch.nn.SiLU(), torch.nn.Conv2d(8, 16, 3, 2), torch.nn.SiLU()
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 28))


# Labels.


def test_rare_labels_come_more_often_and_in_the_same_order_again(made):
    data = built(made).data
    rows = np.flatnonzero(data.folds != 0)
    labels = np.stack([data.valid[int(row)][1].numpy() for row in rows])
    plan = data.order(rows)(0, 3)
    assert np.array_equal(plan.index, data.order(rows)(0, 3).index) and set(plan.index) <= set(rows)
    weights = orders.by_rarity(labels)
    rarest = labels.sum(0).argsort()[::-1][(labels.sum(0) > 0).sum() - 1]
    has = labels[:, rarest] > 0
    assert weights[has].min() > weights[~has].mean()


def test_the_score_is_of_the_labels_that_the_data_have_and_tuning_raises_it(made):
    found = built(made)
    rows = np.random.default_rng(0).permutation(len(found.data.ids))
    truth = torch.stack([found.data.valid[int(row)][1] for row in rows])
    assert found.metrics[0].score(truth > 0, truth) == 1.0
    noise = np.random.default_rng(1).random(truth.shape).astype(np.float32)
    tuned = found.postprocess.tune(noise, rows)
    by = {name: found.postprocess.apply(torch.from_numpy(noise), rules) for name, rules in (("", {}), ("tuned", tuned))}
    assert found.metrics[0].score(by[""], truth) < found.metrics[0].score(by["tuned"], truth)
    assert len(tuned["thresholds"]) == 28
    json.dumps(tuned)
    matched = built(made, thresholds="matching").postprocess.tune(noise, rows)
    often = (torch.from_numpy(noise) > torch.tensor(matched["thresholds"])).float().mean(0)
    assert torch.allclose(often, truth.mean(0), atol=1e-6)


def test_every_row_gets_a_label_and_wrong_ones_are_refused(made):
    found = built(made)
    decisions = found.postprocess.apply(torch.zeros(2, 28), {})
    assert (decisions.sum(1) == 1).all()
    ids = found.data.test_ids[:2]
    decisions[0, [3, 25]] = True
    assert list(found.submission.rows(ids, decisions))[0] == (ids[0], "0 3 25")
    for cell, problem in (("", "no label"), ("28", "label 28"), ("0 x", "label x"), ("1 1", "twice"), ("0 27", None)):
        said = found.submission.valid([cell])
        assert said is None if problem is None else problem in said


def test_eight_ways_to_lay_an_image_down(made):
    found = built(made)
    with Loader(found.data.valid, orders.sequential(np.arange(2)), 2, seed=0) as loader:
        images = next(loader.epoch(0)).inputs
    ways = {one.apply(images).numpy().tobytes() for one in found.network.tta}
    turned = images
    for _ in range(4):
        assert {turned.numpy().tobytes(), turned.flip(-1).numpy().tobytes()} <= ways
        turned = turned.rot90(1, (-2, -1))
    assert len(ways) == 8


# Demo data and the whole way.


def test_demo_labels_are_as_rare_as_real_ones_and_say_where_green_is():
    rng = np.random.default_rng(0)
    rates = np.array([rate for rate, _ in demo.LABELS.values()])
    assert len(rates) >= 10 and rates.max() / rates.min() > 20 and set(demo.LABELS) <= set(range(28))
    inside = {}
    for label in demo.LABELS:
        planes = np.stack([demo.draw(rng, [label]).astype(float) for _ in range(8)]).clip(20) - 20
        green, nucleus = planes[:, 1], planes[:, 2] > 60
        inside[label] = green[nucleus].sum() / green.sum()
    assert min(inside[label] for label in (0, 2, 4)) > 0.9 and max(inside[label] for label in (14, 21, 25, 26)) < 0.1
    assert 0.2 < inside[1] < 0.9, "the nucleus' rim is on both sides of its border"


def test_demo_data_are_the_same_bytes_every_time(made, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 60)
    monkeypatch.setattr(demo, "TEST_IMAGES", 6)
    demo.write_demo(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 2 + 4 * 66
    assert all((tmp_path / file).read_bytes() == (made / file).read_bytes() for file in files)


def test_from_files_to_a_checked_csv_and_a_report(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "protein_atlas", "--recipe", "smoke", "--workers", "0", "--data", str(folder), "--run", "one"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        assert main([*words, "--epochs", "1", "--tta", "false"]) == 0, out.getvalue()
    assert "no report" not in out.getvalue()
    with open("submissions/protein_atlas/one.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["Id", "Predicted"] and len(rows) == 6
    assert all(cell and set(cell.split()) <= task.NUMBERS for _, cell in rows)
    result = json.loads(Path("runs/protein_atlas/one/result.json").read_text())
    assert result["score"] == result["tuned"]["score"]
    page = Path("runs/protein_atlas/one/report.html").read_text()
    for name in ("together", "frequency", "worst_of_labels"):
        assert Path(f"runs/protein_atlas/one/{name}.png").is_file()
    assert "Cytosol" in page and "Giving every label to every image" in page and not re.search(r'src="(?!data:)', page)


def test_colours_are_composed_for_the_eye():
    image = np.zeros((1, 2, 4), np.uint8)
    image[0, 0], image[0, 1] = (10, 200, 30, 100), (0, 0, 90, 100)
    assert plots.composed(image).tolist() == [[[50, 200, 30], [50, 50, 90]]]


def test_rates_of_the_labels_do_not_overlap_on_their_axis():
    rates = np.geomspace(0.017, 0.45, 28)
    figure = plots.against_frequency(dict.fromkeys(range(28), 0.5), rates)
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    labels = [tick.label1 for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low < tick.get_loc() < high]
    spans = sorted((box.x0, box.x1) for box in (one.get_window_extent() for one in labels if one.get_text()))
    assert len(spans) >= 3 and all(a[1] < b[0] for a, b in zip(spans, spans[1:], strict=False))
