import os
import random
import signal
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.loading import orders
from common.loading.collate import collate
from common.loading.loader import Loader
from common.loading.mixing import MixUp
from tests.common.loading.datasets import ROWS, Batches, Everything, Holey, Numbers, digest

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores
SIZE = 3  # 23 rows make 7 batches of 3 and one of 2: work for 8 workers


def digests(dataset, epoch=0, starts=(0,), order=None, **settings):
    """For each first batch in `starts`, the digests of the batches from it on, each with all ranks' shares joined."""
    world = settings.pop("world", 1)
    order = order or orders.shuffled(len(dataset))
    loaders = [Loader(dataset, order, SIZE, seed=5, rank=rank, world=world, **settings) for rank in range(world)]
    found = [
        [digest(*shards) for shards in zip(*(loader.epoch(epoch, start) for loader in loaders), strict=True)]
        for start in starts
    ]
    for loader in loaders:
        loader.close()
    return found


@pytest.fixture(scope="module")
def expected():
    return [digests(Everything(), epoch)[0] for epoch in range(2)]


@pytest.mark.parametrize(
    "workers, start_method, world",
    [
        (0, None, 1),
        (0, None, 2),
        (0, None, 4),
        (1, "fork", 1),
        (2, "fork", 1),
        (8, "fork", 1),
        (1, "fork", 4),
        (2, "fork", 2),
        (2, "fork", 4),
        (2, "spawn", 1),
    ],
)
def test_batches_are_the_same_for_any_workers_ranks_and_restart(workers, start_method, world, expected):
    starts = range(len(expected[0]))
    found = digests(Everything(), 1, starts, workers=workers, start_method=start_method, world=world)
    assert found == [expected[1][start:] for start in starts]


def test_epochs_and_seeds_differ(expected):
    assert not set(expected[0]) & set(expected[1])
    other = Loader(Everything(), orders.shuffled(ROWS), SIZE, seed=6)
    assert not set(expected[0]) & {digest(batch) for batch in other.epoch(0)}


@settings(max_examples=25)
@given(
    st.integers(0, 2**63),
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([1, 2, 3, 4]),
    st.data(),
)
def test_ranks_and_restarts_for_any_seed_epoch_and_size(seed, epoch, rows, size, world, data):
    dataset, order = Numbers(rows), orders.weighted(np.arange(1.0, rows + 1), 2 * rows)
    mix = MixUp(0.4, probability=0.7, classes=rows)
    whole = Loader(dataset, order, size, seed=seed, mix=mix)
    expected = [digest(batch) for batch in whole.epoch(epoch)]
    assert len(expected) == whole.batches_per_epoch
    start = data.draw(st.integers(0, len(expected)))
    shards = [Loader(dataset, order, size, seed=seed, rank=rank, world=world, mix=mix) for rank in range(world)]
    found = list(zip(*(loader.epoch(epoch, start) for loader in shards), strict=True))
    assert [digest(*parts) for parts in found] == expected[start:]
    assert all(sum(map(len, parts)) == parts[0].total for parts in found)


@settings(max_examples=4)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(0, 3))
def test_workers_for_any_seed(seed, workers, start):
    expected = [digest(w) for w in Loader(Everything(), orders.shuffled(ROWS), SIZE, seed=seed).epoch(3, start)]
    with Loader(Everything(), orders.shuffled(ROWS), SIZE, seed=seed, workers=workers) as loader:
        for _ in loader.epoch(2):
            break  # an epoch that is left early must not affect the next one
        assert [digest(w) for w in loader.epoch(3, start)] == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Everything(), Batches()])
def test_the_random_state_of_the_training_is_untouched(workers, dataset):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with Loader(dataset, orders.shuffled(len(dataset)), SIZE, seed=0, workers=workers) as loader:
        for _ in loader.epoch(0):
            after = random.getstate(), np.random.get_state(), torch.get_rng_state()
            assert after[0] == before[0] and torch.equal(after[2], before[2])
            assert all(np.array_equal(a, b) for a, b in zip(after[1], before[1], strict=True))


def test_four_workers_draw_distinct_numbers_in_every_epoch():
    with Loader(Everything(), orders.weighted(np.ones(ROWS), 64), 4, seed=0, workers=4) as loader:
        epochs = [torch.cat([batch.inputs["numbers"] for batch in loader.epoch(epoch)]) for epoch in range(2)]
    for column in range(epochs[0].shape[1]):
        values = [set(epoch[:, column].tolist()) for epoch in epochs]
        assert min(map(len, values)) >= 60
        assert not values[0] & values[1]


