import random
import sys
from collections import deque
from functools import partial
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.loading import orders
from common.loading.binding import Binding, _parts, held_generators, kept_global_state
from common.loading.loader import Loader
from tests.common.loading import datasets, noises
from tests.common.loading.datasets import (
    CallsModule,
    Everything,
    HoldsClosure,
    HoldsMethod,
    HoldsSystemRandom,
    ImportsInside,
    MakesItsOwn,
    MakesItsOwnLater,
    UsesModuleGenerator,
)


class Holder:
    def __init__(self, **parts):
        self.__dict__.update(parts)


class Slotted:
    __slots__ = ("rng",)

    def __init__(self):
        self.rng = random.Random(0)


class Draws:
    shared = np.random.default_rng(0)  # an attribute of the class

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def noise(self):
        return self.rng.random()


def paths(**parts):
    return {path for path, _ in held_generators(Holder(**parts))}


def test_generators_are_found_wherever_they_hide():
    rng = np.random.default_rng(0)
    assert paths(rng=rng) == {"dataset.rng"}
    assert paths(parts=[1, {"noise": (None, rng)}]) == {"dataset.parts[1]['noise'][1]"}
    assert paths(inner=Holder(deep=Holder(rng=torch.Generator()))) == {"dataset.inner.deep.rng"}
    assert paths(noise=lambda: rng.random()) == {"dataset.noise:rng"}
    assert paths(noise=partial(np.add, rng.random)) == {"dataset.noise.args[0]"}
    assert paths(draw=rng.random) == paths(draw=random.Random(0).random) == {"dataset.draw"}
    assert paths(recent=deque([rng])) == {"dataset.recent[0]"}
    assert paths(noise=Draws().noise) == {"dataset.noise.rng", "dataset.noise.shared"}
    assert paths(inner=Slotted()) == {"dataset.inner.rng"}
    assert paths(old=np.random.RandomState(0), words=np.array([random.Random(0)])) == {
        "dataset.old",
        "dataset.words[0]",
    }
    assert {path for path, _ in held_generators(UsesModuleGenerator())} == {f"{datasets.__name__}.MODULE_GENERATOR"}
    for dataset in (CallsModule(), ImportsInside()):
        assert {path for path, _ in held_generators(dataset)} == {f"{noises.__name__}.GENERATOR"}
    subset = torch.utils.data.Subset(Holder(rng=rng), [0])
    assert {path for path, _ in held_generators(subset)} == {"dataset.dataset.rng"}


class NamesAttributes:
    """Has attributes with the names of an imported module and of that module's generator."""

    noises, GENERATOR = "loud", 1

    def volume(self):
        return self.noises, self.GENERATOR


def test_attributes_are_not_taken_for_modules():
    sys.modules["noises"] = noises
    try:
        assert held_generators(NamesAttributes()) == []
    finally:
        del sys.modules["noises"]


def test_what_is_no_generator_is_not_found():
    cycle = Holder(
        random=random,
        numpy=np.random,
        name="rng",
        kind=random.Random,
        data=np.zeros(3),
        tensor=torch.zeros(3),
        paths=["a.jpg"] * 1000,
        globals_=[random.seed.__self__, torch.default_generator],
    )
    cycle.itself = cycle
    assert held_generators(cycle) == []


def test_paths_are_not_looked_into(monkeypatch):
    """Every loader searches its dataset for generators, and a dataset of images may hold very many paths."""
    looked = []
    monkeypatch.setattr("common.loading.binding._parts", lambda *given: looked.append(given) or _parts(*given))
    paths = [Path(f"{number}.jpg") for number in range(1000)]
    assert held_generators(Holder(paths=paths, rng=random.Random(0)))[0][0] == "dataset.rng" and len(looked) < 20


@pytest.mark.filterwarnings("ignore:Using lambda")
def test_a_transform_inside_of_a_transform_is_bound_with_its_functions():
    rng = random.Random(0)
    pipeline = A.Compose([A.Lambda(image=lambda image, **_: image + rng.random(), p=1), A.OneOf([A.HorizontalFlip()])])
    binding = Binding(Holder(pipeline=pipeline), seed=0)

    def draw():
        binding.rekey(0, 3)
        return pipeline(image=np.zeros((4, 4, 3), np.float32))["image"]

    np.testing.assert_array_equal(draw(), draw())
    assert pipeline.transforms[1].transforms[0].py_random is random.seed.__self__


GENERATORS = [
    random.Random(0),
    torch.Generator(),
    np.random.RandomState(0),
    np.random.RandomState(np.random.MT19937(0)),
    *(
        np.random.Generator(kind(0))
        for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64, np.random.MT19937)
    ),
]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda generator: repr(generator).split(" at 0x")[0].strip("<"))
def test_every_kind_of_generator_restarts(generator):
    def draw(index):
        binding.rekey(1, index)
        if isinstance(generator, torch.Generator):
            return torch.randn(5, generator=generator).tolist()
        if isinstance(generator, random.Random):
            return [generator.gauss(0, 1) for _ in range(5)]  # an odd number leaves one of a pair behind
        narrow = (
            generator.integers(9, size=3, dtype=np.uint32)
            if hasattr(generator, "integers")
            else generator.randint(9, size=3)
        )
        return [*generator.normal(size=5), *narrow]

    with kept_global_state():
        binding = Binding(Holder(rng=generator), seed=0)
        first, second, again = draw(1), draw(2), draw(1)
    assert first == again and first != second


