"""The submission of one run, or of the average of several."""

import argparse
import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common import raw, submission
from common import run as runs
from common.batch import map_tree
from common.competition import Competition
from common.config import Config, differences, with_flags
from common.defaults import completed
from common.device import use_threads
from common.errors import UserError, some
from common.inference import Predictor, decisions_of, predictor_of
from common.loading.collate import collate
from common.predictions import (
    Predictions,
    PredictionWriter,
    mean_of,
    part_of,
    read_ids,
    read_predictions,
    remove_predictions,
    unpack,
    write_ids,
)
from common.preflight import check_before, refuse_unused
from common.run import Run
from common.task import Task, Tuned, needs_workers

NAMED = 20  # most rows that are printed
Batches = Iterator[tuple[list[int], Predictions]]  # test rows in ascending order, and their predictions [B, ...]


class Fallback(NamedTuple):
    """A file must be written whatever happens: rows that cannot be predicted take the sample submission's values."""

    found: raw.RawData  # which has the sample submission
    until: float  # deadline in time.monotonic(): rows not predicted by then take the sample's values


class Member(NamedTuple):
    """A run that predicts, with its task on the given data and its config with the given settings."""

    run: Run
    task: Task
    config: Config

    @property
    def changes(self) -> list[str]:
        """The settings that differ from those of its training; with any, its score is not that of these predictions."""
        return differences(self.run.config(type(self.config)), self.config)

    @property
    def has_models(self) -> bool:
        """Whether it predicts anew; a run without a network, or a blend, has only kept its predictions."""
        return self.task.network is not None and not self.run.is_blend


def write_submission(
    competition: str, members: Sequence[Member], is_demo: bool, fallback: Fallback | None = None
) -> Path:
    """Average the members' predictions of the test rows and write the checked CSV; returns its path.

    A single run's predictions, if they are for the data of its training, are kept in its folder, for blends.
    """
    _refuse_unlike(members)
    first, task = members[0], members[0].task
    path = submission.SUBMISSIONS / competition / f"{_name_of(members, is_demo)}.csv"
    provenance = _provenance(competition, members, is_demo)
    keeps = len(members) == 1 and first.has_models and not first.changes and not fallback
    keeps = keeps and task.fingerprint == first.run.provenance["data_fingerprint"]
    kept = PredictionWriter(first.run.path, "test", len(task.data.test), task.postprocess.kept)
    lost: list[str] = []
    with kept if keeps else nullcontext() as writer:
        rows = _rows_of_csv(members, writer, lost, fallback)
        if fallback:
            rows = _filled(rows, task, fallback.found, lost, provenance)
        submission.write(path, task.sample, task.sample.in_order(rows), task.submission.valid, provenance)
        if keeps:
            remove_predictions(first.run.path, "test")  # maybe of other rows: must not lie beside these ids
            write_ids(first.run.path, "test", task.data.test_ids)
    return path


def _refuse_unlike(members: Sequence[Member]) -> None:
    """Raise UserError when the members predict other rows or other outputs, and say what else differs."""
    first = members[0]
    for member in members:
        member.run.check_outputs(member.task.outputs)
        names, unlike = f"{first.run.name} and {member.run.name}", ""
        if list(member.task.data.test_ids) != list(first.task.data.test_ids):
            unlike = "test rows"
        elif member.task.outputs != first.task.outputs:
            unlike = f"outputs ({first.task.outputs} and {member.task.outputs})"
        if unlike:
            raise UserError(f"runs {names} predict different {unlike}: average runs of the same data")
        if member.task.fingerprint != first.task.fingerprint:
            print(f"{names} are averaged: their test ids are the same, but not their data files")
        if changes := "; ".join(member.changes):
            print(f"{member.run.name} predicts with other settings ({changes}): its CV score is not that of this file")


def _batches(member: Member, predictor: Predictor | None, show: bool) -> Batches:
    """The readable test rows and their predictions: made now or, without a predictor, those that the run has kept."""
    test = member.task.data.test
    rows, label = np.arange(len(test)), f"predicting {member.run.name}" if show else None
    batches = predictor.batches(test, rows, label) if predictor else _kept_batches(member, rows)
    for index, predictions, *_ in batches:
        yield index.tolist(), map_tree(torch.clone, predictions)  # `apply` may change them: not those of inference mode


