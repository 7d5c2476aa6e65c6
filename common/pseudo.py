"""Pseudo-labels: test rows join the training rows of a fold, with the predictions of earlier runs as soft targets.

A model that labels test rows for a fold must not have seen that fold's validation rows: their targets would leak into
the fold's score. So every fold gets its own labels, from the one model of each earlier run that held out the same fold
of the same split. A run that used pseudo-labels itself may label too, as its labels for a fold were made in this way.
Thresholds that were tuned on all out-of-fold predictions have seen every fold, so labels do not use them. With --fold
none nothing is held out, and all models of the earlier runs label together.

The labels are kept in the fold's folder until the fold is trained. So a resumed run ends with the same bits, even if
the earlier runs are gone; it is not resumed if one of them was started anew under its name. Rows 0..n-1 of the joined
dataset are the training rows, with the same random keys as without test rows; the test rows follow. Batches mix both:
MixUp or CutMix may pair one of each, and blend their weights like their targets.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import checkpoint
from common import run as runs
from common.batch import Tree, concatenated, map_tree
from common.competition import Competition
from common.config import Config, folds_to_train
from common.defaults import completed
from common.engine.ranks import Ranks
from common.errors import UserError
from common.fold import PSEUDO_LABELS, fold_label
from common.inference import predictor_of
from common.loading import orders
from common.loading.collate import as_tensors, collate, join
from common.loading.keys import Keys
from common.loading.loader import in_order
from common.loading.transfer import to_device
from common.predict import Member, keeps_test_rows, no_other_data
from common.predictions import Predictions, count_of, leaves, mean_of, read_predictions, unpack
from common.raw import RawData
from common.run import Run
from common.task import Data, Task

SUM_TO_1 = 1e-3  # tolerance for the sum of the probabilities of exclusive classes


def origins(competition: str, config: Config) -> dict[str, str]:
    """Start time of every earlier run that still exists, by name; a name may be used again, see `common.run`."""
    named = config.pseudo.split(",")
    return {run.name: run.provenance["created"] for run in runs.all_runs(competition) if run.name in named}


@dataclass(frozen=True)
class Pseudo:
    """The pseudo-labels of a training: by the earlier runs that --pseudo names, for the test rows of `task`."""

    competition: Competition
    found: RawData
    task: Task
    config: Config
    provenance: dict[str, Any]
    _made: dict[int | None, Predictions] = field(default_factory=dict)  # labels of a fold that was checked

    def check(self) -> list[Run]:
        """The earlier runs; raises UserError when one cannot label every fold of this training without leaks."""
        told, name = f"--pseudo {self.config.pseudo}", self.competition.name
        if self.task.network is None:
            raise UserError(f"{told}: this task has no network to train on soft targets: leave it out")
        if self.task.data.pseudo is None:
            raise UserError(
                f"{told}: {name} cannot turn test rows into training rows: leave it out, or give build()'s Data a "
                f"`pseudo`, a function from predictions of the test rows to a dataset with them as targets"
            )
        found = runs.finished(name, self.config.pseudo)
        for run in found:
            self._check_run(run, told)
        return found

    def check_rows(self) -> None:
        """Raises UserError when --pseudo-min leaves no row for the first fold, before there is a run."""
        if self.config.pseudo_min:
            fold = folds_to_train(self.config)[0]
            self._made[fold] = self._mean(fold)
            choose(self._made[fold], self.config.pseudo_min)

    def _check_run(self, run: Run, told: str) -> None:
        if run.is_blend:
            raise UserError(f"{told}: {run.name} is a blend, which has no models: name the runs that it is made of")
        theirs = run.config(type(self.config))
        if run.provenance["folds_fingerprint"] != self.provenance["folds_fingerprint"]:
            raise UserError(
                f"{told}: {run.name} has other folds (--folds {theirs.folds} --seed {theirs.seed} on "
                f"{run.provenance['data']}), so its models saw rows that this run validates on: expected those of "
                f"--folds {self.config.folds} --seed {self.config.seed} on {self.provenance['data']}. Train it with "
                f"these, or this run with those"
            )
        missing = [fold for fold in folds_to_train(self.config) if fold not in (None, *folds_to_train(theirs))]
        if missing:
            raise UserError(
                f"{told}: {run.name} was trained with --fold {theirs.fold} and has no model that never saw the "
                f"validation rows of fold {', '.join(map(str, missing))}: train it with --fold all"
                + (f", or this run with --fold {theirs.fold}" if theirs.fold.isdecimal() else "")
            )

    @cached_property
    def members(self) -> list[Member]:
        """The earlier runs, each with its own task on this run's data."""
        members = []
        for run in self.check():
            machine = {name: getattr(self.config, name) for name in ("device", "workers", "threads")}
            config = replace(run.config(type(self.config)), bad_images="raise", **machine)
            task = completed(self.competition.build(config, self.found, print), self.found)
            run.check_outputs(self.task.outputs)
            if list(task.data.test_ids) != list(self.task.data.test_ids):
                raise UserError(
                    f"--pseudo {run.name} predicts {len(task.data.test_ids)} test rows that are not the "
                    f"{len(self.task.data.test_ids)} of this run: name runs with the same test rows"
                )
            same = task.fingerprint == run.provenance["data_fingerprint"]
            if task.network is None and not (same and keeps_test_rows(run, task)):
                raise no_other_data(run)  # its labels are kept predictions, matched row by row
            members.append(Member(run, task, config))
        return members

    def join(self, run: Run, fold: int | None, ranks: Ranks) -> Task:
        """The task of `run` for one fold, with the chosen test rows among its training rows.

        Raises UserError when none is chosen, or when predictions do not have the form of targets.
        """
        labels = ranks.broadcast(self._labels(run, fold) if ranks.is_writer else None)
        data, config = self.task.data, self.config
        rows = choose(labels, config.pseudo_min)
        test = data.pseudo(labels)
        if len(test) != len(data.test):
            raise UserError(f"Data.pseudo gives {len(test)} rows for {len(data.test)} test rows: expected as many")
        run.log(
            f"{fold_label(fold)}: {len(rows)} of {len(test)} test rows join its training, with the predictions of "
            f"{config.pseudo} and weight {config.pseudo_weight:g}"
        )
        return replace(self.task, data=with_rows(data, test, rows, config))

    def _labels(self, run: Run, fold: int | None) -> Predictions:
        """Predictions of all test rows, tensors [m, ...]: read from the fold's folder, or made now and kept there."""
        file = run.fold_folder(fold) / PSEUDO_LABELS
        if not file.is_file():
            labels = self._made.pop(fold) if fold in self._made else self._mean(fold)
            for member in self.members:
                if fold is not None and member.task.network and member.config.keep == "best":
                    run.log(
                        f"{member.run.name} kept the epoch with the best score on {fold_label(fold)}, so its labels "
                        f"leak a little of it (with --keep last nothing)"
                    )
            file.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(file, {"labels": labels})
        return checkpoint.load(file, "labels")["labels"]

    def _mean(self, fold: int | None) -> Predictions:
        """The mean over the earlier runs of their predictions of all test rows, tensors [m, ...]."""
        made = [self._predicted(member, fold) for member in self.members]
        forms = [{name: list(values.shape) for name, values in leaves(one).items()} for one in made]
        if any(form != forms[0] for form in forms):
            raise UserError(f"--pseudo {self.config.pseudo}: the runs predict {forms}: expected equal shapes")
        return mean_of(made)

    def _predicted(self, member: Member, fold: int | None) -> Predictions:
        """Predictions of all test rows, tensors [m, ...], by the models of an earlier run that never saw the fold."""
        run, task, config = member
        config = config if fold is None else replace(config, fold=str(fold))
        if task.network is None:
            return unpack(read_predictions(run.path if fold is None else run.fold_folder(fold), "test"))
        label = f"{run.name} labels the test rows for {fold_label(fold)}"
        batches = predictor_of(run, task, config).batches(task.data.test, np.arange(len(task.data.test)), label)
        return concatenated([map_tree(Tensor.cpu, predictions) for _, predictions, *_ in batches])


