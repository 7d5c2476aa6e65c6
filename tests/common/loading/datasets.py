"""Datasets that draw from generators of every kind, in a module that spawned workers can import."""

import hashlib
import random

import albumentations as A
import numpy as np
import torch

from common.batch import Batch, tensors_of
from common.errors import BadImage
from tests.common.loading import noises

ROWS = 23


class Everything:
    """Four-channel images and masks through a nested pipeline, and a number from each kind of generator."""

    def __init__(self):
        inner = A.Compose(
            [A.OneOf([A.GaussNoise(p=1), A.Affine(rotate=(-45, 45), p=1)], p=0.9), A.HorizontalFlip(p=0.5)]
        )
        self.steps = {"pipeline": A.Compose([inner, A.VerticalFlip(p=0.5)], seed=1)}
        self.generators = [np.random.default_rng(0), (random.Random(0),), np.random.RandomState(0)]
        self.torch_generator = torch.Generator()
        self.philox = np.random.Generator(np.random.Philox(0))
        self.weights = np.linspace(0.5, 2, ROWS)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int):
        image = np.arange(8 * 8 * 4, dtype=np.uint8).reshape(8, 8, 4) ^ np.uint8(index)
        changed = self.steps["pipeline"](image=image, mask=image[..., :2])
        numpy_generator, (python_generator,), old_generator = self.generators
        numbers = [
            numpy_generator.random(),
            python_generator.random(),
            old_generator.normal(),
            self.philox.random(),
            random.random(),
            np.random.rand(),
            torch.rand(()).item(),
            torch.rand((), generator=self.torch_generator).item(),
        ]
        mask = changed["mask"].copy()
        mask.setflags(write=False)
        return {"image": changed["image"], "numbers": np.array(numbers)}, (mask, index)


class Numbers:
    """Returns the first two numbers of each row's own generator."""

    def __init__(self, rows: int = 64):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def sample(self, index: int, rng: np.random.Generator):
        return rng.random(2), index


class Holey(Numbers):
    """`bad` rows cannot be read."""

    def __init__(self, rows: int, bad: set[int]):
        super().__init__(rows)
        self.bad = bad

    def sample(self, index: int, rng: np.random.Generator):
        if index in self.bad:
            raise BadImage(f"image-{index}.jpg", "is truncated")
        return super().sample(index, rng)


class Batches:
    """Returns whole batches of keyed numbers, not single samples."""

    def __len__(self) -> int:
        return 64

    def batch(self, indices, keys):
        return {"uniform": keys.uniform((3,)), "normal": torch.from_numpy(keys.normal())}, torch.from_numpy(indices)


class MakesItsOwn(Numbers):
    def sample(self, index: int, rng: np.random.Generator):
        return np.random.default_rng().random(2), index


class HoldsSystemRandom(Numbers):
    def __init__(self):
        super().__init__()
        self.parts = {"noise": [None, random.SystemRandom()]}


MODULE_GENERATOR = np.random.default_rng(0)


class UsesModuleGenerator(Numbers):
    def sample(self, index: int, rng: np.random.Generator):
        return MODULE_GENERATOR.random(2), index


class CallsModule(Numbers):
    def sample(self, index: int, rng: np.random.Generator):
        return noises.noise(), index


class ImportsInside(Numbers):
    def sample(self, index: int, rng: np.random.Generator):
        from tests.common.loading.noises import noise

        return noise(), index


class HoldsMethod(Numbers):
    def __init__(self):
        super().__init__()
        self.draw = random.Random(0).random

    def sample(self, index: int, rng: np.random.Generator):
        return np.array([self.draw(), self.draw()]), index


class MakesItsOwnLater(Numbers):
    def sample(self, index: int, rng: np.random.Generator):
        return np.random.default_rng().random() if index == 5 else 0.0, index


class HoldsClosure(Numbers):
    def __init__(self):
        super().__init__()
        generator = random.Random(0)

        def noise():
            return generator.random()

        self.noise = noise

    def sample(self, index: int, rng: np.random.Generator):
        return np.array([self.noise(), self.noise()]), index


def digest(*batches: Batch) -> str:
    """sha256 of the contents of several batches, concatenated as if they were one batch."""
    found = hashlib.sha256()
    trees = [tensors_of((w.inputs, w.targets, w.index, *([] if w.weights is None else [w.weights]))) for w in batches]
    for parts in zip(*trees, strict=True):
        joined = torch.cat(parts)
        found.update(f"{joined.dtype} {tuple(joined.shape)}".encode())
        found.update(joined.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
