"""The Task: what a competition gives to the core, in four values.

    Data         what is trained on, validated on and predicted
    Network      the model, its loss and its test-time augmentation  (or a function `fit_predict` instead)
    Postprocess  outputs -> predictions -> decisions, with what is tuned on out-of-fold predictions
    Submission   decisions -> rows of the CSV

The path of a batch:

    inputs -> model -> outputs -> loss                                while training
    inputs -> model -> outputs -> predict -> predictions              averaged over TTA, folds and runs
    predictions -> apply(tuned) -> decisions -> metrics, rows         scored, or written to the submission
    out-of-fold predictions -> tune -> tuned                          thresholds and the like, kept in the run

Predictions are one tensor [B, ...] or a flat dict of tensors. competitions/<name>/ has

    config.py   Config class (directly derived from common.config.Config), RECIPES {name: config}, SOURCE; imports
                nothing heavy, so that --help is instant. Recipes: "default" needs no RECIPE=; "demo", which `make
                train` uses on demo data, takes at most 90 s on these, "smoke" seconds. VERBS: optional, its own verbs
    task.py     build(config, raw, log) -> Task: reads the data (common.raw.RawData); `log` prints in one process only
    demo.py     write_demo(folder): a small generated data set in the real file formats
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from common.batch import Tree
from common.metrics import Metric
from common.predictions import Predictions
from common.run import Run
from common.submission import Sample

# A run keeps it as JSON, so arrays become lists and keys text. Its "score", the first metric on rows that the tuning
# did not see, is the run's. If `tune` gives none, the run adds one by tuning again without each fold (common.scoring).
Tuned = dict[str, Any]


def _same(tree: Tree) -> Tree:
    return tree


@dataclass(frozen=True)
class TTA:
    """One test-time augmentation: `apply` changes the inputs, `undo` maps the predictions back."""

    name: str
    apply: Callable[[Tree], Tree] = _same
    undo: Callable[[Predictions], Predictions] = _same


AS_IS = (TTA("as is"),)


@dataclass(frozen=True)
class Data:
    """The rows. Datasets follow `common.loading.loader`; image datasets have `paths`, their files in row order."""

    train: Any  # dataset of n rows, with the training augmentation
    ids: Sequence[str]  # n unique ids of the rows of `train`
    folds: np.ndarray  # [n] fold of every row; -1 trains always
    test: Any = None  # dataset of the rows to predict; its targets are ignored
    valid: Any = None  # the same n rows without augmentation; None: `train` has no augmentation
    test_ids: Sequence[str] | None = None  # ids of the rows of `test`; None: the sample submission's, in its order
    order: Callable[[np.ndarray], Any] | None = None  # training rows -> order of common.loading.orders; None shuffles
    mix: Any = None  # MixUp, CutMix or OneOf of common.loading.mixing
    # Predictions of the test rows, tensors [m, ...] -> dataset of the test rows with the training augmentation and the
    # predictions as targets. These have the form of `train`'s targets, or are probabilities [m, C] where `train` has
    # class numbers [n]. None: no --pseudo
    pseudo: Callable[[Predictions], Any] | None = None


@dataclass(frozen=True)
class Network:
    """The model and how it is trained."""

    model: Callable[[], nn.Module]  # a fresh model; its weights are seeded by the caller
    loss: Any  # see common.losses.protocol
    loss_of: Callable[[int], Any] | None = None  # epoch from 0 -> its loss, if it changes over epochs
    tta: tuple[TTA, ...] = AS_IS
    lr_scales: dict[str, float] = field(default_factory=dict)  # module name -> factor on its learning rate
    pretrain: Callable[[nn.Module], str | None] | None = None  # loads weights into a fresh model; returns a log line
    outputs: str = ""  # meaning of the outputs in their order, if the data decide it; a model fits no others


@dataclass(frozen=True)
class Postprocess:
    """From a network's outputs to decisions."""

    predict: Callable[[Tree], Predictions] = _same  # outputs -> predictions, in the space where averaging is right
    # -> decisions. Nothing is tuned, {}, in the validations of a training, with --fold none and while a blend is chosen
    apply: Callable[[Predictions, Tuned], Tree] = lambda predictions, tuned: predictions
    tune: Callable[[Predictions, np.ndarray], Tuned] = lambda predictions, rows: {}  # OOF as arrays, row numbers [m]
    kept: str | dict[str, str] = "float32"  # how predictions are kept on disk; uint8 has 255 steps of a probability


@dataclass(frozen=True)
class Submission:
    """The CSV. Anything not given is taken from the sample submission."""

    rows: Callable[[Sequence[str], Tree], Iterable[Sequence[Any]]] | None = None  # ids, decisions; None: a row each
    valid: Callable[[Sequence[str]], str | None] | None = None  # a row without its id -> what is wrong with it
    sample: str = "sample_submission.csv"  # name of the sample submission in the data
    several: bool = False  # an id may have several rows, as the instances or classes of an image; each has at least one
    text: tuple[str, ...] = ()  # columns that hold words, though the sample has nothing but numbers in them
    facts: dict[str, Any] = field(default_factory=dict)  # more entries for the JSON beside the CSV


# training rows, validation rows, fold (None: all rows train), the run as seen by this fold (its `path` and `log`)
# -> predictions of the validation rows and of the test rows
FitPredict = Callable[[np.ndarray, np.ndarray, int | None, Run], tuple[Predictions, Predictions]]


@dataclass(frozen=True)
class Task:
    """A competition, ready to be trained. There is nothing to subclass: `build` in its task.py makes one."""

    data: Data
    metrics: tuple[Metric, ...]  # the first one chooses the best epoch and is the run's score
    network: Network | None = None
    fit_predict: FitPredict | None = None  # instead of a network: fits on rows and predicts others, with any library
    uses: Collection[str] = ()  # network settings of common.config.Config that this `fit_predict` reads too
    postprocess: Postprocess = field(default_factory=Postprocess)
    submission: Submission = field(default_factory=Submission)
    check: Callable[[], None] | None = None  # raises UserError for what would fail only after the training
    report: Callable[[Any, Any], None] | None = None  # (run, page): adds the competition's own plots to the run's page
    names: tuple[str, ...] = ()  # of the classes, labels or columns of the predictions, for the page
    sample: Sample | None = None  # None: read from the file that `submission` names
    # Filled in by common.defaults.
    fingerprint: str = ""  # sha256 of the data that was read

    @property
    def outputs(self) -> str:
        """What the network's outputs stand for, where the data say so."""
        return self.network.outputs if self.network else ""


def needs_workers(task: Task) -> bool:
    """Whether workers read the training rows one by one; a dataset that makes whole batches needs none."""
    return task.network is not None and not hasattr(task.data.train, "batch")
