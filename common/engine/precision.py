"""Low precision: autocast around the forward pass alone, float32 from the loss on, and the loss scale of fp16."""

import torch
from torch import Tensor, nn

from common.window import Tree, map_tree

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def forward(model: nn.Module, inputs: Tree, precision: str, device_type: str) -> Tree:
    """The model's outputs in float32 (float64 stays), computed in `precision`.

    A region per call: autocast keeps the weights that it has cast until the region ends, and those cast in a pass
    without gradients would have none in the next.
    """
    if precision == "fp32":
        return model(inputs)
    with torch.autocast(device_type, dtype=DTYPES[precision]):
        outputs = model(inputs)
    return map_tree(full_precision, outputs)


def full_precision(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.is_floating_point() and outputs.itemsize < 4 else outputs


class LossScale:
    """The factor that keeps small fp16 gradients from vanishing: the rule of torch.amp.GradScaler, without its sync.

    The engine looks at the norm of the gradient anyway; not finite means an overflow: this step is left out and the
    factor halved. It doubles after 2000 steps without one. Always a power of two, so scaling rounds nothing.
    """

    def __init__(self, precision: str, growth_steps: int = 2000):
        self.enabled, self.growth_steps = precision == "fp16", growth_steps
        self.factor = 2.0**16 if self.enabled else 1.0
        self.good_steps = 0

    def unscale_(self, gradients: list[Tensor]) -> None:
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1 / self.factor)

    def update(self, overflow: bool) -> None:
        """After every step of fp16 training."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.factor /= 2
        elif self.good_steps == self.growth_steps:
            self.factor, self.good_steps = self.factor * 2, 0
