"""The network: any backbone of timm, and up to three heads on its pooled features."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint
from common.errors import UserError
from common.vision.backbones import Normalize, timm_backbone

HEADS = ("labels", "embedding", "count")


class TagNet(nn.Module):
    """uint8 [B, 3, H, W] -> {"labels": logits [B, m], "embedding": [B, D], "count": [B, 1]}, for the given `heads`.

    `projections` [m, D] (zero rows for labels without a vector) are saved with the weights. Without a classifier the
    labels' logits are 8 times their products with the normalised output of the embedding head. With `frozen` only the
    heads are trained, and the backbone stays in evaluation mode, so that its BatchNorm statistics do not change.
    """

    def __init__(
        self,
        backbone: str,
        size: tuple[int, int],
        labels: int,
        heads: tuple[str, ...],
        projections: np.ndarray,
        prior: np.ndarray,
        dropout: float = 0.0,
        frozen: bool = False,
    ):
        super().__init__()
        self.normalize = Normalize(backbone)
        self.backbone, width = timm_backbone(backbone, size)
        self.frozen = frozen
        self.dropout = nn.Dropout(dropout)
        sizes = {"labels": labels, "embedding": projections.shape[1], "count": 1}
        self.heads = nn.ModuleDict({name: nn.Linear(width, sizes[name]) for name in heads})
        self.register_buffer("projections", torch.from_numpy(projections))
        if "labels" in heads:
            # Start from the frequency of every label, so that training need not first lower thousands of rare labels.
            with torch.no_grad():
                self.heads["labels"].weight.normal_(std=0.01)
                self.heads["labels"].bias.copy_(torch.logit(torch.from_numpy(prior).float(), eps=1e-5))
        if frozen:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "TagNet":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.dropout(self.backbone(self.normalize(images)))
        outputs = {name: head(features) for name, head in self.heads.items()}
        if "labels" not in outputs and not self.training:
            directions = F.normalize(outputs["embedding"].float(), dim=1)
            outputs["labels"] = 8 * directions @ self.projections.T
        return outputs


def take_weights(model: TagNet, file: Path) -> None:
    """Load the weights of another run's model; heads that this model does not have are dropped.

    Raises UserError for any other difference: another backbone, other labels, or a head that the other run lacks.
    """
    found = checkpoint.load(file)["model"]
    own = model.state_dict()
    dropped = tuple(f"heads.{name}." for name in HEADS if name not in model.heads)
    taken = {name: tensor for name, tensor in found.items() if not name.startswith(dropped)}
    taken["projections"] = own["projections"]
    for name in [*own, *taken]:
        if name not in own or name not in taken or own[name].shape != taken[name].shape:
            raise UserError(
                f"{file} holds another network (first difference: {name}): start from a run with the same "
                f"--backbone, labels and heads (for a transformer also --size)"
            )
    model.load_state_dict(taken)