def _by_row(batches: Batches) -> Iterator[tuple[int, Predictions]]:
    for index, predictions in batches:
        for place, row in enumerate(index):
            yield row, part_of(predictions, place)


def _kept_batches(member: Member, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Predictions]]:
    run, again = member.run, member.run.again("test")
    if (kept := read_predictions(run.path, "test", again)) is None:
        raise UserError(f"{run.path} has no predictions of test rows: {again}")
    if not keeps_test_rows(run, member.task):
        raise no_other_data(run)
    for start in range(0, len(rows), member.config.batch_size):
        part = slice(start, start + member.config.batch_size)
        yield rows[part], unpack(part_of(kept, part))


def keeps_test_rows(run: Run, task: Task) -> bool:
    """Whether the run has kept predictions of the task's test rows, in their order."""
    return read_ids(run.path, "test", run.again("test")) == [str(name) for name in task.data.test_ids]


def no_other_data(run: Run) -> UserError:
    return UserError(
        f"{run.path} has no network to predict other data with, only predictions for {run.provenance['data']} as it "
        f"was then: train a run on these data"
    )


def _means(streams: Sequence[Batches]) -> Iterator[tuple[int, Predictions]]:
    """The mean over several runs of every row that all have: a run may read an image that another one cannot."""
    merged = heapq.merge(*map(_by_row, streams), key=itemgetter(0))
    for row, same in groupby(merged, key=itemgetter(0)):
        found = [predictions for _, predictions in same]
        if len(found) == len(streams):
            yield row, mean_of(found)


def _averaged(streams: Sequence[Batches], size: int) -> Batches:
    """The means over several runs in batches."""
    means = _means(streams)
    while chunk := list(islice(means, size)):
        yield [row for row, _ in chunk], collate([mean for _, mean in chunk])


def _rows_of_csv(
    members: Sequence[Member], writer: PredictionWriter | None, lost: list[str], fallback: Fallback | None
) -> Iterator[Sequence[Any]]:
    """The rows of the CSV that were predicted in time; adds to `lost` which were not, and why.

    `writer`, if there is one, keeps the predictions. Raises UserError at the end if rows are lost without a `fallback`.
    """
    first, (rules, tuned) = members[0], _rules_of(members)
    ids = first.task.data.test_ids
    predictors = [predictor_of(*member) if member.has_models else None for member in members]
    pairs = zip(members, predictors, strict=True)
    streams = [_batches(member, predictor, show=member is first) for member, predictor in pairs]
    batches = streams[0] if len(streams) == 1 else _averaged(streams, first.config.batch_size)

    def means() -> Batches:
        for index, mean in batches:
            if writer:
                writer.add(mean)
            yield index, mean
            done = index[-1] + 1
            if fallback and time.monotonic() > fallback.until and done < len(ids):
                lost.append(f"{ids[done]} and all rows after it: the time is up")
                break

    def rows(index: list[int], mean: Predictions) -> list[Sequence[Any]]:
        return list(first.task.submission.rows([ids[row] for row in index], decisions_of(rules, mean, tuned)))

    yield from _beside(rows, means())
    for stream in streams:
        stream.close()  # only then does its predictor know the skipped rows
    skipped = {row: why for one in predictors if one for row, why in one.skipped.items()}
    lost += [f"{ids[row]}: {why.split(': replace')[0]}" for row, why in sorted(skipped.items())]
    if lost and not fallback:
        raise UserError(
            f"{len(lost)} test images cannot be read ({some(lost, by='; ')}), and a submission needs every one: "
            f"replace the files, then make predict COMP={first.run.provenance['competition']} RUN={first.run.name}"
        )


