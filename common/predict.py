"""The submission of one run, or of the average of several."""

import argparse
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
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
from common.config import Config, differences, refuse_unused, with_flags
from common.device import use_threads
from common.errors import UserError
from common.inference import Predictor, predictor_of
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
from common.preflight import check_before
from common.run import Run
from common.task import Task, Tuned, completed, needs_workers

NAMED = 20  # most rows that are printed
Batches = Iterator[tuple[list[int], Predictions]]  # test rows in ascending order, and their predictions [B, ...]


class Fallback(NamedTuple):
    """A file must be written whatever happens: rows that cannot be predicted take the sample submission's values."""

    values: Callable[[], dict[str, list[Sequence[str]]]]  # id -> its rows in the sample submission, read when needed
    until: float  # deadline in time.monotonic(): rows not predicted by then take the sample's values


class Member(NamedTuple):
    """A run that predicts, with its task on the given data and its config with the given settings."""

    run: Run
    task: Task
    config: Config

    @property
    def as_trained(self) -> bool:
        """Whether it predicts with the settings of its training, so that its score holds for these predictions."""
        return not differences(self.run.config(type(self.config)), self.config)


def write_submission(
    competition: str, members: Sequence[Member], is_demo: bool, fallback: Fallback | None = None
) -> Path:
    """Average the members' predictions of the test rows and write the checked CSV; returns its path.

    A single run's predictions, if they are for the data of its training, are kept in its folder, for blends.
    """
    first = members[0]
    _refuse_unlike(members)
    # A run without a network, or a blend, has kept its predictions.
    predictors = [None if not one.task.network or one.run.is_blend else predictor_of(*one) for one in members]
    rows = np.arange(len(first.task.data.test))
    streams = [
        _batches(member, predictor, rows, f"predicting {member.run.name}" if member is first else None)
        for member, predictor in zip(members, predictors, strict=True)
    ]
    path = submission.SUBMISSIONS / competition / f"{_name_of(members, is_demo)}.csv"
    keeps = predictors[0] is not None and len(members) == 1 and first.as_trained and not fallback
    keeps = keeps and first.task.fingerprint == first.run.provenance["data_fingerprint"]
    with ExitStack() as stack:
        keep: Callable[[Predictions], None] = lambda predictions: None  # noqa: E731
        if keeps:
            kept = first.task.postprocess.kept
            keep = stack.enter_context(PredictionWriter(first.run.path, "test", len(rows), kept)).add
        lost: list[str] = []
        rows_of_csv = _rows_of_csv(members, streams, predictors, keep, lost, fallback.until if fallback else None)
        provenance = _provenance(competition, members, is_demo)
        task = first.task
        rows_of_csv = task.sample.in_order(rows_of_csv)
        if fallback:
            rows_of_csv = _filled(rows_of_csv, task.sample.ids, fallback, lost, provenance)
        else:
            rows_of_csv = _whole(rows_of_csv, lost, f"COMP={competition} RUN={first.run.name}")
        submission.write(path, task.sample, rows_of_csv, task.submission.valid, provenance)
        if keeps:
            remove_predictions(first.run.path, "test")  # maybe of other rows: must not lie beside these ids
            write_ids(first.run.path, "test", task.data.test_ids)
    return path


def _refuse_unlike(members: Sequence[Member]) -> None:
    """Raise UserError when the members predict other rows or other outputs, and say what else differs."""
    first = members[0]
    for member in members:
        member.run.check_outputs(member.task.outputs)
        if list(member.task.data.test_ids) != list(first.task.data.test_ids):
            raise UserError(
                f"runs {first.run.name} and {member.run.name} predict different test rows: average runs of the same "
                f"data"
            )
        if member.task.outputs != first.task.outputs:
            raise UserError(
                f"run {first.run.name} predicts {first.task.outputs}, run {member.run.name} {member.task.outputs}: "
                f"average runs of the same data"
            )
        if member.task.fingerprint != first.task.fingerprint:
            print(
                f"{first.run.name} and {member.run.name} are averaged: their test ids are the same, but not their data "
                f"files"
            )
        if not member.as_trained:
            changes = "; ".join(differences(member.run.config(type(member.config)), member.config))
            print(f"{member.run.name} predicts with other settings ({changes}): its CV score is not that of this file")


def _batches(member: Member, predictor: Predictor | None, rows: np.ndarray, label: str | None) -> Batches:
    """The readable test rows and their predictions: made now or, without a predictor, those that the run has kept."""
    batches = predictor.batches(member.task.data.test, rows, label) if predictor else _kept_batches(member, rows)
    for index, predictions, *_ in batches:
        yield index.tolist(), map_tree(torch.clone, predictions)  # `apply` may change them: not those of inference mode


def _by_row(batches: Batches) -> Iterator[tuple[int, Predictions]]:
    for index, predictions in batches:
        for place, row in enumerate(index):
            yield row, part_of(predictions, place)


def _kept_batches(member: Member, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Predictions]]:
    kept = read_predictions(member.run.path, "test")
    if kept is None or not keeps_test_rows(member.run, member.task):
        raise no_other_data(member.run)
    for start in range(0, len(rows), member.config.batch_size):
        part = slice(start, start + member.config.batch_size)
        yield rows[part], unpack(part_of(kept, part))


