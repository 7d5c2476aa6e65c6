"""Flags are the fields of a Config: types, nearest names, help with units, round trip through JSON."""

import argparse
import json
import re
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from common import competition
from common.config import Config, add_prediction_flags, differences, with_flags
from common.errors import UserError
from common.flags import Parser, add_flags, flag, from_values, to_json


@dataclass(frozen=True)
class Example(Config):
    size: tuple[int, int] = flag((384, 576), "height and width of the images", "pixels")
    scales: tuple[float, ...] = flag((0.5, 1.0), "scales")
    head: Literal["pixels", "both"] = flag("both", "which heads")
    hull: bool = flag(False, "fill the hull")
    width: Literal[18, 34] = flag(18, "layers")


def parse(*argv: str, config: Config = Example()) -> Config:
    parser = Parser(prog="kit", allow_abbrev=False)
    add_flags(parser, config)
    return with_flags(config, parser.parse_args(list(argv)))


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--lr", "3e-4"], "lr", 3e-4),
        (["--lr=3e-4"], "lr", 3e-4),
        (["--epochs", "3"], "epochs", 3),
        (["--size", "350,525"], "size", (350, 525)),
        (["--size", "350x525"], "size", (350, 525)),
        (["--scales", "1,2,3.5"], "scales", (1.0, 2.0, 3.5)),
        (["--head", "pixels"], "head", "pixels"),
        (["--width", "34"], "width", 34),
        (["--hull"], "hull", True),
        (["--hull", "false"], "hull", False),
        (["--micro-batch", "4"], "micro_batch", 4),
        (["--micro-batch", "auto"], "micro_batch", "auto"),
    ],
)
def test_a_flag_sets_its_field_in_its_type(argv, field, value):
    config = parse(*argv)
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)
    assert differences(config, parse()) == [] or [line.split(":")[0] for line in differences(parse(), config)] == [
        field
    ]


@pytest.mark.parametrize(
    ("field", "written", "value"),
    [
        ("fold", 0, "0"),
        ("size", [350, 525], (350, 525)),
        ("lr", "1e-3", 1e-3),
        ("hull", "false", False),
        ("lr", 1, 1.0),
    ],
)
def test_a_recipe_has_the_types_of_the_flags(field, written, value):
    """Otherwise the config would differ from the one read back from config.json, and the run could not be resumed."""
    config = parse(config=replace(Example(), **{field: written}))
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)
    assert from_values(Example, json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    ("field", "written", "words"),
    [("epochs", 2.5, "--epochs 2.5: expected int"), ("micro_batch", "full", "--micro-batch full: expected int|auto")],
)
def test_a_recipe_of_other_types_is_refused(field, written, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse(config=replace(Example(), **{field: written}))


def test_predictions_have_the_flags_that_shaped_no_weights():
    @dataclass(frozen=True)
    class Staged(Config):
        stage: int = flag(1, "what is predicted", predicts=True)
        size: int = flag(64, "side of the images")

    parser = Parser(prog="kit", allow_abbrev=False)
    add_prediction_flags(parser, Staged)
    config = with_flags(Staged(), parser.parse_args(["--stage", "2", "--batch-size", "8"]))
    assert (config.stage, config.batch_size) == (2, 8)
    for name in ("--size", "--lr"):
        with pytest.raises(UserError, match=f"unknown flag {name}"):
            parser.parse_args([name, "1"])


@pytest.mark.parametrize("name", ["clouds", "inclusive_images", "protein_atlas"])
def test_a_resumed_run_and_a_prediction_take_the_flag_that_a_full_disk_needs(name):
    """The error of a store of images that does not fit says --cache-gb 0."""
    config = competition.load(name).recipes["default"]
    parser = Parser(prog="kit", allow_abbrev=False)
    add_prediction_flags(parser, type(config))
    other = with_flags(config, parser.parse_args(["--cache-gb", "0"]))
    assert other.cache_gb == 0 and not differences(config, other)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lrr", "1"], ["--lrr", "Did you mean --lr?"]),
        (["--epoch", "1"], ["--epoch", "Did you mean --epochs?"]),
        (["--lr", "fast"], ["--lr fast", "float"]),
        (["--lr", "-1"], ["--lr -1", "above 0"]),
        (["--momentum", "1"], ["--momentum 1", "at least 0 and below 1"]),
        (["--swa", "0.2"], ["--swa 0.2", "--keep last"]),
        (["--compile", "--checkpointing"], ["--compile true", "--checkpointing false"]),
        (["--swa", "0.2", "--keep", "last", "--ema", "0.9"], ["--swa 0.2", "--ema 0"]),
        (["--epochs", "1.5"], ["--epochs 1.5", "int"]),
        (["--head", "pixel"], ["--head pixel", "pixels"]),
        (["--size", "350"], ["--size 350", "expected 2 values"]),
        (["--hull", "maybe"], ["--hull maybe", "true|false"]),
        (["--width", "35"], ["--width 35", "18|34"]),
        (["--fold", "5"], ["--fold 5", "0 to 4"]),
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--micro-batch", "0"], ["--micro-batch 0", "auto or at least 1"]),
        (["--ema", "1"], ["--ema 1"]),
        (["3"], ["unknown flag 3"]),
    ],
)
def test_a_wrong_flag_names_the_value_and_what_is_expected(argv, words):
    with pytest.raises(UserError) as raised:
        parse(*argv)
    assert all(word in str(raised.value) for word in words), raised.value


