"""The random generators that a step may draw from: torch's, and those of `random` and `np.random`."""

import random

import numpy as np
import torch

from common.loading.keys import keyed_seed


class Generators:
    """Seeds the generators by (seed, step, rank), so that every pass over a batch draws the same numbers.

    Seeding `random` and `np.random` takes as long as a tiny network's step. It is done in the steps that `new_batch`
    is asked to watch, and in all steps once the model or the loss has drawn from them.
    """

    def __init__(self, seed: int, rank: int, device: torch.device):
        self._first, self._device, self._step = keyed_seed(seed, rank), device, 0
        self.drawn = False  # whether the model or the loss has drawn from Python's generators
        self._watching = False
        self._before: tuple | None = None  # the states of Python's generators before they were seeded

    def new_batch(self, step: int, watch: bool) -> None:
        """Declare that the next passes are those of another step."""
        self._step, self._watching, self._before = step, watch or self.drawn, None

    def begin_pass(self) -> None:
        self.seed_torch(self._step)
        if self._watching:
            self._before = self._before or (random.getstate(), np.random.get_state())
            self._seed_python()

    def end_batch(self) -> None:
        """Note whether Python's generators were drawn from, and put back their states."""
        if self._before is None:
            return
        if not self.drawn:
            found = _states()
            self._seed_python()
            self.drawn = found != _states()
        random.setstate(self._before[0])
        np.random.set_state(self._before[1])

    def seed_torch(self, step: int) -> None:
        """Seed torch's generators for the step, as at the beginning of every pass."""
        seed = self._seed_of(step)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times longer
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(seed)
        elif self._device.type == "mps":
            torch.mps.manual_seed(seed)

    def _seed_python(self) -> None:
        seed = self._seed_of(self._step)
        random.seed(seed)
        np.random.seed(seed)

    def _seed_of(self, step: int) -> int:
        return int(self._first + step) % 2**32  # torch's CPU generator takes no more bits


def _states() -> tuple:
    """The states of the generators of `random` and `np.random`, which can be compared."""
    _, words, *rest = np.random.get_state()
    return random.getstate(), words.tobytes(), rest
