"""Make runs of the toy competition in the working folder, and compare them."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import torch

from common import predict
from common.config import add_prediction_flags
from common.flags import Parser
from common.fold import MACHINE_COLUMNS
from common.train import train
from tests.common import toy


def toy_train(run: str = "one", **changes) -> Path:
    train(toy.TOY, replace(toy.RECIPES["default"], **changes), "default", None, run)
    return Path("runs/toy") / run


def predict_again(*argv: str) -> None:
    parser = Parser()
    parser.add_argument("--run")
    parser.add_argument("--data")
    parser.add_argument("--fallback", action="store_true")
    parser.add_argument("--budget", type=float)
    add_prediction_flags(parser, toy.ToyConfig)
    given = parser.parse_args(argv)
    predict.predict(toy.TOY, given, given.fallback, given.budget)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted(folder.glob("fold-*/model.pt"))
        for name, value in torch.load(file, weights_only=True)["model"].items()
    }


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the columns that depend on the machine."""
    with open(folder / "metrics.csv", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in csv.DictReader(stream)]


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
        and metrics(one) == metrics(other)
        and all(results[0][name] == results[1][name] for name in ("score", "metrics", "tuned", "rows"))
        and Path(f"submissions/toy/{one.name}-demo.csv").read_bytes()
        == Path(f"submissions/toy/{other.name}-demo.csv").read_bytes()
    )
