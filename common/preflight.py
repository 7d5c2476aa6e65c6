"""Checks before the training, for every competition: errors that can be found early are not left for later."""

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.batch import Batch, Tree, map_tree, tensors_of
from common.competition import Competition
from common.config import ANY_TASK_FIELDS, Config, folds_to_train
from common.defaults import a_row_each
from common.device import device_of
from common.engine import memory
from common.engine.optimizers import parameter_groups
from common.engine.prepare import check_compile, try_compile
from common.errors import UserError
from common.files import require_room
from common.flags import value_text
from common.fold import OWN_COLUMNS, fold_label, order_of, rows_of_fold
from common.inference import decisions_of
from common.loading import orders
from common.loading.loader import in_order
from common.loading.mixing import mix_pairs
from common.losses.protocol import batch_value, own_copy
from common.metrics import check_direction, evaluate
from common.predictions import Predictions, check_names, leaves, pack_all, part_of
from common.run import RUNS
from common.submission import faults
from common.task import Task
from common.vision.check import image_paths, refuse_unreadable, unreadable
from common.vision.datasets import refuse_lost_masks

LARGE = 2_000_000  # numbers in a sample from which on one sample is tried out instead of two
WEIGHTS_OF_A_TRAINING = 5  # copies of the weights in best.pt and last.pt: two of the model, two moments, the average


def check_before(task: Task, competition: Competition, every_image: bool = True) -> None:
    """Raise UserError for faults that would show only after hours: in metric names and direction, ids, test images.

    Without `every_image`, unreadable images pass: the prediction leaves them out.
    """
    names = [metric.name for metric in task.metrics]
    for name in names:
        if name in OWN_COLUMNS or names.count(name) > 1 or not name.isprintable() or set(name) & set(',"'):
            raise UserError(
                f"metric {name!r}: expected names without commas and quotes that differ from each other and from the "
                f"columns of metrics.csv, {', '.join(OWN_COLUMNS)}"
            )
    check_direction(task.metrics[0], competition.source.higher_is_better)
    as_many = len(task.data.test_ids) == len(task.sample.ids)
    if as_many or task.submission.rows is a_row_each:  # else several rows of the CSV belong to one test row
        task.sample.check_ids(task.data.test_ids)
    paths = image_paths(task.data.test) if every_image else []
    refuse_unreadable(unreadable(paths), len(paths))
    if task.check:
        task.check()


def refuse_unused(config: Config, recipe: Config, default: Config, uses: Collection[str]) -> None:
    """Raise UserError for a network's setting that a task without a network does not name in its `uses`.

    Such a setting must equal the `recipe`'s, and the recipe's must equal that of the `default` recipe or of the core.
    The latter is not checked if a flag of the competition's own was changed, such as the kind of model: then the recipe
    may be one for a network.
    """
    core = [item.name for item in fields(Config)]
    same_kind = all(getattr(config, one.name) == getattr(recipe, one.name) for one in fields(config)[len(core) :])
    for item in fields(config)[: len(core)]:
        name, value = item.name, getattr(config, item.name)
        if name in ANY_TASK_FIELDS or name in uses:
            continue
        if value != getattr(recipe, name) or (same_kind and value not in (getattr(default, name), item.default)):
            raise UserError(
                f"--{name.replace('_', '-')} {value_text(value)}: this task has no network that uses it. Leave "
                f"it out, also in the recipe in config.py"
            )


def try_out(task: Task, config: Config, world: int = 1) -> None:
    """Try out a new run of `world` processes: its initial weights, and a few rows from the model to the CSV.

    Raises UserError for the first step that fails.
    """
    if config.compile:
        check_compile(device_of(config).type)
        try_compile(device_of(config))
    if task.network:
        _try_out(task, config, world)


def refuse_bad_training_images(task: Task) -> None:
    """Raise BadImage for the first training image that cannot be read: one epoch may take hours to reach it."""
    paths = image_paths(task.data.train)
    for error in unreadable(paths):
        error.row //= max(1, len(paths) // len(task.data.train))  # an image may have a file for each channel
        raise error


