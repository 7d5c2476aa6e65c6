"""What an engine cannot train: it is refused when the engine is made."""

import inspect

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from common.errors import UserError

PARALLEL = (nn.SyncBatchNorm, nn.parallel.DistributedDataParallel, nn.DataParallel)


def check_model(model: nn.Module) -> None:
    """Raise UserError for a model without parameters, or with some that only its first forward pass makes.

    The latter would differ between processes. Also for modules that communicate between processes: if one of these runs
    out of memory, the others would wait for it for ever.
    """
    if next(model.parameters(), None) is None:
        raise UserError(f"the model, a {type(model).__name__}, has no parameters: there is nothing to train")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UserError(
                f"the model's {name} has no shape before the first forward pass: call model(inputs) once, with a few "
                "rows, before the engine and the optimizer are made; or name the sizes, nn.Linear for nn.LazyLinear"
            )
    for name, module in model.named_modules():
        if isinstance(module, PARALLEL):
            raise UserError(
                f"the model's {name or 'outermost module'} is a {type(module).__name__}: give the engine the plain "
                "module, it sums the gradients of all processes itself"
            )


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for an optimizer whose step evaluates the loss itself, again and again."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{type(optimizer).__name__}.step needs a closure that evaluates the loss again, and a batch that is "
            "added up gives one gradient: take another optimizer, such as torch.optim.AdamW"
        )
