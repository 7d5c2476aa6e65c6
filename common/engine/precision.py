"""Low precision: autocast around the forward pass alone, float32 from the loss on, and the loss scale of fp16."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.batch import Tree, map_tree

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_FACTOR = 2.0**-14  # of the loss scale: gradients of a billion would overflow with it


def forward_in(precision: str, model: nn.Module, device_type: str) -> Callable[[Tree], Tree]:
    """The model's forward pass computed in `precision`, with outputs in float32 (float64 stays)."""
    if precision == "fp32":
        return model

    def forward(inputs: Tree) -> Tree:
        # A region per call: autocast keeps the weights that it has cast until the region ends, and those cast in a
        # pass without gradients would have none in the next.
        with torch.autocast(device_type, dtype=DTYPES[precision]):
            outputs = model(inputs)
        return map_tree(full_precision, outputs)

    return forward


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

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault. With a small factor it is the gradient's own: NaN for ever."""
        return self.enabled and self.factor > SMALLEST_FACTOR

    def update(self, overflow: bool) -> None:
        """After every step of fp16 training."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.factor /= 2
        elif self.good_steps == self.growth_steps:
            self.factor, self.good_steps = self.factor * 2, 0