def choose(labels: Predictions, least: float) -> np.ndarray:
    """The test rows whose `confidence` is at least `least`; raises UserError when there is none."""
    if not least:
        return np.arange(count_of(labels))
    sure = confidence(labels)
    rows = np.flatnonzero(sure.numpy() >= least)
    if not len(rows):
        raise UserError(
            f"--pseudo-min {least}: no test row is that confident, the highest is {float(sure.max()):.4g}: lower it"
        )
    return rows


def confidence(labels: Predictions) -> Tensor:
    """The confidence [m] of probabilities [m, ...]: the expected fraction of a row's decisions that are right.

    It is the largest probability of exclusive classes (rows that sum to 1), else the mean of max(p, 1 - p). Raises
    UserError for values that are no probabilities.
    """
    if isinstance(labels, dict) or labels.min() < 0 or labels.max() > 1:
        found = f"several parts ({', '.join(labels)})" if isinstance(labels, dict) else "not all from 0 to 1"
        raise UserError(f"--pseudo-min needs probabilities, and the predictions are {found}: leave it out")
    if labels.ndim == 2 and labels.shape[1] > 1 and bool(((labels.sum(1) - 1).abs() < SUM_TO_1).all()):
        return labels.amax(1)
    return torch.maximum(labels, 1 - labels).reshape(len(labels), -1).mean(1)


