"""Averages of the weights over the training steps, and BatchNorm statistics that match them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.batch import Tree, tensors_of


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; a shared tensor is listed once. They are no copies."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def places_of(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where modules hold the tensors of `named_tensors`, to look them up faster; [] if some are made on demand."""
    holders = [holder for module in model.modules() for holder in (module._parameters, module._buffers)]
    places = {id(tensor): (holder, name) for holder in holders for name, tensor in holder.items()}
    found = [places.get(id(tensor)) for tensor in named_tensors(model).values()]
    return [] if None in found else found


class Average:
    """The mean of a model's weights over the steps: an exponential moving average, or the plain mean with decay None.

    Step t of T has the share decay^(T-t), divided by the sum of all shares. The initial weights have none, so no
    warm-up is needed. BatchNorm's running statistics are averaged in the same way; integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float | None):
        self.decay, self.updates = decay, 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
        self._places = places_of(model)
        kinds = [tensor.is_floating_point() or tensor.is_complex() for tensor in self.tensors.values()]
        self._floating, self._counts = ([i for i, kind in enumerate(kinds) if kind == of] for of in (True, False))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's present weights to the average; call it once per optimizer step, with the same model."""
        self.updates += 1
        share = 1 / self.updates if self.decay is None else (1 - self.decay) / (1 - self.decay**self.updates)
        current = [holder[name] for holder, name in self._places] or list(named_tensors(model).values())
        means = list(self.tensors.values())
        torch._foreach_lerp_([means[i] for i in self._floating], [current[i] for i in self._floating], share)
        if self._counts:
            torch._foreach_copy_([means[i] for i in self._counts], [current[i] for i in self._counts])

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Put the averaged weights into the model inside the `with` block; nothing is copied."""
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
    """Compute BatchNorm's running statistics again, for the model's present weights, from batches on its device.

    It runs forward passes only, and weights each batch by its size. All modules but BatchNorm are in evaluation mode,
    because BatchNorm's inputs have no dropout at prediction time either.
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
    seen = 0
    for batch in inputs:
        size = len(tensors_of(batch)[0])
        seen += size
        for module in norms:
            module.momentum = size / seen
        model(batch)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    for module, training in was_training.items():
        module.training = training
