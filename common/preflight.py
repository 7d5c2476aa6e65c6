"""What can be checked before the training is checked before the training, for every competition."""

import numpy as np
import torch

from common.batch import map_tree, tensors_of
from common.competition import Competition
from common.config import Config
from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.losses.protocol import batch_value
from common.metrics import check_direction, evaluate
from common.predictions import leaves
from common.task import Task
from common.vision.check import image_paths, refuse_unreadable, unreadable


def check_before(task: Task, config: Config, competition: Competition, predicting: bool = False) -> None:
    """Raise UserError for what would fail only after hours: metric, ids, test images, shapes, a row of the CSV.

    `predicting`: only what `make predict` needs.
    """
    check_direction(task.metrics[0], competition.source.higher_is_better)
    if len(task.data.test_ids) == len(task.sample.ids):  # else several rows of the CSV belong to one test row
        task.sample.check_ids(task.data.test_ids)
    paths = image_paths(task.data.test)
    refuse_unreadable(unreadable(paths), len(paths), "test images")
    if task.check:
        task.check()
    if task.network and not predicting:
        with torch.random.fork_rng(devices=[]):
            _try_out(task, config)


def _try_out(task: Task, config: Config) -> None:
    """A few validation rows through model, loss, predictions, decisions and rows of the CSV, on the CPU."""
    network, post = task.network, task.postprocess
    count = min(2, len(task.data.valid))
    with Loader(
        task.data.valid, orders.sequential(np.arange(count)), count, seed=config.seed, bad_images="skip"
    ) as loader:
        batch = next(iter(loader.epoch(0)), None)
    if batch is None or not len(batch):
        return  # unreadable images: the training says which
    model = network.model().eval()
    with torch.inference_mode():
        outputs = model(batch.inputs)
        of_epochs = map(network.loss_of, range(config.epochs)) if network.loss_of else (network.loss,)
        for loss in {id(loss): loss for loss in of_epochs}.values():
            batch_value(loss, outputs, batch.targets)
        predictions = post.predict(outputs)
        kept = leaves(predictions)
        if any(len(values) != len(batch) for values in kept.values()):
            shapes = {name: list(values.shape) for name, values in kept.items()}
            raise UserError(f"predictions of {len(batch)} samples have the shapes {shapes}: expected [B, ...]")
        for one in network.tta:
            shapes = [
                values.shape for values in leaves(one.undo(post.predict(model(one.apply(batch.inputs))))).values()
            ]
            if shapes != [values.shape for values in kept.values()]:
                raise UserError(f"the TTA {one.name} gives predictions of the shape {shapes[0]}: expected those as is")
        decisions = post.apply(predictions, {})
        evaluate(task.metrics, [(decisions, batch.targets)])
        _check_rows(task, decisions)


def _check_rows(task: Task, decisions: object) -> None:
    """The rows of the CSV that these decisions would make, under ids of test rows."""
    ids = [str(name) for name in task.data.test_ids][: len(tensors_of(decisions)[0])]
    decisions = map_tree(lambda x: x[: len(ids)], decisions)
    for row in task.submission.rows(ids, decisions):
        cells = [str(cell) for cell in row]
        if len(cells) != len(task.sample.columns):
            problem = f"{len(cells)} values, expected {len(task.sample.columns)} ({','.join(task.sample.columns)})"
        else:
            problem = task.sample.fault(cells[1:]) or (task.submission.valid and task.submission.valid(cells[1:]))
        if problem:
            raise UserError(f"a row of the submission would be {','.join(cells)[:200]}: {problem}. See build()'s Task")