def test_batches_are_the_same_for_any_batching_and_rank():
    def rows(size, **settings):
        found = {}
        for batch in Loader(Batches(), orders.shuffled(64), size, seed=1, **settings).epoch(2):
            for index, uniform, normal in zip(batch.index.tolist(), *batch.inputs.values(), strict=True):
                found[index] = (*uniform.tolist(), normal.item())
        return found

    whole = rows(64)
    assert rows(5) == whole and len(set(whole.values())) == 64
    assert rows(7, rank=0, world=2) | rows(7, rank=1, world=2) == whole
    assert digests(Batches(), world=4) == digests(Batches())


def test_two_epochs_at_once_share_no_workers():
    with Loader(Numbers(16), orders.sequential(16), 4, seed=0) as loader:
        pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
        assert [(one.epoch, two.epoch, one.number) for one, two in pairs] == [(0, 1, number) for number in range(4)]
    with Loader(Numbers(16), orders.sequential(16), 4, seed=0, workers=2) as loader:
        left_early, other = loader.epoch(0), loader.epoch(1)
        next(left_early)
        assert [batch.number for batch in other] == [0, 1, 2, 3]
        with pytest.raises(RuntimeError, match="after another had begun"):
            next(left_early)


def test_skipped_batches_are_not_loaded():
    class Counting(Numbers):
        def __init__(self):
            super().__init__(40)
            self.loaded = set()

        def sample(self, index, rng):
            self.loaded.add(index)
            return super().sample(index, rng)

    dataset = Counting()
    batches = list(Loader(dataset, orders.sequential(40), 8, seed=0).epoch(0, start=3))
    assert [batch.number for batch in batches] == [3, 4]
    assert dataset.loaded == set(range(24, 40))


def test_batches_carry_types_weights_and_places():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the masks are read-only arrays
        batches = list(Loader(Everything(), orders.sequential(ROWS), SIZE, seed=0).epoch(1))
    first, last = batches[0], batches[-1]
    assert first.inputs["image"].dtype == torch.uint8 and first.inputs["image"].shape == (3, 8, 8, 4)
    assert first.inputs["numbers"].dtype == torch.float64
    assert first.targets[0].shape == (3, 8, 8, 2) and first.targets[1].tolist() == first.index.tolist()
    assert (last.epoch, last.number, last.total, len(last)) == (1, 7, 2, 2)
    np.testing.assert_array_equal(last.weights, Everything().weights[last.index])


@pytest.mark.parametrize("workers, world", [(0, 1), (2, 1), (0, 2), (1, 3)])
def test_bad_images_are_left_out_and_listed(workers, world):
    bad = {0, 7, 8, 9}
    clean = Loader(Numbers(20), orders.shuffled(20), 6, seed=0)
    shards = [
        Loader(
            Holey(20, bad), orders.shuffled(20), 6, seed=0, workers=workers, rank=rank, world=world, bad_images="skip"
        )
        for rank in range(world)
    ]
    batches = zip(clean.epoch(0), *(loader.epoch(0) for loader in shards), strict=True)
    for whole, *parts in batches:
        kept = torch.tensor([row not in bad for row in whole.index.tolist()])
        found = torch.cat([part.inputs for part in parts])
        assert torch.equal(found, whole.inputs[kept])
        assert torch.cat([part.index for part in parts]).tolist() == whole.index[kept].tolist()
        if world == 1:
            assert parts[0].total == len(parts[0])
    assert sorted(row for loader in shards for row in loader.skipped) == sorted(bad)
    assert "image-7.jpg (row 7) is truncated" in next(x.skipped[7] for x in shards if 7 in x.skipped)
    for loader in shards:
        loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_the_epoch_by_name(workers):
    loader = Loader(Holey(20, {13}), orders.sequential(20), 6, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"^image image-13.jpg \(row 13\) is truncated: .*--bad-images skip"), loader:
        list(loader.epoch(0))


def test_a_batch_without_any_readable_image_is_left_out():
    loader = Loader(Holey(20, {6, 7, 8, 9, 10, 11}), orders.sequential(20), 6, seed=0, bad_images="skip")
    assert [(batch.number, len(batch)) for batch in loader.epoch(0)] == [(0, 6), (2, 6), (3, 2)]
    assert sorted(loader.skipped) == [6, 7, 8, 9, 10, 11]


