"""What changes how a model is computed, but not what: activation checkpointing and torch.compile."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from common.errors import UserError


def prepare(
    model: nn.Module, checkpointing: bool = False, compiled: bool = False, log: Callable[[str], Any] = print
) -> None:
    """Apply --checkpointing and --compile to the model in place; its parameters keep their names."""
    if checkpointing:
        names = enable_checkpointing(model)
        what = f"{len(names)} blocks keep their inputs only" if names else "the model's own way"
        log(f"checkpointing: {what}")
    if compiled:
        model.compile()


def enable_checkpointing(model: nn.Module) -> list[str]:
    """Recompute activations in the backward pass: their memory falls to about its square root, time rises by a third.

    The gradient stays the same, dropout included. Takes the model's own way (timm's `set_grad_checkpointing`) where it
    has one and no BatchNorm, whose statistics that way would move twice; else every module of up to sqrt(number of
    layers) layers keeps its inputs only, and as many layers in a row of a longer nn.Sequential (Chen et al., "Training
    deep nets with sublinear memory cost", 2016). Returns the names of what was wrapped, nothing for the model's own
    way; raises UserError when there is nothing to wrap.
    """
    if hasattr(model, "set_grad_checkpointing") and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        try:
            model.set_grad_checkpointing(True)
            return []
        except (AssertionError, NotImplementedError):  # timm's models have the method even where it is not supported
            model.set_grad_checkpointing(False)
    largest = max(2, math.isqrt(_layers(model)))
    names = []
    for name, module in list(_blocks(model, "", largest)):
        names += _wrap_runs(name, module, largest) if _layers(module) > largest else _wrap(name, module)
    if not names:
        raise UserError(
            f"--checkpointing finds no block of 2 to {largest} layers in {type(model).__name__}: give its forward pass "
            f"modules of that size, or train without"
        )
    return names


def _layers(module: nn.Module) -> int:
    return sum(not list(part.children()) for part in module.modules())


def _blocks(module: nn.Module, name: str, largest: int) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of 2 to `largest` layers, and every longer nn.Sequential.

    Lists and dicts of modules have no forward pass of their own.
    """
    if type(module) is nn.Sequential:
        yield name, module
    for child_name, child in module.named_children():
        path, layers = f"{name}.{child_name}".lstrip("."), _layers(child)
        if 2 <= layers <= largest and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield path, child
        elif layers > 1:
            yield from _blocks(child, path, largest)


def _wrap_runs(name: str, sequential: nn.Sequential, largest: int) -> list[str]:
    """Wrap up to `largest` single layers in a row at a time; larger members are blocks, or have them inside."""
    names, steps, run = [], [], []
    members = [*sequential.named_children(), ("", None)]
    for place, (_, member) in enumerate(members):
        if run and (member is None or _layers(member) > 1 or len(run) == largest):
            step = run[0] if len(run) == 1 else nn.Sequential(*run)
            if len(run) > 1:
                if getattr(run[0], "inplace", False):
                    run[0].inplace = False  # what it would overwrite is the input that is kept
                names += _wrap(f"{name}[{place - len(run)}:{place}]", step)
            steps.append(step)
            run = []
        if member is not None and _layers(member) > 1:
            steps.append(member)
        elif member is not None:
            run.append(member)

    def forward(outputs: Any) -> Any:
        for step in steps:
            outputs = step(outputs)
        return outputs

    if names:
        sequential.forward = forward
    return names


def _wrap(name: str, module: nn.Module) -> list[str]:
    original = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*inputs, **named)
        contexts = {"context_fn": lambda: (nullcontext(), _unchanged_buffers(module))}
        return checkpoint(original, *inputs, use_reentrant=False, **contexts, **named)

    module.forward = forward
    return [name]


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
