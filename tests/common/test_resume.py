"""A run that was stopped at any moment resumes, loses nothing and ends with the same bits."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from common.engine.step import Engine
from common.losses import CrossEntropy
from common.train import train
from tests.common import toy
from tests.common.toy_runs import same, toy_train, weights


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)


class Killed(BaseException):
    """As abrupt as a signal: nothing in the kit catches it."""


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("step", [1, 4, 5, 14])
def test_stopped_at_any_step_it_ends_with_the_same_bits(step, keep, monkeypatch):
    """Five batches per epoch: stopped inside an epoch, at its end, after a validation, or in the last epoch."""
    straight = toy_train("straight", keep=keep, save_every=0)
    original = Engine.step

    def stopping(self, batch, step_number):
        if step_number == step:
            raise Killed
        return original(self, batch, step_number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopping)
        with pytest.raises(Killed):
            toy_train("broken", keep=keep, save_every=0)
    assert same(straight, toy_train("broken", keep=keep, save_every=0))
    assert "resumed" in Path("runs/toy/broken/log.txt").read_text()


class RootOfMean:
    """sqrt of the mean cross-entropy: a loss over a single sum, which the engine detects in the first batch."""

    def stats(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    def value(self, sums, count):
        return (sums / count).sqrt()


@pytest.mark.parametrize("step", [2, 5, 6, 10, 13])
def test_losses_that_take_turns_go_on_with_the_same_bits(step, monkeypatch):
    """Five batches per epoch, and the losses alternate by epoch: stopped inside an epoch and at its end."""
    losses = (CrossEntropy(), RootOfMean())
    build = toy.build
    monkeypatch.setattr(toy, "build", lambda *of: toy.changed(build(*of), loss_of=lambda epoch: losses[epoch % 2]))
    changes = {"micro_batch": 4, "save_every": 0}
    straight = toy_train("straight", **changes)
    used, original = [], Engine.step

    def stopping(self, batch, step_number):
        if step_number == step and len(used) <= step:
            raise Killed
        used.append((step_number, type(self.passes.loss).__name__, self.passes.kind))
        return original(self, batch, step_number)

    monkeypatch.setattr(Engine, "step", stopping)
    with pytest.raises(Killed):
        toy_train("broken", **changes)
    used.append(None)
    assert same(straight, toy_train("broken", **changes))
    names = {0: ("CrossEntropy", "per_sample"), 1: ("RootOfMean", "sums")}
    assert [one for one in used if one] == [(number, *names[number // 5 % 2]) for number in range(15)]


def in_a_child(killed_at: Path | None = None, before: bool = True, **changes) -> tuple[int | None, list[Path]]:
    """Run toy_train in a process that SIGKILLs itself before or after it first replaces the file `killed_at`; returns
    the exit code and the files that were replaced."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        replace_file = os.replace

        def killing(source, target):
            sender.send(Path(target))
            if Path(target) == killed_at and before:
                os.kill(os.getpid(), signal.SIGKILL)
            replace_file(source, target)
            if Path(target) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = killing
        toy_train("broken", **changes)

    process = context.Process(target=child)
    process.start()
    sender.close()
    replaced = []
    with contextlib.suppress(EOFError):
        while True:
            replaced.append(receiver.recv())
    process.join()
    return process.exitcode, list(dict.fromkeys(replaced))


def test_sigkill_at_every_file_that_is_written_ends_with_the_same_bits(page, monkeypatch):
    """A real process is killed before or after it first writes each of its files: settings, weights, CSV ...

    The report's plots are replaced, because drawing them every time would take most of the test's time.
    """
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **how: file.write(b"a plot"))
    monkeypatch.setattr("common.report.without_markup", lambda figure: None)
    changes = {"fold": "all", "epochs": 2, "save_every": 0}
    straight = toy_train("straight", **changes)  # also imports modules that every child would import itself
    code, places = in_a_child(**changes)
    assert code == 0 and len(places) > 20
    shutil.rmtree("runs/toy/broken")
    names = {place.name for place in places}
    assert {
        "run.json",
        "last.pt",
        "best.pt",
        "model.pt",
        "fold.json",
        "oof.npy",
        "test.npy",
        "result.json",
        "report.html",
        "broken-demo.csv",
    } <= names
    for number, place in enumerate(places):
        code, _ = in_a_child(killed_at=place, before=number % 2 == 0, **changes)
        assert code in (0, -signal.SIGKILL), place  # 0: the file was written by an earlier child
    code, _ = in_a_child(**changes)
    assert code == 0 and same(straight, Path("runs/toy/broken"))