def test_a_pair_with_a_bad_half_is_left_unmixed_for_any_ranks():
    mix = MixUp(0.5, classes=20)
    clean = next(Loader(Holey(20, {4}), orders.sequential(20), 8, seed=0, bad_images="skip").epoch(0))
    mixed = next(Loader(Holey(20, {4}), orders.sequential(20), 8, seed=0, bad_images="skip", mix=mix).epoch(0))
    assert mixed.index.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(mixed.inputs[4], clean.inputs[4]) and (mixed.inputs != clean.inputs).all(1).sum() == 6
    parts = [
        next(
            Loader(
                Holey(20, {4}), orders.sequential(20), 8, seed=0, bad_images="skip", mix=mix, rank=rank, world=2
            ).epoch(0)
        )
        for rank in range(2)
    ]
    assert digest(*parts) == digest(mixed)


def test_empty_shares_have_the_shapes_of_a_sample():
    batches = [
        list(Loader(Everything(), orders.sequential(ROWS), 21, seed=0, rank=rank, world=4).epoch(0))[-1]
        for rank in range(4)
    ]  # two samples for four ranks
    assert [len(batch) for batch in batches] == [0, 0, 0, 2]
    assert batches[0].inputs["image"].shape == (0, 8, 8, 4) and batches[0].weights.shape == (0,)
    empty = list(Loader(Batches(), orders.sequential(64), 62, seed=0, rank=0, world=4).epoch(0))[-1]
    assert empty.inputs["uniform"].shape == (0, 3) and empty.total == 2


class Mirrored(Numbers):
    def sample(self, index, rng):
        return np.arange(6).reshape(2, 3)[:, ::-1], {"scalar": np.float32(index), "flag": index > 0, "part": index / 2}


def test_mirrored_arrays_and_numbers_become_tensors():
    batch = next(Loader(Mirrored(), orders.sequential(2), 4, seed=0).epoch(0))
    assert batch.inputs.tolist() == [[[2, 1, 0], [5, 4, 3]]] * 2
    assert batch.targets["scalar"].dtype == torch.float32 and batch.targets["flag"].tolist() == [False, True]
    assert batch.targets["part"].tolist() == [0.0, 0.5]


class Given(Numbers):
    """The inputs of each row are `makes(row)`."""

    def __init__(self, makes):
        super().__init__(4)
        self.makes = makes

    def sample(self, index, rng):
        return self.makes(index), 0


@pytest.mark.parametrize(
    "first, others, dtype",
    [
        (np.float64(0.1), 0.1, torch.float64),
        (0.1, np.float64(0.1), torch.float64),
        (np.int64(3), 3, torch.int64),
        (3, np.float32(0.1), torch.float32),
        (np.arange(2), np.ones(2, np.float32), torch.float32),
        (np.zeros(2, np.float16), torch.ones(2), torch.float32),
    ],
)
def test_types_that_meet_in_a_batch_become_one_for_any_workers(first, others, dtype):
    found = []
    for workers in (0, 2):  # two workers load two rows each
        dataset = Given(lambda index: first if index < 2 else others)
        with Loader(dataset, orders.sequential(4), 4, seed=0, workers=workers, start_method="fork") as loader:
            found.append(next(loader.epoch(0)).inputs)
    assert found[0].dtype == found[1].dtype == dtype and torch.equal(*found)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_keep_no_graph_for_any_workers(workers):
    dataset = Given(lambda index: torch.ones(2, requires_grad=True) * index)
    with Loader(dataset, orders.sequential(4), 4, seed=0, workers=workers, start_method="fork") as loader:
        assert not next(loader.epoch(0)).inputs.requires_grad


