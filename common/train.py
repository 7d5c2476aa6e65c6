"""A whole run: train the folds, tune and score on their out-of-fold predictions, write the submission."""

import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from common import raw, track
from common import run as runs
from common.competition import Competition
from common.config import Config, folds_to_train
from common.defaults import completed
from common.device import device_of, use_threads
from common.engine.ranks import SINGLE, Ranks
from common.errors import UserError
from common.fit import fit
from common.fit_predict import fit_predict
from common.loading import folds, orders
from common.page import write_report
from common.predict import Member, write_submission
from common.preflight import check_before, refuse_bad_training_images, refuse_unused, try_out
from common.pseudo import Pseudo, origins
from common.raw import RawData
from common.run import Run
from common.scoring import finish
from common.task import Task, needs_workers


def train(
    competition: Competition,
    config: Config,
    recipe: str,
    data: str | None = None,
    run_name: str | None = None,
    insist: bool = False,
    submits: bool = True,
) -> None:
    """`make train`: read the data, train the folds (or go on with them), score them and write the submission."""
    with Ranks.from_environment() as ranks:
        say = print if ranks.is_writer else lambda message: None
        device_of(config, ranks.local_rank, ranks.world)  # a missing device raises before anything is read
        track.check(config)
        found = raw.find(competition.name, data, competition.write_demo, announce=say)
        task = completed(competition.build(config, found, say), found)
        if task.fit_predict:
            refuse_unused(config, competition.recipes[recipe], competition.recipes["default"], task.uses)
        if task.fit_predict and ranks.world > 1:  # the notebook on Kaggle starts one process for every card
            if not ranks.is_writer:
                return
            print(f"no network for {ranks.world} processes to train together: one of them does all the work")
            os.environ.pop("LOCAL_WORLD_SIZE", None)  # so that it uses all cores
            ranks = SINGLE
        use_threads(config, with_workers=needs_workers(task))
        provenance = provenance_of(competition, task, recipe, found)
        if config.pseudo:
            provenance["pseudo"] = origins(competition.name, config)
        pseudo = Pseudo(competition, found, task, config, provenance) if config.pseudo else None
        first = partial(_check_new, task, config, pseudo, ranks.world)
        opening = partial(runs.open_run, competition.name, run_name, config, provenance, insist, first)
        run = _open_together(competition, task, provenance, opening, ranks)
        shards = [orders.shard(config.batch_size, rank, ranks.world) for rank in range(ranks.world)]
        if idle := sum(start == stop for start, stop in shards):
            run.log(f"--batch-size {config.batch_size} leaves {idle} of {ranks.world} processes without work: raise it")
        result = ranks.broadcast(run.result)  # other machines may not have the file
        if result is None:
            _train_folds(task, config, run, ranks, pseudo)
        else:
            run.log(f"{run.path} is finished ({result['monitor']} {result['score']}): only predicting")
    if ranks.is_writer:
        member = Member(run, task, config)
        _write_what_follows(competition.name, member, competition.recipes[recipe], found.is_demo, submits)


def _check_new(task: Task, config: Config, pseudo: Pseudo | None, world: int) -> None:
    """The checks that a new run must pass before it gets a folder."""
    if pseudo:
        pseudo.check()
    if config.bad_images == "raise":
        refuse_bad_training_images(task)
    try_out(task, config, world)
    if pseudo:
        pseudo.check_rows()


def _open_together(
    competition: Competition, task: Task, provenance: dict[str, Any], opening: Callable[[], Run], ranks: Ranks
) -> Run:
    """The first process checks the task and opens or makes the run; the others get the same one."""
    if not ranks.is_writer:
        if (shared := ranks.broadcast(None)) is None:
            sys.exit(1)
        return Run(runs.RUNS / competition.name / shared, provenance, is_writer=False)
    try:
        check_before(task, competition)
        run = opening()
    except BaseException:
        ranks.broadcast(None)  # the others must not wait for a run that will not come
        raise
    ranks.broadcast(run.name)
    return run


def provenance_of(competition: Competition, task: Task, recipe: str, found: RawData) -> dict[str, Any]:
    """Where a run comes from: the content of run.json except its name and the time."""
    return {
        "competition": competition.name,
        "recipe": recipe,
        "demo": found.is_demo,
        "data": str(found.path.resolve()),
        "data_fingerprint": task.fingerprint,
        "folds_fingerprint": folds.fingerprint(task.data.folds, task.data.ids),
        "outputs": task.outputs,
        "code": runs.code_fingerprint(competition.name),
        "command": shlex.join([os.path.relpath(sys.executable), "-m", "common", *sys.argv[1:]]),
        "commit": runs.commit(),
        "machine": runs.machine(),
    }


def _train_folds(task: Task, config: Config, run: Run, ranks: Ranks, pseudo: Pseudo | None) -> None:
    """Train every fold that --fold names, then score them."""
    if ranks.is_writer:
        folds.write_csv(run.path / "folds.csv", task.data.folds, task.data.ids)
    wanted = folds_to_train(config)
    if task.fit_predict:
        folders = [fit_predict(task, config, run, fold) for fold in wanted]
    else:
        folders = [fit(task, config, run, fold, ranks, pseudo.join if pseudo else None) for fold in wanted]
    if ranks.is_writer:
        finish(run, task, config, folders)


def _write_what_follows(competition: str, member: Member, recipe: Config, is_demo: bool, submits: bool) -> None:
    """Write the run's page and its submission. A page that fails is only logged: it must not cost the submission.

    If the disk has refused the page, the run is left unfinished: the same command writes it again.
    """
    run, refused = member.run, False
    if not run.is_finished:
        try:
            write_report(member, recipe)
        except Exception as error:  # a plot may raise anything
            run.log(f"no report of {run.path}: {type(error).__name__}: {error}")
            refused = isinstance(error, UserError) and isinstance(error.__cause__, OSError)
    path = write_submission(competition, [member], is_demo) if submits else None
    if not refused:
        run.finish()
    if run.report.is_file():
        print(f"report: {run.report}")
    if path:
        print(f"submission: {path}")


def check(competition: Competition, config: Config, recipe: str, data: str | None) -> None:
    """`make check`: read every image once, list those that cannot be decoded, and check the task as `train` does."""
    from common.vision.check import check_folder, image_paths

    found = raw.find(competition.name, data, competition.write_demo)
    task = completed(competition.build(config, found, print), found)
    paths = image_paths(task.data.train), image_paths(task.data.test)
    check_folder(*paths, competition.name)
    if task.fit_predict:
        refuse_unused(config, competition.recipes[recipe], competition.recipes["default"], task.uses)
    check_before(task, competition, every_image=False)  # all were read just now
    try_out(task, config)
    images = f"{count} images" if (count := sum(map(len, paths))) else "the tables (no image files)"
    print(f"{competition.name} is in order: {images} of {found.path} can be read")
