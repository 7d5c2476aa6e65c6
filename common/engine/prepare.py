"""Faster or smaller ways to compute the same model: checkpointing, torch.compile, float32 where bf16 is slow."""

import importlib.util
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import takewhile
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from common.engine.precision import Precision
from common.errors import UserError
from common.loading.binding import kept_global_state


def prepare(
    model: nn.Module,
    checkpointing: bool = False,
    compiled: bool = False,
    log: Callable[[str], Any] = print,
    precision: Precision = "fp32",
) -> None:
    """Apply --checkpointing, --compile and `train_depthwise_in_float32` in place; parameters keep their names."""
    if precision == "bf16" and not compiled and next(model.parameters()).device.type == "cpu":
        train_depthwise_in_float32(model)
    if checkpointing:
        names = enable_checkpointing(model)
        what = f"{len(names)} blocks keep only their inputs" if names else "the model's own"
        log(f"checkpointing: {what}")
    if compiled:
        model.compile()


def train_depthwise_in_float32(model: nn.Module) -> None:
    """Compute depthwise convolutions in float32 while a model trains in bf16 on a CPU.

    Their backward pass takes oneDNN three times as long in bf16 as in float32: more than half of an EfficientNet's
    step. All other layers stay in bf16.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            module.forward = _TrainedInFloat32(module)


def check_compile(device_type: str) -> None:
    """Raise UserError if this machine has no compiler for --compile; call it before a run is opened."""
    language, variable, usual = "C++", "CXX", ["g++", "clang++", "c++"]
    if device_type == "cuda":  # Triton builds its launchers in C
        language, variable, usual = "C", "CC", ["gcc", "clang", "cc"]
        if not importlib.util.find_spec("triton"):
            raise UserError(
                "--compile needs the package triton on a card: pip install triton, or train without --compile"
            )
    named = os.environ.get(variable)
    wanted = [named] if named else usual
    if not any(map(shutil.which, wanted)):
        raise UserError(
            f"--compile needs a {language} compiler and finds none of {', '.join(wanted)}: install one, "
            f"name it in {variable}, or train without --compile"
        )


def try_compile(device: torch.device) -> None:
    """Compile one addition; raises UserError if that fails: a compiler may lack headers, or a folder to write to."""
    try:
        torch.compile(_plus_one)(torch.zeros(2, device=device))
    except Exception as error:  # whatever torch, the compiler and the file system raise
        raise UserError(
            f"--compile does not work on this machine ({' '.join(str(error).split())[:400]}): mend that, or train "
            f"without --compile"
        ) from error


def _plus_one(x: Tensor) -> Tensor:
    return x + 1


def enable_checkpointing(model: nn.Module) -> list[str]:
    """Recompute activations in the backward pass: their memory falls to about its square root, time rises by a third.

    The gradient stays the same, dropout included. A model's own method (timm's `set_grad_checkpointing`) is used if the
    model has no BatchNorm, whose statistics it would update twice. Otherwise every module of up to sqrt(number
    of layers) layers keeps only its inputs, and so does every run of as many layers in a longer nn.Sequential (Chen et
    al., "Training deep nets with sublinear memory cost", 2016). Returns the names of the wrapped blocks, an empty list
    for the model's own method. Raises UserError if there is nothing to wrap.
    """
    if _checkpoints_itself(model):
        return []
    largest = max(2, math.isqrt(_layers(model)))
    names = []
    for name, module in list(_blocks(model, "", largest)):
        if _layers(module) > largest:
            names += _wrap_runs(name, module, largest)
        else:
            module.forward = _Recomputed(module)
            names.append(name)
    if not names:
        raise UserError(
            f"--checkpointing finds no block of 2 to {largest} layers in {type(model).__name__}: group its layers "
            f"into modules of that size, or train without it"
        )
    return names


def _checkpoints_itself(model: nn.Module) -> bool:
    """Turn on the model's own checkpointing if it may be used; return whether it is on."""
    if not hasattr(model, "set_grad_checkpointing") or any(isinstance(m, _BatchNorm) for m in model.modules()):
        return False
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:  # raised by timm's models that have the method and do not support it
        if "not supported" not in str(error):
            raise
    return any(getattr(module, "grad_checkpointing", False) for module in model.modules())  # python -O drops asserts


def _layers(module: nn.Module) -> int:
    return sum(not list(part.children()) for part in module.modules())


