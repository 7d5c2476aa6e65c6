"""The competition as a whole: from raw files to a checked CSV, and flags that are refused."""

import csv
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common.__main__ import main
from common.config import checked
from common.defaults import completed
from common.engine.optimizers import parameter_groups
from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.losses import BCE, BCEDice, Dice, LovaszHinge, batch_value, kind
from common.predictions import read_predictions
from common.raw import RawData
from common.vision import rle
from competitions.clouds import demo, reader, task
from competitions.clouds.config import RECIPES
from competitions.clouds.loss import pack
from competitions.clouds.reader import CLASSES

from .conftest import NAMES, TEST_NAMES, train_rows, truth_of, write_rows

ROOT = Path(__file__).parents[3]
TINY = replace(
    RECIPES["default"], epochs=2, folds=3, size=(64, 96), encoder="resnet18", encoder_weights="none", workers=0
)
SHORT = ["--epochs", "2", "--folds", "3", "--size", "64,96", "--encoder", "resnet18", "--workers", "0"]
FLAGS = [*SHORT, "--encoder-weights", "none", "--batch-size", "2"]


def build(folder, **changes):
    raw = RawData(folder, "clouds")
    return completed(task.build(checked(replace(TINY, **changes)), raw, print), raw)


def run(*words: str) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        code = main(list(words))
    return code, out.getvalue()