def keeps_test_rows(run: Run, task: Task) -> bool:
    """Whether the run has kept predictions of the task's test rows, in their order."""
    return read_ids(run.path, "test") == [str(name) for name in task.data.test_ids]


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
    members: Sequence[Member],
    streams: Sequence[Batches],
    predictors: Sequence[Predictor | None],
    keep: Callable[[Predictions], None],
    lost: list[str],
    until: float | None,
) -> Iterator[Sequence[Any]]:
    """The rows of the CSV that were predicted before `until`; adds to `lost` which rows were not, and why."""
    first, (rules, tuned) = members[0], _rules_of(members)
    ids = first.task.data.test_ids
    batches = streams[0] if len(streams) == 1 else _averaged(streams, first.config.batch_size)

    def means() -> Batches:
        for index, mean in batches:
            keep(mean)
            yield index, mean
            done = index[-1] + 1
            if until is not None and time.monotonic() > until and done < len(ids):
                lost.append(f"{ids[done]} and all rows after it: the time is up")
                break

    def rows(index: list[int], mean: Predictions) -> list[Sequence[Any]]:
        return list(first.task.submission.rows([ids[row] for row in index], rules.postprocess.apply(mean, tuned)))

    yield from _beside(rows, means())
    batches.close()
    for stream in streams:
        stream.close()  # only then does its predictor know the skipped rows
    skipped = {row: why for one in predictors if one for row, why in one.skipped.items()}
    lost += [f"{ids[row]}: {why.split(': replace')[0]}" for row, why in sorted(skipped.items())]


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


def _whole(rows: Iterator[Sequence[Any]], lost: list[str], again: str) -> Iterator[Sequence[Any]]:
    yield from rows
    if lost:
        raise UserError(
            f"{len(lost)} test images cannot be read ({'; '.join(lost[:5])}), and a submission needs every one: "
            f"replace the files, then predict again with make predict {again}"
        )


def _filled(
    rows: Iterator[Sequence[Any]], ids: Sequence[str], fallback: Fallback, lost: list[str], provenance: dict[str, Any]
) -> Iterator[Sequence[Any]]:
    """`rows`, with the sample submission's own values for missing ids; prints these ids and why they were `lost`."""
    values, filled, row = None, [], next(rows, None)
    for name in ids:
        there = row is not None and str(row[0]) == name
        while row is not None and str(row[0]) == name:
            yield row
            row = next(rows, None)
        if there:
            continue
        values = fallback.values() if values is None else values
        filled.append(name)
        yield from values[name]
    if row is not None or (filled and not lost):
        raise UserError(f"the predicted rows are not those of the sample submission (first missing id: {filled[:1]})")
    if filled:
        provenance["fallback"] = filled
        print(
            f"{len(filled)} of {len(ids)} rows have the sample submission's values ({', '.join(filled[:NAMED])}"
            f"{' ...' * (len(filled) > NAMED)}; all are in the file beside the CSV): {'; '.join(lost[:NAMED])}"
            f"{f' and {len(lost) - NAMED} more' * (len(lost) > NAMED)}"
        )


def _rows_by_id(found: raw.RawData, sample: str) -> dict[str, list[Sequence[str]]]:
    rows: dict[str, list[Sequence[str]]] = {}
    for _, row in found.uncounted().rows(sample):
        rows.setdefault(row[0], []).append(row)
    return rows


def _rules_of(members: Sequence[Member]) -> tuple[Task, Tuned]:
    """The task and tuned values that decide: those of the best-scoring run that tuned, whatever the order."""
    found = [(run, task, run.result) for run, task, _ in members if (run.result or {}).get("tuned")]
    if not found:
        return members[0].task, {}
    better = max if members[0].task.metrics[0].higher_is_better else min
    run, task, result = better(found, key=lambda entry: entry[2]["score"])
    if len(members) > 1:
        print(f"decisions by the rules tuned in {run.name}, the best of these runs")
    return task, result["tuned"]


def _name_of(members: Sequence[Member], is_demo: bool) -> str:
    """The runs' names joined; if that is too long for a file name, the first one and how many more there are."""
    names = [member.run.name for member in members]
    name, digest = "+".join(names), sha256("+".join(names).encode()).hexdigest()[:12]
    if len(name.encode()) > 2 * runs.LONGEST_NAME:
        name = f"{names[0]}+{len(names) - 1}-more-{digest}"
    return name + "-demo" * (is_demo and "demo" not in members[0].run.name)


def _provenance(competition: str, members: Sequence[Member], is_demo: bool) -> dict[str, Any]:
    """The content of the JSON file beside the CSV."""
    run, task, _ = members[0]
    scores = [(one.run.result or {}).get("score") if one.as_trained else None for one in members]
    return {
        "competition": competition,
        "run": ",".join(one.run.name for one in members),
        "recipe": run.provenance["recipe"],
        "score": scores[0] if len(scores) == 1 else None,
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
    name, start = competition.name, time.monotonic()
    is_filled = fallback or budget is not None
    members, demos = [], set()
    for run in runs.finished(name, given.run):
        trained = run.config(competition.config_class)
        config = with_flags(trained, given)
        config = replace(config, bad_images="skip") if is_filled else config
        found = replace(raw.of_run(run.provenance, given.data, competition.write_demo), lenient=is_filled)
        demos.add(found.is_demo or run.provenance["demo"])
        task = completed(competition.build(config, found, print), found)
        if task.fit_predict or run.is_blend:  # its predictions are kept
            refuse_unused(replace(config, bad_images=trained.bad_images), trained, trained, ())
            if task.fingerprint != run.provenance["data_fingerprint"]:
                raise no_other_data(run)
        use_threads(config, with_workers=needs_workers(task))
        check_before(task, competition, every_image=not is_filled)
        members.append(Member(run, task, config))
    filled = None
    if is_filled:
        until = float("inf") if budget is None else start + budget
        filled = Fallback(partial(_rows_by_id, found, task.submission.sample), until)
    path = write_submission(name, members, any(demos), filled)
    if len(members) == 1 and not given.data:
        members[0].run.finish()
    print(f"submission: {path}")
    return path
