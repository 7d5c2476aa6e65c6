"""Pseudo-labels: from models that never saw the fold, weighted and selected by the flags, the same after a kill."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import raw, train
from common.config import checked
from common.engine.ranks import SINGLE
from common.engine.step import Engine
from common.errors import UserError
from common.fit import fit
from common.inference import load_model
from common.loading import orders
from common.loading.folds import fingerprint
from common.loading.keys import KeyedGenerator, Keys, keyed_seed
from common.loading.loader import Loader
from common.loading.mixing import CutMix, MixUp, OneOf
from common.pseudo import JoinedBatches, JoinedSamples, Pseudo, as_soft, choose, confidence, with_rows
from common.run import Run
from common.tables.numbers import TableDataset
from tests.common import toy
from tests.common.loading.datasets import Everything, Numbers
from tests.common.toy_runs import same, toy_train, weights

BUILD = toy.build
LAST = {"keep": "last", "epochs": 1}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)


def joined(held: int | None, /, **changes):
    """The task that --pseudo makes of the toy for one fold, before anything is trained on it."""
    config = replace(toy.RECIPES["default"], **changes)
    found = raw.find("toy", None, toy.write_demo, str)
    task = toy.made(config)
    facts = {"folds_fingerprint": fingerprint(task.data.folds, task.data.ids), "data": "data/demo/toy"}
    folder = Path("student")
    folder.mkdir(exist_ok=True)
    return Pseudo(toy.TOY, found, task, config, facts).join(Run(folder, facts), held, SINGLE)


def soft(rows: int = toy.TEST_ROWS) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(5)).softmax(1)


def predicted(run: str, fold: int) -> torch.Tensor:
    """The test predictions of one model of a run, computed by hand: the mean over both TTA."""
    task = toy.made()
    model = load_model(Path(f"runs/toy/{run}/fold-{fold}/model.pt"), task, toy.RECIPES["default"], torch.device("cpu"))
    inputs = task.data.test.inputs
    with torch.inference_mode():
        return (model(inputs).softmax(1) + model(1.01 * inputs).softmax(1)) / 2


# Leaks.


def poisoned(*given):
    """The toy with false labels in fold 1."""
    task = BUILD(*given)
    held = torch.from_numpy(task.data.folds == 1)
    for rows in (task.data.train, task.data.valid):
        rows.targets = torch.where(held, (rows.targets + 1) % 3, rows.targets)
    return task


def test_a_fold_never_influences_its_own_labels_nor_what_is_trained_on_them(monkeypatch):
    """Teacher, student, and a student of the student, with true and with false labels in fold 1."""
    found = []
    for build in (BUILD, poisoned):
        monkeypatch.setattr(toy, "build", build)
        shutil.rmtree("runs", ignore_errors=True)
        toy_train("teacher", fold="all", **LAST)
        toy_train("student", fold="all", pseudo="teacher", seed=3, **LAST)
        folders = [toy_train("second", fold="all", pseudo="student,teacher", seed=4, **LAST)]
        folders += [Path("runs/toy") / name for name in ("teacher", "student")]
        found.append(({folder.name: weights(folder) for folder in folders}, joined(1, pseudo="student", **LAST)))
    (true, true_task), (false, false_task) = found
    assert torch.equal(true_task.data.train.test.targets, false_task.data.train.test.targets)
    for run in true:
        same_bits = {name: torch.equal(value, false[run][name]) for name, value in true[run].items()}
        assert all(equal for name, equal in same_bits.items() if name.startswith("fold-1")), run
        trained = {name: equal for name, equal in same_bits.items() if name.endswith("0.weight")}
        assert trained == {"fold-0/0.weight": False, "fold-1/0.weight": True, "fold-2/0.weight": False}, run


def test_labels_are_the_mean_over_runs_of_the_model_that_held_out_the_fold():
    toy_train("a", fold="all", **LAST)
    toy_train("b", fold="1", seed=7, **LAST)
    task = joined(1, pseudo="a,b", fold="1")
    expected = (predicted("a", 1) + predicted("b", 1)) / 2
    torch.testing.assert_close(task.data.train.test.targets, expected)
    assert (task.data.train.test.targets - predicted("a", 0)).abs().max() > 0.01
    assert len(task.data.train) == 150 and task.data.folds[120:].tolist() == [-1] * 30
    assert len(task.data.valid) == 120, "test rows validate nothing"


def test_with_fold_none_all_models_label_together():
    toy_train("a", fold="all", **LAST)
    task = joined(None, pseudo="a", fold="none")
    expected = sum(predicted("a", fold) for fold in range(3)) / 3
    torch.testing.assert_close(task.data.train.test.targets, expected)


def test_the_best_epoch_of_a_fold_is_told_to_know_it():
    toy_train("a", keep="best")
    toy_train("b", pseudo="a")
    assert "a kept the epoch with the best score on fold 0" in Path("runs/toy/b/log.txt").read_text()
    toy_train("c", pseudo="a", fold="none", keep="last")
    assert "kept the epoch with" not in Path("runs/toy/c/log.txt").read_text(), "nothing is held out"


def test_a_run_without_a_network_labels_with_what_it_kept_of_the_fold(monkeypatch):
    given = np.random.default_rng(0).dirichlet(np.ones(3), (3, 30)).astype(np.float32)

    def build(config, *of):
        task = BUILD(config, *of)
        if config.epochs > 1:
            return task
        fitted = lambda train_rows, valid, fold, run: (np.full((len(valid), 3), 1 / 3), given[fold])  # noqa: E731
        return replace(task, network=None, fit_predict=fitted, uses=("epochs",))

    monkeypatch.setattr(toy, "build", build)
    toy_train("trees", epochs=1, fold="all")
    np.testing.assert_array_equal(joined(2, pseudo="trees", fold="2").data.train.test.targets, given[2])
    with pytest.raises(UserError, match="--pseudo trees: this task has no network"):
        toy_train("more", epochs=1, pseudo="trees")
    assert "kept the epoch with" not in Path("student/log.txt").read_text(), "it has no epochs"
    shutil.rmtree("student")
    reversed_ids = [f"t{row}" for row in reversed(range(30))]
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(build(*given), test_ids=reversed_ids))
    with pytest.raises(UserError, match="trees has no network .* as it was then: train a run on these"):
        joined(2, pseudo="trees", fold="2")
    monkeypatch.setattr(toy, "build", build)
    Path("data/demo/toy/seed.txt").write_text("2")  # other contents under the same ids
    with pytest.raises(UserError, match="trees has no network .* as it was then"):
        joined(2, pseudo="trees", fold="2")


# Refusals.


@pytest.mark.parametrize(
    "teacher, changes, told",
    [
        ({"folds": 4}, {}, "--folds 4 --seed 0 .* expected those of --folds 3 --seed 0 .* Train it with"),
        ({"fold": "1"}, {"fold": "all"}, "--fold 1 .* fold 0, 2: train it with --fold all, or this run with --fold 1"),
        ({"fold": "1"}, {"fold": "2"}, "never saw the validation rows of fold 2"),
        ({"fold": "none"}, {}, "trained with --fold none .* of fold 0: train it with --fold all$"),
        ({}, {"pseudo": "nobody"}, "RUN=nobody: there is no such run"),
        ({}, {"pseudo": "", "pseudo_min": 0.5}, "--pseudo-min 0.5: expected 0, or --pseudo RUN"),
        ({}, {"pseudo_min": 0.999}, "--pseudo-min 0.999: no test row is that confident, the highest is 0"),
    ],
)
def test_refused(teacher, changes, told):
    toy_train("teacher", **{"epochs": 1} | teacher)
    with pytest.raises(UserError, match=told):
        toy_train("student", **vars(checked(replace(toy.RECIPES["default"], **{"pseudo": "teacher"} | changes))))
    assert not Path("runs/toy/student").exists()


def test_refused_where_it_cannot_be_trained_on(monkeypatch):
    toy_train("teacher", epochs=1)
    result = Path("runs/toy/teacher/result.json")
    kept = result.read_bytes()
    result.unlink()
    with pytest.raises(UserError, match="teacher is not finished: repeat its command"):
        toy_train("student", pseudo="teacher")
    result.write_bytes(kept)
    Path("runs/toy/teacher/blend.json").write_text("{}")
    with pytest.raises(UserError, match="teacher is a blend, which has no models: name the runs"):
        toy_train("student", pseudo="teacher")
    Path("runs/toy/teacher/blend.json").unlink()
    monkeypatch.setattr(toy, "build", lambda *of: toy.changed(BUILD(*of), pseudo=None))
    with pytest.raises(UserError, match="toy cannot turn test rows into training rows: leave it out, or"):
        toy_train("student", pseudo="teacher")
    others = [f"u{row}" for row in range(30)]
    monkeypatch.setattr(
        toy,
        "build",
        lambda config, *of: toy.changed(BUILD(config, *of), test_ids=others if config.epochs == 1 else None),
    )
    with pytest.raises(UserError, match=r"--pseudo teacher predicts 30 test rows that are not the 30 of this run"):
        joined(0, pseudo="teacher")


# Weights, rows and keys.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, inputs):
        return self.head(inputs)


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_one_step_is_that_of_the_weighted_loss_by_hand(weight):
    """All rows in one batch, micro-batches of 7, SGD without momentum."""
    config = replace(
        toy.RECIPES["default"], epochs=1, batch_size=1000, micro_batch=7, optimizer="sgd", momentum=0.0, lr=0.5,
        weight_decay=0.0, schedule="constant", warmup=0.0, ema=0.0, keep="last", pseudo_weight=weight,
    )  # fmt: skip
    plain, rows = toy.made(config, model=Net), np.array([2, 3, 11, 29])
    data = with_rows(plain.data, plain.data.pseudo(soft()), rows, config)
    folder = fit(plain, config, Run(Path.cwd(), {}), 1, SINGLE, lambda *_: replace(plain, data=data))
    found = torch.load(folder / "model.pt", weights_only=True)["model"]

    torch.manual_seed(keyed_seed(config.seed, 1))
    model, own = Net(), np.flatnonzero(plain.data.folds != 1)
    inputs, targets = plain.data.train.batch(own, Keys(0, 0, own))
    more, labels = plain.data.pseudo(soft()).batch(rows, Keys(0, 0, 120 + np.arange(4)))
    losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
    soft_losses = -(labels * model(more).log_softmax(1)).sum(1)
    ((losses.sum() + weight * soft_losses.sum()) / (len(own) + weight * len(rows))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter - 0.5 * parameter.grad, rtol=1e-5, atol=1e-6)


def test_training_rows_keep_their_bytes_and_their_keys():
    plain = toy.made()
    config = replace(toy.RECIPES["default"], pseudo_weight=0.5)
    rows = np.array([4, 9, 20])
    data = with_rows(plain.data, plain.data.pseudo(soft()), rows, config)
    train = data.train
    assert isinstance(train, JoinedBatches) and len(train) == 123
    index, draw = np.array([121, 5, 120, 119, 0, 122]), np.array([0, 1, 0, 0, 2, 0])
    inputs, targets = train.batch(index, Keys(3, 2, index, draw))
    own, _ = plain.data.train.batch(index[[1, 3, 4]], Keys(3, 2, index[[1, 3, 4]], draw[[1, 3, 4]]))
    assert torch.equal(inputs[[1, 3, 4]], own)
    others, labels = plain.data.pseudo(soft()).batch(rows[[1, 0, 2]], Keys(3, 2, index[[0, 2, 5]]))
    assert torch.equal(inputs[[0, 2, 5]], others) and torch.equal(targets[[0, 2, 5]], labels)
    hot = nn.functional.one_hot(plain.data.train.targets[[5, 119, 0]], 3).float()
    assert torch.equal(targets[[1, 3, 4]], hot)
    assert train.weights.tolist() == [1.0] * 120 + [0.5] * 3
    assert data.ids[120:] == ["test t4", "test t9", "test t20"]
    assert not hasattr(with_rows(plain.data, plain.data.pseudo(soft()), rows, toy.RECIPES["default"]).train, "weights")


def test_samples_join_as_batches_do_with_workers_and_without():
    """For every kind of generator, including albumentations, and for training rows that already have weights."""
    train = JoinedSamples(Everything(), Everything(), np.array([3, 1]), 0.5, (torch.zeros(1, 8, 8, 2), torch.zeros(1)))
    order = orders.joined(orders.shuffled(23), np.array([23, 24]))
    found = []
    for workers in (0, 2):
        with Loader(train, order, 6, seed=2, workers=workers, epochs=1) as loader:
            found.append({int(b.index[i]): (b, i) for b in loader.epoch(0) for i in range(len(b))})
    assert set(found[0]) == set(found[1]) == set(range(25))
    for row in range(25):
        (one, at), (other, there) = found[0][row], found[1][row]
        assert torch.equal(one.inputs["image"][at], other.inputs["image"][there])
        assert torch.equal(one.inputs["numbers"][at], other.inputs["numbers"][there])
        assert one.targets[0][at].dtype == torch.float32
    assert float(found[0][24][0].targets[1][found[0][24][1]]) == 1.0, "the last row is test row 1"
    np.testing.assert_allclose(train.weights, [*Everything().weights, 0.5, 0.5], rtol=1e-6)
    sample = JoinedSamples(Numbers(9), Numbers(9), np.array([7]), 1.0, torch.zeros(1)).sample
    for row in range(10):
        keyed = KeyedGenerator().jump(1, 2, row)
        expected = Numbers(9).sample(0, KeyedGenerator().jump(1, 2, row))[0]
        np.testing.assert_array_equal(sample(row, keyed)[0], expected)


@pytest.mark.parametrize("mix", [MixUp(0.4), CutMix(), OneOf(MixUp(0.4), CutMix())])
def test_a_pair_of_both_kinds_blends_its_weights_like_its_targets(mix):
    """Every row has a class of its own, so a mixed target shows the share of each row."""
    images = torch.arange(12.0).reshape(12, 1, 1, 1).expand(12, 1, 8, 8)
    train, test = TableDataset(images[:8], torch.arange(8)), TableDataset(images[8:], torch.eye(12)[8:])
    rows = np.arange(4)
    both = JoinedBatches(train, test, rows, 0.25, torch.zeros(1, 12))
    with Loader(both, orders.joined(orders.shuffled(8), 8 + rows), 5, seed=1, mix=mix) as loader:
        batches = list(loader.epoch(0))
    of_row = torch.tensor([1.0] * 8 + [0.25] * 4)
    blended = 0
    for batch in batches:
        torch.testing.assert_close(batch.weights, batch.targets @ of_row)
        blended += int(((batch.weights > 0.26) & (batch.weights < 0.99)).sum())
    assert blended >= 2


def test_an_order_stays_and_the_test_rows_come_once_among_it():
    base = orders.weighted(np.arange(1.0, 41), samples_per_epoch=60)
    order = orders.joined(base, np.array([40, 43, 41]))
    plans = [order(0, epoch) for epoch in range(3)]
    for epoch, plan in enumerate(plans):
        own, plain = plan.index < 40, base(0, epoch)
        np.testing.assert_array_equal(plan.index[own], plain.index)
        np.testing.assert_array_equal(plan.draw[own], plain.draw)
        assert sorted(plan.index[~own]) == [40, 41, 43] and not plan.draw[~own].any()
    places = [np.flatnonzero(plan.index >= 40).tolist() for plan in plans]
    assert len(set(map(tuple, places))) == 3
    np.testing.assert_array_equal(order(0, 1).index, plans[1].index)
    with pytest.raises(UserError, match="rows cannot be added to an order that fixes its batches"):
        orders.joined(orders.grouped(np.array([0, 0, 1])), np.array([3]))(0, 0)


def test_a_sampling_order_draws_from_the_training_rows_alone(monkeypatch):
    seen = []
    plain = toy.made(order=lambda own: seen.append(own) or orders.weighted(np.ones(len(own)), rows=own))
    data = with_rows(plain.data, plain.data.pseudo(soft()), np.arange(30), toy.RECIPES["default"])
    plan = data.order(np.concatenate([np.flatnonzero(plain.data.folds != 0), np.arange(120, 150)]))(0, 0)
    assert seen[0].max() < 120 and len(plan.index) == 80 + 30 and plan.draw.any()


# Which rows.


def test_confidence_is_the_expected_part_of_right_decisions():
    classes = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    torch.testing.assert_close(confidence(classes), torch.tensor([0.7, 0.4]))
    labels = torch.tensor([[0.9, 0.2], [0.5, 0.6]])
    torch.testing.assert_close(confidence(labels), torch.tensor([0.85, 0.55]))
    one = torch.tensor([0.1, 0.8])
    torch.testing.assert_close(confidence(one), torch.tensor([0.9, 0.8]))
    torch.testing.assert_close(confidence(one[:, None]), torch.tensor([0.9, 0.8]))
    for what in (torch.tensor([[1.5]]), {"pixels": labels}):
        with pytest.raises(UserError, match="--pseudo-min needs probabilities, and the predictions are"):
            choose(what, 0.5)
    assert choose({"pixels": labels}, 0.0).tolist() == [0, 1]


def test_pseudo_min_leaves_the_unsure_rows_out():
    toy_train("a", **LAST)
    largest = predicted("a", 0).amax(1)
    least = float(largest.median())
    task = joined(0, pseudo="a", pseudo_min=round(least, 3))
    expected = np.flatnonzero(largest.numpy() >= round(least, 3))
    assert 5 < len(expected) < 25
    np.testing.assert_array_equal(task.data.train.rows, expected)
    assert f"{len(expected)} of 30 test rows join" in Path("student/log.txt").read_text()


def test_targets_take_the_form_of_soft_ones():
    hot = as_soft(torch.tensor([2, 0]), torch.zeros(1, 3))
    assert hot.tolist() == [[0, 0, 1], [1, 0, 0]] and hot.dtype == torch.float32
    assert as_soft(torch.tensor([[[1]], [[0]]]), torch.zeros(1, 2, 1, 1)).shape == (2, 2, 1, 1), "classes of pixels"
    assert as_soft(torch.tensor([1, 0]), torch.zeros(1)).tolist() == [1.0, 0.0], "of a single label"
    tree = {"labels": torch.tensor([[1, 0]], dtype=torch.uint8), "count": torch.tensor([[1.0]])}
    found = as_soft(tree, {"count": torch.zeros(1, 1), "labels": torch.zeros(1, 2)})
    assert found["labels"].tolist() == [[1.0, 0.0]] and found["labels"].dtype == torch.float32
    for targets, like in (
        (torch.zeros(2, 4), torch.zeros(1, 3)),
        (tree, torch.zeros(1, 2)),
        (tree, {"labels": torch.zeros(1, 2)}),
    ):
        with pytest.raises(UserError, match="expected the same shape, or class numbers"):
            as_soft(targets, like)


# Kills.


class Killed(BaseException):
    """As abrupt as a signal: nothing in the kit catches it."""


@pytest.mark.parametrize("step", [0, 3, 9, 24])
def test_killed_it_goes_on_to_the_same_bits(step, monkeypatch):
    """Eight steps per epoch: killed before the first step, inside an epoch, or in the second fold."""
    toy_train("teacher", fold="all", epochs=1)
    changes = {"fold": "all", "epochs": 2, "save_every": 0, "pseudo": "teacher", "pseudo_weight": 0.5}
    straight = toy_train("straight", **changes)
    original, steps = Engine.step, []

    def stopping(self, batch, number):
        if len(steps) == step:
            raise Killed
        steps.append(number)
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopping)
        with pytest.raises(Killed):
            toy_train("broken", **changes)
    assert list(Path("runs/toy/broken").rglob("pseudo.pt"))
    assert same(straight, toy_train("broken", **changes))
    assert not list(Path("runs/toy").rglob("pseudo.pt")), "of a fold that is trained nobody needs them"


def test_a_fold_that_began_goes_on_without_the_earlier_run(monkeypatch):
    toy_train("teacher")
    straight = toy_train("straight", pseudo="teacher", save_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            toy_train("broken", pseudo="teacher", save_every=0)
    shutil.rmtree("runs/toy/teacher")
    assert same(straight, toy_train("broken", pseudo="teacher", save_every=0))


def test_it_does_not_go_on_with_another_run_of_the_same_name(monkeypatch):
    toy_train("teacher", epochs=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Engine, "step", lambda *_: (_ for _ in ()).throw(Killed()))
        toy_train("student", pseudo="teacher")
    shutil.rmtree("runs/toy/teacher")
    toy_train("teacher", epochs=2)
    with pytest.raises(
        UserError, match="student was started differently .run teacher was started anew since.: RESUME=1"
    ):
        toy_train("student", pseudo="teacher")


def test_the_other_processes_get_the_labels_of_the_first(monkeypatch):
    class Second:
        is_writer = False

        def broadcast(self, value):
            assert value is None
            return soft()

    config = replace(toy.RECIPES["default"], pseudo="elsewhere")
    pseudo = Pseudo(toy.TOY, raw.find("toy", None, toy.write_demo, str), toy.made(config), config, {})
    task = pseudo.join(Run(Path("nowhere"), {}, is_writer=False), 0, Second())
    assert torch.equal(task.data.train.test.targets, soft()) and not Path("nowhere").exists()


def test_pseudo_labels_reach_the_weights_and_the_settings_tell_of_them():
    one = toy_train("teacher")
    other = toy_train("student", pseudo="teacher")
    assert not torch.equal(weights(one)["fold-0/0.weight"], weights(other)["fold-0/0.weight"])
    assert '"pseudo": "teacher"' in (other / "config.json").read_text()
    with pytest.raises(UserError, match="started differently .*pseudo: teacher -> "):
        train.train(toy.TOY, toy.RECIPES["default"], "default", None, "student")