@pytest.mark.parametrize(
    "first, last, told",
    [
        (np.zeros(2), None, "a sample holds a NoneType"),
        (1.0, None, "a sample holds a NoneType"),
        (np.str_("a"), np.str_("b"), "an array of <U1, the first is 'a': expected numbers"),
        (np.array([None]), np.array([None]), "an array of object, the first is 'None': expected numbers"),
        ({"a": 1}, {"b": 1}, r"a dict of \['a'\] and a dict of \['b'\]"),
        ({"a": 1}, None, r"a NoneType and a dict of \['a'\]"),
        ((1, 2), (1, 2, 3), "2 parts and 3 parts"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_batch_cannot_hold_is_said_in_one_line(first, last, told, workers):
    dataset = Given(lambda index: last if index == 3 else first)
    with (
        Loader(dataset, orders.sequential(4), 4, seed=0, workers=workers, start_method="fork") as loader,
        pytest.raises(UserError, match=told),
    ):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2, 4])  # 4: a worker for every row, so the types meet where pieces are joined
def test_types_that_have_none_in_common_are_said_in_one_line(workers):
    dataset = Given(lambda index: np.zeros(2, np.uint16 if index == 3 else np.uint8))
    with (
        Loader(dataset, orders.sequential(4), 4, seed=0, workers=workers, start_method="fork") as loader,
        pytest.raises(UserError, match="the types uint16 and uint8, which have none in common"),
    ):
        list(loader.epoch(0))


class Dying(Numbers):
    def sample(self, index, rng):
        os.kill(os.getpid(), signal.SIGKILL)


class Ragged(Numbers):
    def sample(self, index, rng):
        return np.zeros(index + 1), index


class Single(Numbers):
    def sample(self, index, rng):
        return np.zeros(2)


def test_what_goes_wrong_is_said_in_one_line():
    with (
        pytest.raises(UserError, match="fewer --workers"),
        Loader(Dying(), orders.sequential(8), 4, seed=0, workers=1) as loader,
    ):
        list(loader.epoch(0))
    with pytest.raises(UserError, match=r"shapes \[\(1,\), \(2,\)\]"):
        list(Loader(Ragged(), orders.sequential(2), 4, seed=0).epoch(0))
    with pytest.raises(UserError, match=r"expected a pair \(input, target\)"):
        list(Loader(Single(), orders.sequential(2), 4, seed=0).epoch(0))


class Stream(torch.utils.data.IterableDataset):
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(range(8))


@pytest.mark.parametrize("dataset", [Stream(), (row for row in range(8)), {1, 2}])
def test_what_has_no_rows_is_refused(dataset):
    with pytest.raises(UserError, match="cannot be loaded by row numbers: expected __len__ and one of batch, sample"):
        Loader(dataset, orders.sequential(8), 4, seed=0)


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_no_samples_are_refused(size):
    with pytest.raises(UserError, match=f"batch_size {size}: expected"):
        Loader(Numbers(), orders.sequential(8), size, seed=0)


@pytest.mark.parametrize("weights", [np.ones(63), np.ones(65), np.ones((64, 1)), 1.0])
@pytest.mark.parametrize("dataset", [Batches, Numbers])
def test_weights_are_one_for_every_row(dataset, weights):
    dataset = dataset()
    dataset.weights = weights
    with pytest.raises(UserError, match="expected a number for each of its 64 rows"):
        Loader(dataset, orders.sequential(64), 4, seed=0)


def test_weights_may_be_a_column_of_a_filtered_table():
    dataset = Numbers()
    dataset.weights = pd.Series(np.arange(64.0), index=range(100, 164))
    batch = next(Loader(dataset, orders.shuffled(64), 7, seed=0).epoch(0))
    assert torch.equal(batch.weights, batch.index.double())


@pytest.mark.parametrize(
    "returned, told",
    [
        (np.zeros((4, 2)), r"returned a ndarray: expected a pair \(inputs, targets\)"),
        ((np.zeros((4, 2)), np.zeros((1, 2))), r"returned a tensor \[1, 2\] for 4 indices: expected \[4, ...\]"),
    ],
)
def test_batches_without_a_row_for_every_index_are_refused(returned, told, monkeypatch):
    dataset = Batches()
    monkeypatch.setattr(dataset, "batch", lambda indices, keys: returned)
    with pytest.raises(UserError, match=told):
        list(Loader(dataset, orders.sequential(8), 4, seed=0).epoch(0))


def test_weights_of_a_dataset_of_batches():
    dataset = Batches()
    dataset.weights = np.linspace(0.5, 2, 64)
    batch = next(Loader(dataset, orders.shuffled(64), 7, seed=0).epoch(0))
    np.testing.assert_array_equal(batch.weights, dataset.weights[batch.index])


def test_masked_arrays_are_refused_where_values_are_masked():
    """Geographic files are read so; what lies under the mask was trained on in silence."""
    whole = np.ma.masked_equal(np.float32([1, 2]), -1)
    assert torch.equal(collate([whole, whole]), torch.tensor([[1.0, 2.0]] * 2))
    with pytest.raises(UserError, match="a sample holds a masked array: .*filled"):
        collate([whole, np.ma.masked_equal(np.float32([1, -1]), -1)])