def with_rows(data: Data, test: Any, rows: np.ndarray, config: Config) -> Data:
    """`data` with the `rows` of the dataset `test` after its training rows; they are trained on in every fold."""
    like = next(in_order(test, rows[:1], 1, config.seed)).targets
    kind = JoinedBatches if hasattr(data.train, "batch") else JoinedSamples
    n, base = len(data.train), data.order or orders.shuffled
    return replace(
        data,
        train=kind(data.train, test, rows, config.pseudo_weight, like),
        ids=[*data.ids, *(f"test {data.test_ids[row]}" for row in rows)],
        folds=np.concatenate([data.folds, np.full(len(rows), -1)]),
        order=lambda own: orders.joined(base(own[own < n]), own[own >= n]),
    )


class _Joined:
    """The rows of a dataset, then the chosen `rows` of another one; all targets have the form of `like` [1, ...].

    It has `weights` [n], one per row, only if one of them is not 1.
    """

    def __init__(self, train: Any, test: Any, rows: np.ndarray, weight: float, like: Tree):
        self.train, self.test, self.rows, self.like = train, test, rows, like
        own = getattr(train, "weights", None)
        if own is not None or weight != 1:
            own = np.ones(len(train)) if own is None else np.asarray(own)
            self.weights = np.concatenate([own, np.full(len(rows), weight)]).astype(np.float32)

    def __len__(self) -> int:
        return len(self.train) + len(self.rows)


class JoinedSamples(_Joined):
    """Joins datasets that make one sample at a time."""

    def sample(self, index: int, rng: np.random.Generator) -> tuple[Tree, Tree]:
        after = index - len(self.train)
        part, row = (self.train, index) if after < 0 else (self.test, int(self.rows[after]))
        inputs, targets = part.sample(row, rng) if hasattr(part, "sample") else part[row]
        return inputs, map_tree(lambda x: x[0], as_soft(collate([targets]), self.like))


class JoinedBatches(_Joined):
    """Joins datasets that make whole batches."""

    def to(self, device: torch.device | str) -> "JoinedBatches":
        for part in (self.train, self.test):
            if hasattr(part, "to"):
                part.to(device)
        return self

    def batch(self, indices: np.ndarray, keys: Keys) -> tuple[Tree, Tree]:
        after, made, places = indices - len(self.train), [], []
        for is_test in (False, True):
            place = np.flatnonzero((after >= 0) == is_test)
            if not len(place):
                continue
            own = Keys(keys.seed, keys.epoch, keys.index[place], keys.draw[place])
            part, rows = (self.test, self.rows[after[place]]) if is_test else (self.train, indices[place])
            inputs, targets = as_tensors(part.batch(rows, own))
            made.append((inputs, as_soft(targets, self.like)))
            places.append(place)
        back = np.argsort(np.concatenate(places))
        return map_tree(lambda x: x[to_device(back, x.device)], join(made)) if len(made) > 1 else made[0]


def as_soft(targets: Tree, like: Tree) -> Tree:
    """Targets [B, ...] in the form of soft targets `like`: class numbers become one-hot, 0 and 1 become 0.0 and 1.0.

    Raises UserError when they have other keys or shapes.
    """
    if isinstance(like, dict) and isinstance(targets, dict) and like.keys() == targets.keys():
        return {name: as_soft(targets[name], part) for name, part in like.items()}
    if isinstance(like, (tuple, list)) and isinstance(targets, (tuple, list)) and len(like) == len(targets):
        return tuple(as_soft(*pair) for pair in zip(targets, like, strict=True))
    if isinstance(like, Tensor) and isinstance(targets, Tensor):
        if not targets.is_floating_point() and targets.ndim == like.ndim - 1:  # class numbers
            targets = F.one_hot(targets.long(), like.shape[1]).movedim(-1, 1)
        if targets.shape[1:] == like.shape[1:]:
            return targets.to(like.dtype)
    raise UserError(
        f"the targets of the training rows are {_form(targets)}, those of Data.pseudo {_form(like)}: expected the same "
        f"shape, or class numbers beside the probabilities of classes"
    )


def _form(tree: Tree) -> Tree:
    return map_tree(lambda x: f"{x.dtype} {list(x.shape[1:])}".removeprefix("torch."), tree)
