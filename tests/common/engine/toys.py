"""Shared by the tests of the engine: small models, losses of each kind, and a simulated lack of memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batch import Batch
from common.engine.step import Engine
from common.losses.protocol import batch_value, whole_batch

CLASSES = 6


def make_model(*extra: nn.Module, seed: int = 0) -> nn.Module:
    """A float64 network 20-48-6; `extra` modules follow the first layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 48), *extra, nn.Tanh(), nn.Linear(48, CLASSES)).double()


def make_batch(count: int, weighted: bool = False, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 20, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, CLASSES, (count,), generator=generator)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
    return Batch(inputs, targets, torch.arange(count), weights)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


class ScaledEntropy(nn.Module):
    """A per-sample loss with a learnt temperature, and class weights as the mass of each sample."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.register_buffer("class_weights", torch.arange(1.0, CLASSES + 1, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.log_scale.exp(), targets, self.class_weights, reduction="none")

    def mass(self, targets: Tensor) -> Tensor:
        return self.class_weights[targets]


class SoftF1:
    """1 - mean over classes of 2 TP / (predicted + true): 12 sums."""

    def stats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        chosen, true = outputs.softmax(1), F.one_hot(targets, CLASSES).to(outputs)
        return torch.stack([chosen * true, chosen + true], -1)

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        return 1 - (2 * sums[..., 0] / sums[..., 1]).mean()


class RootMeanSquare:
    """A loss over one sum, which takes one pass."""

    def stats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - F.one_hot(targets, CLASSES)) ** 2).mean(1)

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        return (sums / count).sqrt()


class Contrast(nn.Module):
    """A whole-batch loss over all pairs of samples, with a learnt temperature."""

    whole_batch = True

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        unit = F.normalize(outputs, dim=1)
        weights = torch.ones_like(unit[:, 0]) if weights is None else weights
        pairs = F.cross_entropy(unit @ unit.T * self.log_scale.exp(), targets % len(targets), reduction="none")
        return (pairs * weights).sum() / weights.sum()


LOSSES: dict[str, Callable] = {
    "cross-entropy": lambda: cross_entropy,
    "per sample with parameters": ScaledEntropy,
    "sums": SoftF1,
    "one sum": RootMeanSquare,
    "whole batch with parameters": Contrast,
    "whole batch": lambda: whole_batch(
        lambda outputs, targets, weights: (outputs * (weights[:, None] if weights is not None else 1)).logsumexp((0, 1))
    ),
}


def parameters_of(model: nn.Module, loss: object) -> list[Tensor]:
    return [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]


def gradient_of(model: nn.Module, loss: object) -> Tensor:
    """All gradients in one vector; a missing one raises."""
    return torch.cat([parameter.grad.flatten() for parameter in parameters_of(model, loss)]).clone()


def reference(model: nn.Module, loss: object, batch: Batch) -> tuple[Tensor, Tensor]:
    """Value and gradient of the batch in one graph."""
    for parameter in parameters_of(model, loss):
        parameter.grad = None
    value = batch_value(loss, model(batch.inputs), batch.targets, batch.weights)
    value.backward()
    return value.detach(), gradient_of(model, loss)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def silent(message: str) -> None:
    """A log that nobody reads."""


def make_engine(model: nn.Module, loss: object, lr: float = 0.1, **settings) -> Engine:
    optimizer = torch.optim.SGD(parameters_of(model, loss), lr=lr)
    return Engine(model, loss, optimizer, **{"log": silent} | settings)


class FullMemory(torch.autograd.Function):
    """Identity that calls `check(rows)` in the backward pass."""

    @staticmethod
    def forward(context, inputs, check):
        context.check = check
        return inputs.clone()

    @staticmethod
    def backward(context, gradient):
        context.check(len(gradient))
        return gradient, None


class SmallMemory(nn.Module):
    """Raises `error` in this `phase` at a micro-batch of more than `limit` rows, after letting `at` of them pass."""

    def __init__(self, limit: int, phase: str = "forward", at: int = 0, error: Exception | None = None):
        super().__init__()
        self.limit, self.phase, self.at, self.calls = limit, phase, at, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def check(self, rows: int) -> None:
        if rows > self.limit:
            self.calls += 1
            if self.calls > self.at:
                self.calls = 0
                raise self.error

    def forward(self, inputs: Tensor) -> Tensor:
        if self.phase == "forward":
            self.check(len(inputs))
            return inputs
        return FullMemory.apply(inputs, self.check) if torch.is_grad_enabled() else inputs