def _beside(make: Callable[..., list[Any]], parts: Iterator[tuple]) -> Iterator[Any]:
    """The results of `make` for every part, made in a thread while the network predicts the next part."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for part in parts:
            coming = pool.submit(make, *part)
            if waiting:
                yield from waiting.result()
            waiting = coming
        if waiting:
            yield from waiting.result()


def _filled(
    rows: Iterator[Sequence[Any]], task: Task, found: raw.RawData, lost: list[str], provenance: dict[str, Any]
) -> Iterator[Sequence[Any]]:
    """`rows`, then the sample submission's own for the missing ids; prints these ids and why they were `lost`."""
    there = set()
    for row in rows:
        there.add(str(row[0]))
        yield row
    filled = [name for name in task.sample.ids if name not in there]
    if filled and not lost:
        raise UserError(f"the predicted rows are not those of the sample submission (first missing id: {filled[0]})")
    if filled:
        provenance["fallback"] = filled
        print(
            f"{len(filled)} of {len(task.sample.ids)} rows have the sample submission's values ({some(filled, NAMED)}; "
            f"all are in the file beside the CSV): {some(lost, NAMED, '; ')}"
        )
        missing = set(filled)
        yield from (row for _, row in found.uncounted().rows(task.submission.sample) if row[0] in missing)


def _rules_of(members: Sequence[Member]) -> tuple[Task, Tuned]:
    """The task and tuned values that decide: those of the best-scoring run that tuned, whatever the order."""
    tuned = [member for member in members if member.run.result.get("tuned")]
    if not tuned:
        return members[0].task, {}
    better = max if members[0].task.metrics[0].higher_is_better else min
    best = better(tuned, key=lambda member: member.run.result["score"])
    if len(members) > 1:
        print(f"decisions by the rules tuned in {best.run.name}, the best of these runs")
    return best.task, best.run.result["tuned"]


def _name_of(members: Sequence[Member], is_demo: bool) -> str:
    """The runs' names joined; if that is too long for a file name, the first one and how many more there are."""
    names = [member.run.name for member in members]
    name = "+".join(names)
    if len(name.encode()) > 2 * runs.LONGEST_NAME:
        name = f"{names[0]}+{len(names) - 1}-more-{sha256(name.encode()).hexdigest()[:12]}"
    return name + "-demo" * (is_demo and "demo" not in members[0].run.name)


def _provenance(competition: str, members: Sequence[Member], is_demo: bool) -> dict[str, Any]:
    """The content of the JSON file beside the CSV."""
    run, task, _ = members[0]
    is_scored = len(members) == 1 and not members[0].changes
    return {
        "competition": competition,
        "run": ",".join(one.run.name for one in members),
        "recipe": run.provenance["recipe"],
        "score": run.result["score"] if is_scored else None,
        "monitor": task.metrics[0].name,
        "commit": runs.commit(),
        "data_fingerprint": task.fingerprint,
        "demo": is_demo,
        "text_columns": list(task.submission.text),
        "several_rows": task.submission.several,
        "created": runs.now(),
        **task.submission.facts,
    }


def predict(
    competition: Competition, given: argparse.Namespace, fallback: bool = False, budget: float | None = None
) -> Path:
    """`make predict`: write the submission of finished runs again, by their own configs and on their training's data.

    With `fallback`, or after `budget` seconds, rows without a prediction get the sample submission's own values.
    """
    start, is_filled = time.monotonic(), fallback or budget is not None
    members, demos = [], set()
    for run in runs.finished(competition.name, given.run):
        trained = run.config(competition.config_class)
        asked = with_flags(trained, given)
        config = replace(asked, bad_images="skip") if is_filled else asked
        found = replace(raw.of_run(run.provenance, given.data, competition.write_demo), lenient=is_filled)
        demos.add(found.is_demo or run.provenance["demo"])
        task = completed(competition.build(config, found, print), found)
        members.append(Member(run, task, config))
        if not members[-1].has_models:
            refuse_unused(asked, trained, trained, ())
            if task.fingerprint != run.provenance["data_fingerprint"]:
                raise no_other_data(run)
        use_threads(config, with_workers=needs_workers(task))
        check_before(task, competition, every_image=not is_filled)
    filled = Fallback(found, math.inf if budget is None else start + budget) if is_filled else None
    path = write_submission(competition.name, members, any(demos), filled)
    if len(members) == 1 and not given.data:
        members[0].run.finish()
    print(f"submission: {path}")
    return path