def test_help_shows_every_field_with_its_default_and_unit():
    parser = Parser(prog="kit", formatter_class=lambda prog: argparse.HelpFormatter(prog, width=500))
    add_flags(parser, Example(lr=0.5))
    lines = [line.strip() for line in parser.format_help().splitlines()]
    assert any(
        line.startswith("--size") and line.endswith("height and width of the images [384,576 pixels]") for line in lines
    )
    assert any(line.startswith("--lr") and "[0.5 per optimizer step]" in line for line in lines)


def test_json_round_trip_keeps_every_value_and_type():
    config = parse("--size", "10,20", "--lr", "1e-5", "--micro-batch", "3")
    again = from_values(Example, json.loads(to_json(config)))
    assert again == config and type(again.size) is tuple


def test_a_number_of_folds_that_no_data_fill_is_refused_at_once():
    """Where a competition brings its own folds, a list of a billion of them ended in a MemoryError."""
    with pytest.raises(UserError, match="--folds 1000000000: expected 2 to 1000000"):
        parse("--folds", "1000000000")


def test_values_that_a_hand_wrote_into_a_runs_config_have_the_types_of_the_flags():
    """They made `make blend` compare a text with a number, which ended in a traceback."""
    kept = json.loads(to_json(Example()))
    config = from_values(Example, kept | {"batch_size": "16", "lr": "3e-4", "fold": 0, "tta": "false"})
    assert (config.batch_size, config.lr, config.fold, config.tta) == (16, 3e-4, "0", False)
    with pytest.raises(UserError, match="config.json of the run: --batch-size many: expected int"):
        from_values(Example, kept | {"batch_size": "many"})
    with pytest.raises(UserError, match="config.json of the run: --lr null: expected float"):
        from_values(Example, kept | {"lr": None})


def test_a_flag_newer_than_the_run_has_its_default_and_one_that_is_gone_is_refused():
    old = Config(lr=0.5)
    assert from_values(Example, json.loads(to_json(old))) == Example(**vars(old))
    with pytest.raises(UserError, match="no longer has .head, hull, scales, size, width.: train it again"):
        from_values(Config, json.loads(to_json(parse("--size", "10,20"))))


def test_fields_of_the_machine_do_not_count_as_differences():
    assert differences(Config(), Config(workers=7, micro_batch=3)) == []
    assert differences(Config(), Config(lr=0.5, seed=3)) == ["seed: 0 -> 3", "lr: 0.001 -> 0.5"]
