"""Mixed precision: autocast around the forward pass alone, float32 from the loss on, and the loss scale of fp16."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from common.batch import Tree, map_tree
from common.errors import UserError
from common.losses.protocol import full_precision

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_FACTOR = 2.0**-14  # of the loss scale: only gradients above a billion overflow with it


def best_precision(device: torch.device) -> Precision:
    """The hardware's fastest precision: bf16 where that is native, fp16 on Volta and Turing (T4), else fp32."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 lacks it
        return "bf16" if any(map(capabilities.get, ("avx512_bf16", "amx_bf16"))) else "fp32"
    if device.type != "cuda":
        return "fp32"
    generation, _ = torch.cuda.get_device_capability(device)  # torch.cuda.is_bf16_supported asks the current card
    if torch.version.hip or generation >= 8:
        return "bf16"
    return "fp16" if generation == 7 else "fp32"


def autocast(precision: Precision, device_type: str) -> AbstractContextManager:
    """A region in which the model computes in `precision`.

    Open a new region for every forward pass. Autocast caches the weights that it has cast until the region ends, and
    weights cast in a pass without gradients would get none in the next pass.
    """
    return nullcontext() if precision == "fp32" else torch.autocast(device_type, dtype=DTYPES[precision])


def to_float32(outputs: Tree) -> Tree:
    """A tree of outputs with its half-precision tensors in float32; float64 stays."""
    return map_tree(full_precision, outputs)


def forward_in(precision: Precision, model: nn.Module, device_type: str) -> Callable[[Tree], Tree]:
    """The model's forward pass computed in `precision`, with outputs in float32 (float64 stays)."""
    if precision == "fp32":
        return model
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r}: expected fp32, bf16 or fp16")

    def forward(inputs: Tree) -> Tree:
        with autocast(precision, device_type):
            outputs = model(inputs)
        return to_float32(outputs)

    return forward


class LossScale:
    """The factor that keeps small fp16 gradients from vanishing, with the update rule of torch.amp.GradScaler.

    A gradient that is not finite means an overflow: the step is skipped and the factor halved. After `growth_steps`
    without an overflow the factor doubles. It is always a power of two, so scaling does not round. The factor is kept
    on the device, where overflows are found too, so that no step waits for it. Without fp16 it is the number 1.
    """

    def __init__(self, precision: Precision, device: torch.device):
        self.enabled, self.growth_steps = precision == "fp16", 2000
        self.factor: Tensor | float = torch.tensor(2.0**16, device=device) if self.enabled else 1.0
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device) if self.enabled else 0
        self._found = torch.zeros((), device=device) if self.enabled else None

    def scaled(self, value: Tensor) -> Tensor:
        return value * self.factor if self.enabled else value

    def unscale_(self, gradients: list[Tensor]) -> None:
        if self.enabled:
            torch._foreach_mul_(gradients, 1 / self.factor)

    def update(self, overflow: Tensor | bool) -> None:
        """Call it after every step. `overflow` is a bool, or a float32 tensor of 1 or 0 on the device."""
        if self.enabled:
            found = overflow if isinstance(overflow, Tensor) else self._found.fill_(overflow)
            torch._amp_update_scale_(self.factor, self.good_steps, found, 2.0, 0.5, self.growth_steps)

    def state_dict(self) -> dict[str, float]:
        return {"loss_scale": float(self.factor), "good_steps": int(self.good_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.enabled:
            self.factor.fill_(state["loss_scale"])
            self.good_steps.fill_(state["good_steps"])