def _blocks(module: nn.Module, name: str, largest: int) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of 2 to `largest` layers, and every longer nn.Sequential.

    nn.ModuleList and nn.ModuleDict are only searched, because they have no forward pass.
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
    """Recompute runs of up to `largest` single layers in a row; larger members are blocks or contain some."""
    names, steps, members = [], [], list(sequential)
    start = 0
    while start < len(members):
        run = list(takewhile(lambda member: _layers(member) == 1, members[start : start + largest]))
        if len(run) > 1:
            block = nn.Sequential(*run)  # not registered in the model, whose parameters keep their names
            block.forward = _Recomputed(block)
            steps.append(block)
            names.append(f"{name}[{start}:{start + len(run)}]")
        else:
            steps.append(members[start])
        start += max(1, len(run))
    if names:
        sequential.forward = nn.Sequential(*steps).forward
    return names


# Objects instead of closures, so that in a copy or a pickle of the model they refer to its own modules. torch's
# checkpoint_wrapper would put another module around each block, which changes parameter names and module types.


@dataclass(eq=False)
class _TrainedInFloat32:
    module: nn.Conv2d

    def __call__(self, inputs: Tensor) -> Tensor:
        forward = MethodType(type(self.module).forward, self.module)
        if not self.module.training:
            return forward(inputs)
        with torch.autocast("cpu", enabled=False):
            return forward(inputs.float())


@dataclass(eq=False)
class _Recomputed:
    """The forward pass of a module that keeps only its inputs and is computed again in the backward pass."""

    module: nn.Module
    writes: bool | None = None  # whether the module changes its inputs in place; None before its first call

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        forward = MethodType(type(self.module).forward, self.module)
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        count, names, values = len(inputs), list(named), (*inputs, *named.values())
        kept = [_kept(value, self.writes is not False) for value in values]
        before = [value._version for value in values if isinstance(value, Tensor)]
        buffers, drawn = _Buffers(self.module), (random.getstate(), np.random.get_state())
        given = [(inputs, named)]  # for the first computation, which may change them as without checkpointing

        def run(*kept: Any) -> Any:
            again = kept[:count], dict(zip(names, kept[count:], strict=True))
            inputs, named = given.pop() if given else again
            return forward(*inputs, **named)

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), _once_more(buffers, *drawn)

        outputs = checkpoint(run, *kept, use_reentrant=False, context_fn=contexts)
        buffers.keep_changed()
        if self.writes is None:  # if it changes its inputs only later, torch raises: a saved tensor was modified
            self.writes = before != [value._version for value in values if isinstance(value, Tensor)]
        return outputs


def _kept(value: Any, is_written: bool) -> Any:
    """An input as it is now: a list or dict of its own, since DenseNet's grows later, a copy of a tensor `is_written`.

    The tensor itself if a copy has other strides, for which kernels may save other tensors.
    """
    if isinstance(value, (list, dict)):
        return copy(value)
    if not isinstance(value, Tensor) or not is_written:
        return value
    other = value.clone()
    return other if other.stride() == value.stride() else value


class _Buffers:
    """A module's buffers before its first computation, from which a repetition starts.

    Only those are kept that the first computation changes, such as a moving centre. BatchNorm's statistics hide their
    changes, but its gradient does not depend on them.
    """

    def __init__(self, module: nn.Module):
        self._owners = [part._buffers for part in module.modules()]
        found = [(owner, name, x) for owner in self._owners for name, x in owner.items() if x is not None]
        self._kept = [(owner, name, x, x._version, x.clone()) for owner, name, x in found]

    def keep_changed(self) -> None:
        """Call it after the first computation."""
        self._kept = [
            (owner, name, x, version, value)
            for owner, name, x, version, value in self._kept
            if owner.get(name) is not x or x._version != version
        ]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Inside the block the module works on copies: its own buffers are not updated twice, nor written to."""
        of_now = [dict(owner) for owner in self._owners]
        try:
            for owner in self._owners:
                owner.update({name: x.clone() for name, x in owner.items() if x is not None})
            for owner, name, _, _, value in self._kept:
                owner[name] = value.clone()
            yield
        finally:
            for owner, buffers in zip(self._owners, of_now, strict=True):
                owner.clear()
                owner.update(buffers)


@contextmanager
def _once_more(buffers: _Buffers, state: tuple, numpy_state: tuple) -> Iterator[None]:
    """Repeat the first computation's random numbers, from the buffers that it started from."""
    with buffers.as_before(), kept_global_state():
        random.setstate(state)
        np.random.set_state(numpy_state)
        yield
