"""Optimizers: parameter groups with their own learning rate and weight decay, and state allocated in advance."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError


def laid_out_like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` as a gradient of `parameter`, with the same memory layout.

    The fused kernels ignore strides: a contiguous gradient of a channels_last weight would update the wrong elements,
    on a CPU without an error. backward() matches the layout itself; gradients that are assigned by hand need this.
    """
    return torch.empty_like(parameter, requires_grad=False).copy_(values)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Put every trainable parameter into exactly one group, by learning rate and by whether it has weight decay.

    `lr_scales` maps the name of a module (`encoder`, `encoder.layer1`) to a factor on its learning rate. The longest
    name that matches a parameter counts, and 0 freezes it. Vectors and scalars (biases, normalisation) get no decay.
    Raises UserError for a name that matches no parameter, and if no parameter is trainable.
    """
    scales = dict(lr_scales or {})
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():  # lists a parameter shared by two modules once
        if not parameter.requires_grad:
            continue
        fitting = [prefix for prefix in scales if name == prefix or name.startswith(prefix.removesuffix(".") + ".")]
        used.update(fitting)
        scale = scales[max(fitting, key=len)] if fitting else 1.0
        groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise UserError("no parameter of the model is trainable: set requires_grad of what is to be trained")
    for prefix in scales.keys() - used:
        modules = [name for name, _ in model.named_modules() if name]
        near = difflib.get_close_matches(prefix, modules, n=3, cutoff=0.0)
        raise UserError(f"lr_scales names {prefix!r}, which has no trainable parameter: expected one of {near}")
    return [
        {"params": parameters, "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0}
        for (scale, decays), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, config: Any, lr_scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of `config` (.optimizer, .lr, .weight_decay, .momentum) over the model's parameter groups.

    adamw and radam use decoupled weight decay (Loshchilov and Hutter, 2019); sgd and adam add weight_decay * weight to
    the gradient, as in their papers. `momentum` is Nesterov momentum for sgd and beta1 for the others. The fused
    kernels read every weight once; on small models they halve the time of the update.
    """
    groups = parameter_groups(model, config.lr, config.weight_decay, lr_scales)
    betas = (config.momentum, 0.999)
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(
                groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
            )
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, betas=betas, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
        case "radam":
            return torch.optim.RAdam(groups, lr=config.lr, betas=betas, decoupled_weight_decay=True)
    raise UserError(f"--optimizer {config.optimizer}: expected sgd, adam, adamw or radam")


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate moments and counters now, so that the first update cannot run out of memory.

    It takes a step with learning rate 0 and gradient 0, which changes no weight, and resets the counters to 0.
    """
    kept = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
