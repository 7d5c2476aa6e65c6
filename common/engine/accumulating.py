"""Gradient accumulation for any training loop: an optimizer wrapper that updates once every few small batches."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.engine.checks import check_optimizer


class AccumulatingOptimizer(torch.optim.Optimizer):
    """Wraps any optimizer so that `accum_iters` calls of `step()` make one real update along their mean gradient.

    The training loop stays as it is: zero_grad, backward and step on every small batch. Moments, weight decay and step
    counts advance once per real update, as with one batch of all the samples. Call `flush()` after the last batch of
    an epoch, so that the remaining small batches make an update too. Call `step(weight=len(batch))` when the batch
    sizes differ. `updates` counts the real updates: step a scheduler only when it has changed.

    The mean of the small batches' gradients is the gradient of the whole batch only for losses that are means over
    samples; the engine (common.engine.step) has no such limit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, accum_iters: int):
        if accum_iters < 1:
            raise ValueError(f"accum_iters {accum_iters}: expected 1 or more small batches per update")
        check_optimizer(optimizer)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.accum_iters = optimizer, accum_iters
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.updates = 0
        self._start_over()

    def _start_over(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._count, self._weight = 0, 0.0

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self, closure: Callable[[], Any] | None = None, *, weight: float = 1.0) -> Any:
        """Add the gradient of a small batch; the last of `accum_iters` calls updates the weights. Returns closure()."""
        if not 0 < weight < math.inf:
            raise ValueError(f"weight {weight}: expected a number above 0, such as len(batch); leave empty batches out")
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        with torch.no_grad():
            for parameter in self._parameters():
                if parameter.grad is None:
                    continue
                if parameter in self._sums:
                    self._sums[parameter].add_(parameter.grad, alpha=weight)
                else:
                    self._sums[parameter] = parameter.grad * weight  # a copy: the loop may zero the gradient in place
        self._count += 1
        self._weight += weight
        if self._count == self.accum_iters:
            self.flush()
        return result

    @torch.no_grad()
    def flush(self) -> bool:
        """Update with the mean gradient of the batches since the last update; False if there were none.

        Every .grad is restored afterwards. Otherwise, in a loop that calls zero_grad after its step and not before
        backward, the next backward would add to the mean.
        """
        if not self._count:
            return False
        of_the_loop = [(parameter, parameter.grad) for parameter in self._parameters()]
        for parameter, _ in of_the_loop:
            total = self._sums.get(parameter)
            parameter.grad = None if total is None else total.div_(self._weight)
        self.optimizer.step()
        for parameter, gradient in of_the_loop:
            parameter.grad = gradient
        self.updates += 1
        self._start_over()
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        """Include the wrapped optimizer and the sums in copies and pickles; torch's own method leaves them out."""
        mine = ("optimizer", "accum_iters", "updates", "_sums", "_count", "_weight")
        return super().__getstate__() | {name: self.__dict__[name] for name in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; it may be called between the small batches of an update."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "sums": [self._sums.get(parameter) for parameter in self._parameters()],
            "count": self._count,
            "weight": self._weight,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        pairs = zip(self._parameters(), state["sums"], strict=True)
        self._sums = {parameter: total.to(parameter, copy=True) for parameter, total in pairs if total is not None}
        self._count, self._weight, self.updates = state["count"], state["weight"], state["updates"]
