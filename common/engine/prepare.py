"""What changes how a model is computed, but not what: activation checkpointing and torch.compile."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def prepare(model: nn.Module, checkpointing: bool = False, compiled: bool = False) -> None:
    """Apply --checkpointing and --compile to the model in place; its parameters keep their names."""
    if checkpointing:
        enable_checkpointing(model)
    if compiled:
        model.compile()


def enable_checkpointing(model: nn.Module) -> list[str]:
    """Recompute activations in the backward pass: their memory falls to about its square root, time rises by a third.

    The gradient stays the same, dropout included. Takes the model's own way (timm's `set_grad_checkpointing`) where it
    has one and no BatchNorm, whose statistics that way would move twice; else every module of up to sqrt(number of
    layers) layers keeps its inputs only (Chen et al., "Training deep nets with sublinear memory cost", 2016).
    Returns the names of the modules that were wrapped.
    """
    if hasattr(model, "set_grad_checkpointing") and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        try:
            model.set_grad_checkpointing(True)
            return []
        except (AssertionError, NotImplementedError):  # timm's models have the method even where it is not supported
            model.set_grad_checkpointing(False)
    return [name for name, module in _blocks(model, "", max(2, math.isqrt(_layers(model)))) if _wrap(module)]


def _layers(module: nn.Module) -> int:
    return sum(not list(part.children()) for part in module.modules())


def _blocks(module: nn.Module, name: str, largest: int) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of 2 to `largest` layers; lists and dicts of modules have no forward pass of their own."""
    for child_name, child in module.named_children():
        path, layers = f"{name}.{child_name}".lstrip("."), _layers(child)
        if 2 <= layers <= largest and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield path, child
        elif layers > 1:
            yield from _blocks(child, path, largest)


def _wrap(module: nn.Module) -> bool:
    original = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*inputs, **named)
        contexts = {"context_fn": lambda: (nullcontext(), _unchanged_buffers(module))}
        return checkpoint(original, *inputs, use_reentrant=False, **contexts, **named)

    module.forward = forward
    return True


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """BatchNorm's statistics have moved in the first computation: the second leaves them as they were."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in kept:
                buffer.copy_(copy)
