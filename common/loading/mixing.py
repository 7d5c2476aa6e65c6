"""Blends the two samples of a pair, 2k and 2k + 1 of a batch: the same blends for any number of processes.

The loader passes the keys of the pairs (both samples of a pair have one key), so every draw below is one per pair.
A sample whose partner is missing is its own partner and stays as it is.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from common.batch import Batch, Tree, map_tree, rebuilt, tensors_of
from common.errors import UserError
from common.loading.keys import MIX_STREAM, Keys
from common.loading.transfer import to_device


@dataclass(frozen=True)
class MixUp:
    """x = l x + (1 - l) x', the same for the targets, l from Beta(alpha, alpha) (Zhang et al., ICLR 2018).

    `probability` is the part of the pairs that is blended; `classes` turns integer targets [B] into one-hot rows
    [B, classes]. Images stay uint8, rounded; targets become float32. Integer targets without it raise UserError.
    """

    alpha: float = 0.4
    probability: float = 1.0
    classes: int | None = None

    def __call__(self, inputs: Tree, targets: Tree, partner: Tensor, keys: Keys, stream: int) -> tuple[Tree, Tree]:
        """`partner` [B] holds the row of every sample's partner, `keys` the key of every sample's pair."""
        part = _own_part(partner, keys, stream, self)
        for tensor in tensors_of(inputs):
            names = tensor.ndim == 1 and not tensor.is_floating_point()
            if names or (tensor.ndim == 2 and tensor.dtype == torch.int64):
                raise UserError(
                    f"MixUp cannot blend an input {list(tensor.shape)} of {tensor.dtype}, numbers of classes or words: "
                    "blend in the model, or give the loader images alone"
                )
        targets = map_tree(lambda tensor: _as_amounts(tensor, self.classes), targets)
        return map_tree(lambda tensor: _blend(tensor, partner, part), (inputs, targets))


@dataclass(frozen=True)
class CutMix:
    """Pastes a box with the share 1 - l of the partner's image, l from Beta(alpha, alpha) (Yun et al., ICCV 2019).

    The box is pasted in all tensors of the images' size [B, ..., H, W], also in masks among the targets. Other targets
    are blended by the area of the box inside the image. The other arguments are MixUp's.
    """

    alpha: float = 1.0
    probability: float = 1.0
    classes: int | None = None

    def __call__(self, inputs: Tree, targets: Tree, partner: Tensor, keys: Keys, stream: int) -> tuple[Tree, Tree]:
        """`partner` [B] holds the row of every sample's partner, `keys` the key of every sample's pair."""
        sizes = {tuple(tensor.shape[-2:]) if tensor.ndim >= 4 else None for tensor in tensors_of(inputs)}
        if len(sizes) != 1 or None in sizes:
            raise UserError(f"CutMix needs images [B, C, H, W] of one size as inputs, found {sizes}: use MixUp")
        size = np.array(sizes.pop())
        centre = keys.uniform((2,), stream + 2) * size  # [B, 2]
        half = np.sqrt(1 - _own_part(partner, keys, stream, self))[:, None] * size / 2
        first = np.rint(centre - half).clip(0, None)
        last = np.minimum(np.rint(centre + half), size)
        left = 1 - (last - first).prod(1) / size.prod()
        # Only the edges are copied to the device: a mask of every pixel would be as large as the images.
        edges = to_device(np.stack([first, last], 1).astype(np.float32), tensors_of(inputs)[0].device)
        rows, columns = (
            (places >= edges[:, 0, axis, None]) & (places < edges[:, 1, axis, None])
            for axis, places in enumerate(torch.arange(side, device=edges.device) for side in size.tolist())
        )  # [B, H] and [B, W]
        inside = rows[:, :, None] & columns[:, None, :]

        def paste(tensor: Tensor) -> Tensor:
            mask = inside.reshape(len(inside), *[1] * (tensor.ndim - 3), *size)
            return torch.where(mask, tensor[to_device(partner, tensor.device)], tensor)

        def mix_target(tensor: Tensor) -> Tensor:
            if tensor.ndim >= 3 and tuple(tensor.shape[-2:]) == tuple(size):
                return paste(tensor)
            return _blend(_as_amounts(tensor, self.classes), partner, left)

        return map_tree(paste, inputs), map_tree(mix_target, targets)


@dataclass(frozen=True)
class OneOf:
    """One of two mixes for every pair, each for half of them."""

    first: MixUp | CutMix
    second: MixUp | CutMix

    def __call__(self, inputs: Tree, targets: Tree, partner: Tensor, keys: Keys, stream: int) -> tuple[Tree, Tree]:
        """`partner` [B] holds the row of every sample's partner, `keys` the key of every sample's pair."""
        chosen = keys.uniform(stream=stream + 3) < 0.5  # the mixes draw from the three streams before
        found, other = (mix(inputs, targets, partner, keys, stream) for mix in (self.first, self.second))

        def choose(one: Tensor, another: Tensor) -> Tensor:
            rows = to_device(chosen.reshape(len(one), *[1] * (one.ndim - 1)), one.device)
            return torch.where(rows, one, another)

        return rebuilt(found, map(choose, tensors_of(found), tensors_of(other)))


def mix_pairs(mix: MixUp | CutMix | OneOf, batch: Batch, place: np.ndarray, seed: int) -> Batch:
    """The batch with its pairs blended; sample weights are blended like targets.

    `place` [B] holds the positions of its samples in the batch over all ranks.
    """
    local = {position: row for row, position in enumerate(place.tolist())}
    partner = [local.get(position ^ 1, row) for position, row in local.items()]  # alone: a pair with itself
    keys = Keys(seed, batch.epoch, place // 2, batch.number)
    weights = None if batch.weights is None else batch.weights.float()
    inputs, (targets, weights) = mix(batch.inputs, (batch.targets, weights), torch.tensor(partner), keys, MIX_STREAM)
    return replace(batch, inputs=inputs, targets=targets, weights=weights)


def _own_part(partner: Tensor, keys: Keys, stream: int, mix: MixUp | CutMix) -> np.ndarray:
    """The share of itself that every sample keeps, float64 [B]: l of its pair, or 1 where nothing is blended."""
    if not mix.alpha > 0:
        raise UserError(f"{mix}: expected an alpha above 0; to blend nothing, leave out Data.mix")
    part = betaincinv(mix.alpha, mix.alpha, keys.uniform(stream=stream))  # by inversion: one draw a pair
    alone = partner.numpy() == np.arange(len(partner))
    part[alone | (keys.uniform(stream=stream + 1) >= mix.probability)] = 1
    return part


def _as_amounts(target: Tensor, classes: int | None) -> Tensor:
    """Targets that can be blended: float32, one-hot where they were class numbers [B]."""
    if target.is_floating_point():
        return target if target.itemsize > 2 else target.float()
    if target.ndim == 1 and classes is not None:
        if target.device.type == "cpu" and len(outside := target[(target < 0) | (target >= classes)]):
            raise UserError(f"a target of class {outside[0]} cannot be blended: the mix expects 0 to {classes - 1}")
        return torch.nn.functional.one_hot(target.long(), classes).float()
    if target.ndim == 1 and target.dtype != torch.bool:
        raise UserError(
            "class numbers [B] cannot be blended: give the mix the number of classes, as in MixUp(classes=10)"
        )
    return target.float()


def _blend(tensor: Tensor, partner: Tensor, part: np.ndarray) -> Tensor:
    """part x + (1 - part) x[partner] in the tensor's own type; integers are rounded."""
    weight = to_device(part.astype(np.float32), tensor.device).reshape(len(tensor), *[1] * (tensor.ndim - 1))
    own = tensor if tensor.is_floating_point() else tensor.float()
    mixed = own * weight + own[to_device(partner, tensor.device)] * (1 - weight)
    mixed = torch.where(weight == 1, own, mixed)  # 1 x + 0 x' is not x where x' is infinite
    return (mixed if tensor.is_floating_point() else mixed.round()).to(tensor.dtype)
