"""The Task: everything the core needs to know of a competition, as one frozen bundle of values and functions.

The way of a batch through its slots:

    inputs -> model -> outputs -> loss                                  while training
    inputs -> model -> outputs -> predict -> predictions                averaged over views, folds and runs
    predictions -> decide(learnt) -> decisions -> metrics, rows         scored, or written to the submission
    out-of-fold predictions -> learn -> learnt                          thresholds and the like, kept in the run

competitions/<name>/task.py gives the core five names; it imports nothing heavy, so that --help stays instant:

    Config                      its settings, one level below common.config.Config
    RECIPES: dict[str, Config]  named settings; "default" needs no RECIPE=, "smoke" takes seconds on the demo data
    SOURCE                      where the data comes from (common.kaggle.source)
    write_demo(folder)        generates a small data set in the real file formats
    build(config, raw) -> Task  reads the data (common.raw.RawData) and fills in the slots below
    VERBS                       optional: further verbs, or its own way of a verb: {"backtest": backtest}, where
                                backtest(competition, argv) parses its flags with common.cli and has a line of help
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from common.batch import Tree

# Plain types only: it is written to the run as JSON. "score", when it is there, is the first metric as measured on rows
# that the learning did not see; the run reports it instead of the score on the rows that were learnt from.
Learnt = dict[str, Any]


def _same(tree: Tree) -> Tree:
    return tree


def _nothing(predictions: np.ndarray, rows: np.ndarray) -> Learnt:
    return {}


@dataclass(frozen=True)
class View:
    """A test-time view: `apply` changes the inputs, `undo` maps the predictions back (a flip is its own inverse)."""

    name: str
    apply: Callable[[Tree], Tree] = _same
    undo: Callable[[Tensor], Tensor] = _same


@dataclass(frozen=True)
class Metric:
    """A score over a whole set, from sums over its samples: one code for validation, out-of-fold and local scoring.

    `stats(decisions, targets) -> [B, ...]` are each sample's additive statistics, `value(sums, count)` is the score,
    where sums (float64) has the shape of `stats` without B and count is the number of samples.
    """

    name: str
    stats: Callable[[Tree, Tree], Tensor]
    value: Callable[[Tensor, float], float] = lambda sums, count: float(sums) / count
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """A competition, ready to be trained. Nothing to subclass: `build(config, raw)` of its folder fills in the slots.

    Datasets follow `common.loading.loader`; `labelled` is augmented, `plain` holds the same rows as they are.
    """

    labelled: Any  # dataset of n rows, with the training augmentation
    plain: Any  # the same n rows without augmentation, for validation
    test: Any  # dataset of the rows to predict; its targets are ignored
    ids: Sequence[str]  # n ids, the rows of `labelled`
    test_ids: Sequence[str]  # ids of the rows of `test`, in the order of the sample submission
    folds: np.ndarray  # [n] fold of every labelled row; -1 trains always
    model: Callable[[], nn.Module]  # a fresh model; weights are seeded by the caller
    loss: Any  # see common.losses.protocol
    metrics: tuple[Metric, ...]  # the first one chooses the best epoch and is the run's score
    predict: Callable[[Tree], Tensor]  # outputs -> predictions [B, ...], in the space where averaging is right
    decide: Callable[[Tensor, Learnt], Tree]  # predictions -> decisions
    columns: tuple[str, ...]  # header of the submission, the id first
    rows: Callable[[Sequence[str], Tree], Iterable[Sequence[Any]]]  # ids, decisions -> rows of the CSV
    sample_submission: Callable[[], Iterable[str]]  # opens the competition's sample file: its lines
    valid: Callable[[Sequence[str]], str | None]  # a CSV row without its id -> what is wrong with it, or None
    learn: Callable[[np.ndarray, np.ndarray], Learnt] = _nothing  # out-of-fold [m, ...], row numbers [m] -> learnt
    preflight: Callable[[], None] | None = None  # raises UserError for what would fail only after the training
    pretrain: Callable[[nn.Module], None] | None = None  # fetches a fresh model's weights, for training only
    views: tuple[View, ...] = (View("as is"),)
    order: Callable[[np.ndarray], Any] | None = None  # training rows -> order of common.loading.orders; None shuffles
    mix: Any = None  # MixUp or CutMix of common.loading.mixing
    lr_scales: dict[str, float] = field(default_factory=dict)  # module name -> factor on its learning rate
    fingerprint: str = ""  # sha256 of the data that was read
    outputs: str = ""  # what the outputs stand for, in their order, where the data say so; models fit no other
    paths: Sequence[Path] = ()  # every image file, for `make check`
    prediction_type: str = "float32"  # of the kept out-of-fold predictions; uint8 for probabilities in 255 steps
    report: Callable[[Any], None] | None = None  # draws the run's plots once it is finished
