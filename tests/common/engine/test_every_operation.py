"""Out of memory at any operation of a step before its update: the repeated step has the exact gradient."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.batch import Batch
from common.engine import memory
from common.losses import SoftFBeta, Weighted
from tests.common.engine.toys import (
    CLASSES,
    LOSSES,
    ScaledEntropy,
    cross_entropy,
    make_batch,
    make_engine,
    parameters_of,
    reference,
    relative_error,
)


class FailsAt(TorchDispatchMode):
    """Counts operations, and raises out of memory at operation number `at`."""

    def __init__(self, at: int | None = None):
        super().__init__()
        self.at, self.count, self.ended = at, 0, False

    def end(self) -> None:
        """Stop counting: after the failure no other operation fails."""
        self.ended = True
        super().__exit__(None, None, None)

    def __exit__(self, *error) -> None:
        if not self.ended:
            super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        self.count += 1
        if self.count - 1 == self.at:
            raise torch.OutOfMemoryError(f"CUDA out of memory, in {operation}")
        return operation(*inputs, **(named or {}))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        self.count += 1
        return inputs


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 3), Counter(), nn.Tanh(), nn.Linear(3, CLASSES)).double()


def hot(batch: Batch) -> Batch:
    return Batch(batch.inputs, nn.functional.one_hot(batch.targets, CLASSES).double(), batch.index, batch.weights)


KINDS = {name: (make, lambda batch: batch) for name, make in LOSSES.items()} | {
    "columns": (lambda: Weighted((ScaledEntropy(), 0.5), (cross_entropy, 2.0)), lambda batch: batch),
    "shipped sums": (lambda: SoftFBeta(1.0, "macro"), hot),
}


WAYS = {"whole": ("auto", False, False), "cut, weighted": (3, True, False), "as on a card": ("auto", False, True)}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_failed_anywhere_is_exact_in_the_end(name, way, monkeypatch):
    make, change = KINDS[name]
    micro_batch, weighted, ahead = WAYS[way]
    if ahead and name not in ("cross-entropy", "whole batch"):
        return  # on a GPU only operations after the gradient differ
    batch, loss, model = change(make_batch(6, weighted)), make(), small_model()
    _, expected = reference(model, loss, batch)
    found = []

    def attempt(at: int | None) -> int:
        model[1].count.zero_()
        engine = make_engine(model, loss, micro_batch=micro_batch, clip_norm=1e9)
        if ahead:
            engine.run_ahead()
        engine.optimizer.step = lambda: found.append([parameter.grad for parameter in parameters_of(model, loss)])
        failing = FailsAt(at)
        monkeypatch.setattr(memory, "release", failing.end)
        with failing:
            engine.step(batch, 0)
        if at is not None:
            cut = len(memory.sizes(6, engine.micro_batch))
            assert engine.limited and int(model[1].count) == cut, f"operation {at}"
        return failing.count

    operations = attempt(None) - ahead  # if ahead, the last operation copies the outcome of the finished step
    for at in range(operations):
        attempt(at)
    assert len(found) == operations + 1
    assert max(relative_error(torch.cat([g.flatten() for g in one]), expected) for one in found) <= 1e-12