@torch.random.fork_rng(devices=[])
def _try_out(task: Task, config: Config, world: int) -> None:
    """Pass a few validation rows through model, loss, predictions, decisions and CSV rows; check the disk space."""
    network, post, device = task.network, task.postprocess, device_of(config)
    refuse_lost_masks(task.data.train)
    if len(task.data.test):
        _rows_of(task.data.test, 1, config)  # resizes the test images now, when a full disk costs nothing
    batch = _first_rows(task, config)
    if not batch:
        return  # unreadable images: the training reports them
    if task.data.mix and (own := _rows_of(task.data.train, 2, config)):
        mix_pairs(task.data.mix, own, np.arange(len(own)), config.seed)  # raises for what it cannot blend
    batch = batch.to(device)
    model = network.model().to(device)
    if network.pretrain:
        network.pretrain(model)
    parameter_groups(model, config.lr, config.weight_decay, network.lr_scales)  # raises for names that no module has
    _check_batches(task, config, world, model, map_tree(lambda x: x[:1], batch.inputs))
    model.eval()
    with torch.inference_mode():
        outputs = model(batch.inputs)
        of_epochs = map(network.loss_of, range(config.epochs)) if network.loss_of else (network.loss,)
        for loss in {id(loss): loss for loss in of_epochs}.values():
            _check_loss(own_copy(loss, device), outputs, batch.targets)
        predictions = post.predict(outputs)
        check_names(predictions)
        shapes = {name: list(values.shape) for name, values in leaves(predictions).items()}
        if any(shape[:1] != [len(batch)] for shape in shapes.values()):
            raise UserError(f"predictions of {len(batch)} samples have the shapes {shapes}: expected [B, ...]")
        for one in network.tta[1:]:
            undone = leaves(one.undo(post.predict(model(one.apply(batch.inputs)))))
            found = {name: list(values.shape) for name, values in undone.items()}
            if found != shapes:
                raise UserError(f"the TTA {one.name!r} gives predictions of {found}: expected {shapes}, as without it")
        decisions = decisions_of(task, predictions, {})
        evaluate(task.metrics, [(decisions, batch.targets)])
        _check_rows(task, map_tree(Tensor.cpu, decisions))
    _require_room(task, config, model, predictions)


def _check_batches(task: Task, config: Config, world: int, model: nn.Module, sample: Tree) -> None:
    """Check the training rows of every fold, and that BatchNorm accepts their smallest batch or micro-batch."""
    largest = config.batch_size if config.micro_batch == "auto" else config.micro_batch
    for fold in folds_to_train(config):
        order = order_of(task, config, rows_of_fold(task, fold)[0])
        batches = set(np.diff(order(config.seed, 0).bounds(config.batch_size)).tolist())
        shards = [orders.shard(batch, rank, world) for batch in batches for rank in range(world)]
        if 1 not in {size for start, stop in shards for size in memory.sizes(stop - start, largest)}:
            continue
        try:
            with torch.inference_mode():
                model.train()
                model(sample)
        except ValueError as error:
            raise UserError(
                f"{fold_label(fold)}: --batch-size {config.batch_size} --micro-batch {config.micro_batch} leave a "
                f"micro-batch of a single sample, on which the model cannot train ({error}): choose others"
            ) from error


def _first_rows(task: Task, config: Config) -> Batch | None:
    """Two validation rows, or only one if it is large."""
    valid = task.data.valid
    batch = _rows_of(valid, 1, config)
    is_small = batch and sum(x.numel() for x in tensors_of(batch.inputs)) <= LARGE
    return _rows_of(valid, 2, config) if is_small and len(valid) > 1 else batch


def _rows_of(dataset: Any, count: int, config: Config) -> Batch | None:
    return next(in_order(dataset, count, count, config.seed, bad_images="skip"), None)


def _require_room(task: Task, config: Config, model: nn.Module, predictions: Predictions) -> None:
    """Raise UserError when the disk has no room for the predictions and the weights that the run will keep."""
    row = sum(packed.nbytes for packed in pack_all(part_of(predictions, slice(1)), task.postprocess.kept).values())
    folds = folds_to_train(config)
    held = sum(int((task.data.folds == fold).sum()) for fold in folds if fold is not None)
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    size = row * (2 * held + len(task.data.test_ids)) + weights * (len(folds) + WEIGHTS_OF_A_TRAINING)
    require_room(RUNS, size, "what this run keeps (out-of-fold and test predictions, weights)")


def _check_loss(loss: Any, outputs: Tree, targets: Tree) -> None:
    try:
        batch_value(loss, outputs, targets)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        told = [map_tree(lambda x: f"{x.dtype} {list(x.shape)}".removeprefix("torch."), x) for x in (outputs, targets)]
        raise UserError(
            f"the loss does not take the outputs {told[0]} of the model with the targets {told[1]} of the dataset "
            f"({' '.join(str(error).split())[:200]}): make them fit each other in build()"
        ) from error


def _check_rows(task: Task, decisions: object) -> None:
    """Check the CSV rows that these decisions would make, with ids of test rows, as the whole CSV will be checked."""
    ids = [str(name) for name in task.data.test_ids][: len(tensors_of(decisions)[0])]
    decisions, columns = map_tree(lambda x: x[: len(ids)], decisions), task.sample.columns
    rows = [[str(cell) for cell in row] for row in task.submission.rows(ids, decisions)]
    # Where a test row has other ids in the CSV, it decides which.
    due = {row[0] for row in rows if row} if len(task.data.test_ids) != len(task.sample.ids) else set(ids)
    sample = replace(task.sample, ids=tuple(name for name in task.sample.ids if name in due))
    for fault in faults([columns, *task.sample.in_order(rows)], sample, task.submission.valid):
        raise UserError(
            f"the submission would begin with {' '.join(','.join(row) for row in rows[:2])[:200]}: {fault}. Expected a "
            f"row of {','.join(columns)} for every id, also where nothing is found; several need "
            f"Submission(several=True), words in a column of numbers Submission(text=...). See build()'s Task"
        )