@pytest.fixture
def here(tmp_path_factory, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def test_data_and_their_cache_may_be_read_only(folder, here):
    """Folders that cannot be made stand for those of a read-only disk. With --cache-gb 0 nothing needs them."""
    (folder / "cache").touch()
    Path("data").touch()
    with pytest.raises(UserError, match=r"neither .*/cache nor data/cache can be written: .*--cache-gb 0"):
        build(folder)
    assert build(folder, cache_gb=0.0).data.train[0][0].shape == (3, 64, 96)


def test_from_files_to_a_checked_csv_and_pictures(folder, page, here, tmp_path):
    order = ["Sugar", "Gravel", "Fish", "Flower"]
    write_rows(folder, "sample_submission.csv", [f"{name}_{label},1 1" for name in TEST_NAMES for label in order])
    table = folder / "sample_submission.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # as a spreadsheet saves it
    code, output = run("train", "clouds", "--data", str(folder), "--run", "one", *FLAGS)
    assert code == 0, output
    with open("submissions/clouds/one.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["Image_Label", "EncodedPixels"]
    assert [row[0] for row in rows] == [f"{name}_{label}" for name in TEST_NAMES for label in order]
    assert all(rle.problem_of_text(row[1], 350 * 525) is None for row in rows)
    result = json.load(open("runs/clouds/one/result.json"))
    assert set(result["tuned"]["rules"]) == set(CLASSES) and 0 <= result["score"] <= 1
    per_class = [result["metrics"][f"dice_{name.lower()}"] for name in CLASSES]
    assert result["metrics"]["dice"] == pytest.approx(np.mean(per_class))
    assert result["score"] == result["tuned"]["score"]
    html = open("runs/clouds/one/report.html").read()
    assert html.count("data:image/png;base64") >= 4 and not re.search(r'src="(?!data:)', html)
    kept = read_predictions(Path("runs/clouds/one"), "oof")
    assert kept["presence"].dtype == np.uint8 and kept["presence"].shape == (2, 4, 2)
    assert kept["pixels"].dtype == np.uint8 and kept["pixels"].shape == (2, 4, 350, 525)

    first = open("submissions/clouds/one.csv").read()
    code, output = run("predict", "clouds", "--run", "one")
    assert code == 0, output
    assert open("submissions/clouds/one.csv").read() == first


def test_an_unreadable_test_image_is_named_before_the_training(folder, here):
    """Its rows belong to the submission, so it cannot be left out like a training image."""
    path = folder / "test_images" / TEST_NAMES[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    command = ["train", "clouds", "--data", str(folder), "--run", "one", *FLAGS, "--bad-images", "skip"]
    code, output = run(*command)
    message = output.strip().splitlines()[-1]
    assert code == 1 and TEST_NAMES[0] in message and "is truncated" in message and "replace the files" in message
    assert "skip" not in message and not list(Path("submissions").rglob("*.csv")) and not Path("runs").exists()
    path.write_bytes(whole)
    assert run(*command)[0] == 0 and Path("submissions/clouds/one.csv").is_file()
    path.write_bytes(whole[:-100])
    code, output = run("predict", "clouds", "--run", "one")
    assert code == 1 and TEST_NAMES[0] in output.strip().splitlines()[-1]


def test_a_class_that_is_missing_from_folds_is_trained_and_scored_all_the_same(folder, here):
    """Sugar is on one image only: one fold cannot train on it, the other folds cannot validate it."""
    rows = [row if "_Sugar" not in row or row.startswith(NAMES[1]) else row.split(",")[0] + "," for row in train_rows()]
    assert sum(not row.endswith(",") for row in rows if "_Sugar" in row) == 1
    write_rows(folder, "train.csv", rows)
    code, output = run("train", "clouds", "--data", str(folder), "--run", "one", "--fold", "all", *FLAGS)
    assert code == 0, output
    result = json.load(open("runs/clouds/one/result.json"))
    assert result["rows"] == len(NAMES) and all(np.isfinite(score) for score in result["metrics"].values())
    assert len(open("submissions/clouds/one.csv").read().splitlines()) == 1 + 4 * len(TEST_NAMES)


def test_the_generated_sample_needs_no_network(here, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 4)
    monkeypatch.setattr(demo, "TEST_IMAGES", 1)
    code, output = run("train", "clouds", "--recipe", "default", *SHORT)
    assert code == 0, output
    assert "demo: the encoder starts from scratch (--encoder-weights none)" in output
    assert "-demo.csv" in output


def test_the_sample_is_the_same_every_time_and_has_the_competitions_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 3)
    monkeypatch.setattr(demo, "TEST_IMAGES", 1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        demo.write_demo(tmp_path / name)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 6
    files = reader.read(RawData(tmp_path / "one", "clouds"))
    assert files.runs.present().any(1).all() and 0.05 < files.runs.masks(0, (35, 50)).mean() < 0.5
    image = cv2.imread(str(files.train_paths[0]))
    assert image.shape == (1400, 2100, 3) and image.std() > 10


def test_weights_of_imagenet_are_asked_for_on_real_data(folder, here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "no cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, output = run("train", "clouds", "--data", str(folder), *SHORT)
    assert code == 1 and "--encoder-weights none" in output.splitlines()[-1] and "Traceback" not in output


def test_folds_hold_every_class_and_do_not_depend_on_the_order_of_the_rows(folder):
    built = build(folder)
    assert sorted(np.bincount(built.data.folds, minlength=3)) == [2, 2, 2]
    rows = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    assert (build(folder).data.folds == built.data.folds).all()


def test_blackout_is_that_of_the_flag(folder):
    changed = {}
    for part in (0.0, 1.0):
        built = build(folder, augment="none", blackout=part)
        changed[part] = [
            not torch.equal(built.data.train[row][0], built.data.valid[row][0]) for row in range(len(NAMES))
        ]
    assert not any(changed[0.0]) and all(changed[1.0])


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_encoder_learns_at_its_own_rate(folder, rate):
    built = build(folder, lr=1e-3, encoder_lr=rate)
    network = built.network.model()
    rate_of = {
        id(weights): group["lr"]
        for group in parameter_groups(network, 1e-3, 0.0, built.network.lr_scales)
        for weights in group["params"]
    }
    encoder = {id(weights) for weights in network.net.encoder.parameters()}
    assert [rate_of[weights] for weights in encoder] == pytest.approx([1e-3 * rate] * len(encoder))
    assert {rate_of[weights] for weights in rate_of.keys() - encoder} == {1e-3}


def test_validation_and_submission_use_one_metric(folder):
    built = build(folder)
    targets = {"masks": torch.stack([built.data.valid[row][1]["masks"] for row in range(len(NAMES))])}
    empty = torch.zeros_like(targets["masks"])
    values = [metric.score(empty, targets) for metric in built.metrics]
    absent = np.array([[not truth_of(n, c).any() for c in range(4)] for n in range(len(NAMES))])
    assert values[0] == pytest.approx(absent.mean())  # empty masks score 1 exactly where the class is absent
    assert values[1:] == pytest.approx(absent.mean(0).tolist())
    assert [metric.name for metric in built.metrics] == ["dice", *(f"dice_{name.lower()}" for name in CLASSES)]


SHAPES = {"pixels": (16, 24), "classes": ()}


@pytest.mark.parametrize(("weights", "expected"), [
    ({"bce": 1, "dice": 0, "lovasz": 0, "present": 0, "classes": 0.5}, "per_sample"),
    ({"bce": 1, "dice": 1, "lovasz": 0, "present": 0, "classes": 0.5}, "sums"),
    ({"bce": 0, "dice": 0, "lovasz": 1, "present": 1, "classes": 0}, "whole_batch"),
])  # fmt: skip
def test_the_loss_is_made_of_the_flags(folder, weights, expected):
    loss = build(folder, class_head="topk", **weights).network.loss
    outputs = {name: torch.randn(3, 4, *size, requires_grad=True) for name, size in SHAPES.items()}
    masks = (torch.rand(3, 4, 16, 24) > 0.6).to(torch.uint8)
    masks[0, 2] = 0
    packed = torch.stack([torch.from_numpy(pack(image.permute(1, 2, 0).numpy())) for image in masks])
    targets = {"pixels": masks, "classes": masks.flatten(2).any(2).to(torch.uint8)}
    assert kind(loss) == expected
    value = batch_value(loss, outputs, packed)
    parts = {
        "bce": (BCE(), "pixels"),
        "dice": (Dice(average="batch"), "pixels"),
        "lovasz": (LovaszHinge(), "pixels"),
        "present": (BCEDice(0.75, 0.25, present_only=True), "pixels"),
        "classes": (BCE(), "classes"),
    }
    slow = sum(weights[name] * batch_value(part, outputs[head], targets[head]) for name, (part, head) in parts.items())
    assert value.item() == pytest.approx(slow.item(), rel=1e-6)
    value.backward()
    assert outputs["pixels"].grad.abs().sum() > 0
    assert (outputs["classes"].grad is not None) == bool(weights["classes"])


def test_cutmix_pastes_images_with_their_masks_and_counts_presence_afterwards(folder):
    assert build(folder).data.mix is None
    built = build(folder, cutmix=1.0, augment="none", blackout=0.0)
    size = len(NAMES) - len(NAMES) % 2
    rows = orders.sequential(np.arange(size))
    plain = next(iter(Loader(built.data.train, rows, size, seed=0, workers=0).epoch(0)))
    mixed = next(iter(Loader(built.data.train, rows, size, seed=0, workers=0, mix=built.data.mix).epoch(0)))
    partner = torch.arange(size) ^ 1
    for found, own, other in (
        (mixed.inputs, plain.inputs, plain.inputs[partner]),
        (mixed.targets, plain.targets, plain.targets[partner]),
    ):
        assert ((found == own) | (found == other)).all() and (found != own).any()
    masks = torch.stack([(mixed.targets >> label) & 1 for label in range(4)], dim=1)
    outputs = {"pixels": torch.zeros(size, 4, *TINY.size), "classes": torch.randn(size, 4)}
    only_classes = build(folder, bce=1e-9, dice=0.0, classes=1.0).network.loss
    expected = batch_value(BCE(), outputs["classes"], masks.flatten(2).amax(2))
    assert float(batch_value(only_classes, outputs, mixed.targets)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("changes", "words"), [
    ({"bce": 0, "dice": 0}, "--bce, --dice, --lovasz or --present"),
    ({"classes": 0.0}, "--classes 0 leaves the class head untrained: give it a weight, or --class-head topk"),
    ({"dice": -1.0}, "--dice -1.0: expected at least 0"),
    ({"blackout": 1.5}, "--blackout 1.5: expected 0 to 1"),
    ({"size": (32, 96)}, "--size 32,96"),
    ({"architecture": "unett"}, "did you mean unet?"),
])  # fmt: skip
def test_flags_that_make_no_sense(folder, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        build(folder, **changes)


def test_recipes_are_what_they_are_called():
    assert RECIPES["full"].size == (1400, 2100) and RECIPES["full"].checkpointing
    assert RECIPES["full"].batch_size == 16 and RECIPES["small"].encoder_weights == "none"
    assert RECIPES["best"].fold == "all" and RECIPES["best"].tta
    assert {recipe.encoder_weights for name, recipe in RECIPES.items() if name not in ("small", "demo", "smoke")} == {
        "imagenet"
    }