def test_two_generators_of_a_sample_are_independent():
    holder = Holder(
        one=np.random.default_rng(0), two=np.random.default_rng(0), three=random.Random(0), four=random.Random(0)
    )
    with kept_global_state():
        binding = Binding(holder, seed=0)
        drawn = []
        for index in range(500):
            rng = binding.rekey(0, index)
            drawn.append(
                [
                    rng.random(),
                    holder.one.random(),
                    holder.two.random(),
                    holder.three.random(),
                    holder.four.random(),
                    random.random(),
                    np.random.rand(),
                    torch.rand(()).item(),
                ]
            )
    correlation = np.corrcoef(np.array(drawn).T) - np.eye(8)
    assert abs(correlation).max() < 0.15


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "dataset, path",
    [
        (HoldsSystemRandom(), r"^dataset.parts\['noise'\]\[1\] is a random.SystemRandom, which cannot be restarted"),
        (MakesItsOwn(), r"^row 0 of MakesItsOwn differs between two loads"),
        (MakesItsOwnLater(), r"^row 5 of MakesItsOwnLater differs between two loads"),
    ],
)
def test_what_cannot_be_bound_is_refused_by_name(dataset, path, workers):
    with (
        Loader(dataset, orders.sequential(64), 8, seed=0, workers=workers) as loader,
        pytest.raises(UserError, match=path),
    ):
        list(loader.epoch(0))


def test_a_batch_that_holds_a_generator_is_refused():
    dataset = datasets.Batches()
    dataset.rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="dataset.rng is a Generator, but batch"):
        Loader(dataset, orders.sequential(64), 8, seed=0)


class Drawing:
    """Returns `draw(size, indices, keys)` as its batches."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 64

    def batch(self, indices, keys):
        return self.draw(len(indices), indices, keys), torch.from_numpy(indices)


def flipped(size, indices, keys):
    from torchvision.transforms import v2

    return torch.stack([v2.RandomHorizontalFlip()(torch.arange(8)) for _ in range(size)])


UNKEYED = {
    "np.random": lambda size, indices, keys: np.random.rand(size),
    "random": lambda size, indices, keys: np.array([random.random() for _ in range(size)]),
    "torch.randn": lambda size, indices, keys: torch.randn(size),
    "torchvision v2": flipped,
    "fresh generator": lambda size, indices, keys: np.random.default_rng().random((size, 2)),
    "seeded by its first row": lambda size, indices, keys: np.random.default_rng(int(indices[0])).random(size),
    "a draw for the batch": lambda size, indices, keys: np.full(size, keys.uniform()[0]),
    "normalised over the batch": lambda size, indices, keys: keys.uniform() - keys.uniform(stream=1).mean(),
    "shuffled labels": lambda size, indices, keys: keys.index[::-1].copy(),
}


@pytest.mark.parametrize("kind", UNKEYED)
def test_batches_that_are_not_keyed_are_refused(kind):
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    loader = Loader(Drawing(UNKEYED[kind]), orders.shuffled(64), 8, seed=0)
    with pytest.raises(UserError, match="a batch of Drawing differs when it is loaded (twice|in two halves)"):
        next(loader.epoch(0))
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())


def test_rounding_is_not_taken_for_chance():
    table = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(300, 7, generator=torch.Generator().manual_seed(1))
    holes = torch.where(torch.arange(300) % 3 > 0, table, torch.nan)

    def draw(size, indices, keys):
        return {"product": table[indices] @ weight, "holes": holes[indices], "none": torch.zeros(size, 0)}

    loader = Loader(Drawing(draw), orders.shuffled(64), 7, seed=0)
    assert sum(map(len, loader.epoch(0))) == 64


@pytest.mark.parametrize(
    "dataset", [UsesModuleGenerator(), CallsModule(), ImportsInside(), HoldsMethod(), HoldsClosure()]
)
def test_hidden_generators_are_the_same_in_workers(dataset):
    def load(workers):
        with Loader(dataset, orders.sequential(64), 8, seed=0, workers=workers) as loader:
            return torch.cat([batch.inputs for batch in loader.epoch(0)])

    assert torch.equal(load(0), load(2))
    assert len(set(load(2)[:, 0].tolist())) == 64


def flips(rekey, count=400):
    """Whether each of three flips (horizontal, vertical, inverted colours) happened, [count, 3]."""
    pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.InvertImg(p=0.5)])
    image = np.repeat(np.array([[0, 1], [2, 3]], np.uint8)[:, :, None], 3, axis=2)
    restart, corner = rekey(pipeline), []
    for index in range(count):
        restart(index)
        corner.append(pipeline(image=image)["image"][0, 0, 0])
    corner = np.array(corner)
    inverted = corner > 127
    place = np.where(inverted, 255 - corner, corner)
    return np.stack([place & 1, place >> 1, inverted], 1)


def test_flips_are_independent_and_reach_all_outcomes():
    def ours(pipeline):
        binding = Binding(Holder(pipeline=pipeline), seed=0)
        return lambda index: binding.rekey(0, index)

    with kept_global_state():
        found = flips(ours)
    correlation = np.corrcoef(found.T) - np.eye(3)
    assert abs(correlation).max() < 0.1
    assert len(set(map(tuple, found))) == 8


def test_seeding_the_pipeline_itself_would_tie_its_flips_together():
    found = flips(lambda pipeline: pipeline.set_random_seed)
    assert np.corrcoef(found.T).min() > 0.99
    assert len(set(map(tuple, found))) == 2


def test_the_pipeline_of_everything_is_bound():
    assert {path for path, _ in held_generators(Everything())} >= {
        "dataset.steps['pipeline']",
        "dataset.generators[0]",
        "dataset.generators[1][0]",
        "dataset.generators[2]",
        "dataset.torch_generator",
        "dataset.philox",
    }
