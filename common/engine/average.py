"""Averages of the weights over the steps, and BatchNorm statistics that belong to them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.batch import Tree, map_tree, tensors_of


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a shared one once; the model's own tensors, not copies."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


class Average:
    """The mean of a model's weights over the steps: exponential with `decay`, or of equal weights with None.

    Step t of T counts decay^(T-t), divided by the sum of these: the first step is not the initial weights' but its
    own, so no warm-up is needed. BatchNorm's running statistics are averaged alike, integers copied.
    """

    def __init__(self, model: nn.Module, decay: float | None):
        self.decay, self.updates = decay, 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights in; once per optimizer step."""
        self.updates += 1
        share = 1 / self.updates if self.decay is None else (1 - self.decay) / (1 - self.decay**self.updates)
        current = named_tensors(model)
        floating = [name for name, tensor in current.items() if tensor.is_floating_point() or tensor.is_complex()]
        torch._foreach_lerp_([self.tensors[name] for name in floating], [current[name] for name in floating], share)
        if counts := list(current.keys() - set(floating)):
            torch._foreach_copy_([self.tensors[name] for name in counts], [current[name] for name in counts])

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in the model, for the time of the block; nothing is copied."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, tensor in named_tensors(model).items():
            tensor.data, self.tensors[name].data = self.tensors[name].data, tensor.data

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, inputs: Iterable[Tree]) -> None:
    """Set BatchNorm's running statistics to those of the model's present weights, over batches of inputs.

    Forward passes only; the mean over samples, whatever the sizes of the batches. Everything but BatchNorm stays in
    evaluation mode: what it will see then has no dropout either.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    was_training = {module: module.training for module in model.modules()}
    momenta = [module.momentum for module in norms]
    model.eval()
    for module in norms:
        module.reset_running_stats()
        module.train()
    device, seen = next(model.parameters()).device, 0
    for batch in inputs:
        size = len(tensors_of(batch)[0])
        seen += size
        for module in norms:
            module.momentum = size / seen
        model(map_tree(lambda x: x.to(device, non_blocking=True), batch))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    for module, training in was_training.items():
        module.training = training