def test_stopped_after_the_training_the_same_command_only_predicts(page, monkeypatch):
    """Also without RUN=: a run counts as unfinished until its CSV is written, even if its training is complete."""
    config = toy.RECIPES["smoke"]
    reported = []
    whole = toy.build
    monkeypatch.setattr(
        toy, "build", lambda *given: toy.changed(whole(*given), report=lambda run, page: reported.append(run.name))
    )

    with monkeypatch.context() as patch:
        patch.setattr("common.train.write_submission", lambda *given: os._exit(9))
        command = (toy.TOY, config, "smoke")
        child = multiprocessing.get_context("fork").Process(target=train, args=command)
        child.start()
        child.join()
    assert child.exitcode == 9
    result = Path("runs/toy/001-smoke-demo/result.json").read_bytes()
    train(toy.TOY, config, "smoke")
    assert Path("submissions/toy/001-smoke-demo.csv").is_file() and not Path("runs/toy/002-smoke-demo").exists()
    assert Path("runs/toy/001-smoke-demo/result.json").read_bytes() == result
    assert len(reported) == 1, "a report that may be half a report is made again"
    train(toy.TOY, config, "smoke", None, "001-smoke-demo")
    assert len(reported) == 1
    train(toy.TOY, config, "smoke")
    assert Path("submissions/toy/002-smoke-demo.csv").is_file()


@pytest.mark.parametrize("epochs", [1, 3])
def test_stopped_after_the_last_checkpoint_the_metrics_are_whole(epochs, monkeypatch):
    losses, build = [CrossEntropy() for _ in range(epochs)], toy.build
    monkeypatch.setattr(toy, "build", lambda *of: toy.changed(build(*of), loss_of=lambda epoch: losses[epoch]))
    straight = toy_train("straight", epochs=epochs, save_every=0)
    from common.fit import Training

    original = Training._save_when_due

    def stopping(self):
        original(self)
        if self.state.epoch == epochs:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_save_when_due", stopping)
        with pytest.raises(Killed):
            toy_train("broken", epochs=epochs, save_every=0)
    assert same(straight, toy_train("broken", epochs=epochs, save_every=0))


class InUnitsOfItsMean(torch.nn.Module):
    """Cross-entropy divided by its moving mean: a loss with a state that training changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, outputs, targets):
        values = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * values.detach().mean()
        return values / self.mean


def drawn_elsewhere():
    """A network whose initial weights come from numpy's and Python's generators, as in older code."""
    model = torch.nn.Linear(16, 3)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(np.random.randn(3, 16) / 4))
        model.bias.copy_(torch.tensor([random.random() for _ in range(3)]))
    return model


def test_a_fold_begins_alike_in_every_process(monkeypatch):
    """A fold's initial weights and loss depend on no preflight step and on no fold trained earlier in the process."""
    build = toy.build
    monkeypatch.setattr(
        toy, "build", lambda *of: toy.changed(build(*of), loss=InUnitsOfItsMean(), model=drawn_elsewhere)
    )
    straight = toy_train("straight", fold="all")
    from common.fit import Training

    def stopping(self, original=Training.run_all):
        if self.fold == 1:
            raise Killed
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run_all", stopping)
        with pytest.raises(Killed):
            toy_train("broken", fold="all")
    assert same(straight, toy_train("broken", fold="all"))


def test_a_loss_learns_nothing_from_held_out_rows(monkeypatch):
    build = toy.build
    monkeypatch.setattr(toy, "build", lambda *of: toy.changed(build(*of), loss=InUnitsOfItsMean()))
    seldom, often = (weights(toy_train(f"every-{n}", evaluate_every=n, keep="last")) for n in (3, 1))
    assert all(torch.equal(seldom[name], often[name]) for name in seldom)


def test_what_killed_writers_left_is_removed():
    folder = Path("runs/toy/one/fold-0")
    folder.mkdir(parents=True)
    (folder / ".last.pt.123.part").write_bytes(b"half")
    toy_train()
    assert not list(folder.glob(".*.part"))
    (folder / "last.pt").write_bytes(b"old")  # killed after fold.json was written, before last.pt was removed
    Path("runs/toy/one/result.json").unlink()
    toy_train()
    assert not (folder / "last.pt").exists()


def test_the_seconds_of_an_epoch_before_a_kill_count(monkeypatch):
    from common import fit
    from common.engine.step import Engine

    clock = iter(range(10**6))
    monkeypatch.setattr(fit.time, "monotonic", lambda: float(next(clock)))
    straight = json.loads((toy_train("straight", save_every=0) / "result.json").read_text())["training_seconds"]
    original = Engine.step

    def stopping(self, batch, step_number):
        if step_number == 3:
            raise Killed
        return original(self, batch, step_number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopping)
        with pytest.raises(Killed):
            toy_train("broken", save_every=0)
    broken = json.loads((toy_train("broken", save_every=0) / "result.json").read_text())["training_seconds"]
    assert abs(broken - straight) <= 0.2 * straight
