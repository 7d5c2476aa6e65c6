"""A weighted sum of losses of any kinds, exact however the batch is cut into micro-batches."""

import torch
from torch import Tensor, nn

from common.batch import Tree, tensors_of
from common.errors import UserError
from common.losses.protocol import (
    Kind,
    Loss,
    batch_value,
    check_per_sample,
    columns_of,
    kind,
    linear_value,
    mass_of,
)

KINDS: tuple[Kind, ...] = ("per_sample", "sums", "whole_batch")  # from the least demanding to the most


class Combined(nn.Module):
    """sum_p c_p times the batch value of part p. Build it with `Heads` or `Weighted`.

    Its kind is the most demanding kind of its parts. Every part keeps its own normaliser (a column), because losses
    with different masses have no common one. A "per_sample" combination has the columns c_p l_p and m_p. One over
    "sums" has the statistics of all parts side by side, where those of a per-sample part are its l_p. A "whole_batch"
    combination evaluates every part on all outputs.
    """

    def __init__(self, parts: list[tuple[str | None, Loss, float]]):
        super().__init__()
        if not parts:
            raise UserError("a combination of no losses: give it at least one")
        self.parts = [(key, loss, float(coefficient)) for key, loss, coefficient in parts]
        self.held = nn.ModuleList(loss for _, loss, _ in self.parts if isinstance(loss, nn.Module))
        self.kind = KINDS[max(KINDS.index(kind(loss)) for _, loss, _ in self.parts)]
        self.columns = sum(columns_of(loss) for _, loss, _ in self.parts)
        self.layout: list[torch.Size] = []  # shape of every part's statistics, without B

    def forward(self, outputs: Tree, targets: Tree, weights: Tensor | None = None) -> Tensor:
        """[B] or [B, columns] when every part is per sample, else the batch value itself."""
        if self.kind != "per_sample":
            return sum(c * batch_value(loss, *_read(key, outputs, targets), weights) for key, loss, c in self.parts)
        found = self._statistics(outputs, targets)
        return self._columns([c * values for (_, _, c), values in zip(self.parts, found, strict=True)])

    def mass(self, targets: Tree) -> Tensor:
        """What every sample adds to the normaliser of every column, [B] or [B, columns]."""
        return self._columns([mass_of(loss, _pick(key, targets, "targets")) for key, loss, _ in self.parts])

    def stats(self, outputs: Tree, targets: Tree) -> Tensor:
        """The statistics of all parts side by side. [B, n]"""
        found = self._statistics(outputs, targets)
        self.layout = [part.shape[1:] for part in found]
        return torch.cat([part.reshape(len(part), part.shape[1:].numel()) for part in found], 1)

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        counts = count.reshape(-1).split([columns_of(loss) for _, loss, _ in self.parts])
        pieces = sums.split([shape.numel() for shape in self.layout])
        total = sums.new_zeros(())
        for (_, loss, coefficient), piece, shape, count in zip(self.parts, pieces, self.layout, counts, strict=True):
            piece, count = piece.reshape(shape), count[0] if columns_of(loss) == 1 else count
            if kind(loss) == "sums":
                total = total + coefficient * loss.value(piece, count)
            else:
                total = total + coefficient * linear_value(piece[None], None, count)
        return total

    def _statistics(self, outputs: Tree, targets: Tree) -> list[Tensor]:
        """The statistics of every part; those of a per-sample part are its values."""
        found = []
        for key, loss, _ in self.parts:
            out, target = _read(key, outputs, targets)
            if kind(loss) == "sums":
                found.append(loss.stats(out, target))
            else:
                found.append(check_per_sample(loss(out, target), len(tensors_of(target)[0]), loss))
        return found

    def _columns(self, values: list[Tensor]) -> Tensor:
        if self.columns == 1:
            return values[0]
        return torch.cat([(value.flatten(1) if value.ndim > 1 else value[:, None]) for value in values], 1)


def Heads(parts: dict[str, Loss | tuple[Loss, float]]) -> Combined:
    """A loss per output of the model: `Heads({"pixels": (BCE(), 1.0), "classes": (Focal(), 0.5)})`.

    Part "pixels" sees outputs["pixels"] and targets["pixels"]. A coefficient left out is 1.
    """
    return Combined([(key, *(part if isinstance(part, tuple) else (part, 1.0))) for key, part in parts.items()])


def Weighted(*parts: tuple[Loss, float]) -> Combined:
    """Several losses of the same outputs and targets: `Weighted((BCE(), 0.75), (Dice(), 0.25))`."""
    return Combined([(None, loss, coefficient) for loss, coefficient in parts])


def _read(key: str | None, outputs: Tree, targets: Tree) -> tuple[Tree, Tree]:
    return _pick(key, outputs, "outputs"), _pick(key, targets, "targets")


def _pick(key: str | None, tree: Tree, name: str) -> Tree:
    if key is None:
        return tree
    if not isinstance(tree, dict) or key not in tree:
        has = f"keys {sorted(tree)}" if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise UserError(f"the loss has a head {key!r} but the {name} are {has}: use the same names in both")
    return tree[key]
