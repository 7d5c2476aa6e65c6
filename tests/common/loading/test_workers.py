"""Worker processes: which worker loads which rows and when, how workers end, and how samples are sent."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import cli, device, run
from common.config import Config
from common.errors import UserError
from common.loading import cores, orders, stream, worker
from common.loading.loader import Loader
from common.loading.slots import SLOTS, Slots
from tests.common.loading.datasets import Numbers, digest

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
ROOT = Path(__file__).parents[3]
LIMIT = 60.0  # seconds until a test stops waiting for something that should certainly happen


def wait_until(holds, limit=LIMIT):
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


class Noted(Numbers):
    """Appends each loaded row to a file per process, and waits while the file `gate` exists."""

    def __init__(self, folder: Path, rows: int = 64):
        super().__init__(rows)
        self.folder = folder

    def sample(self, index: int, rng: np.random.Generator):
        with open(self.folder / f"{os.getpid()}.txt", "a") as file:
            file.write(f"{index}\n")
        while (self.folder / "gate").exists():
            time.sleep(0.01)
        return super().sample(index, rng)

    def loaded(self) -> list[list[int]]:
        return [[int(row) for row in file.read_text().split()] for file in sorted(self.folder.glob("*.txt"))]


def test_workers_load_the_first_batch_together(tmp_path):
    """Two workers share the first sixteen samples, eight each, before they load any again for the check."""
    dataset = Noted(tmp_path)
    with Loader(dataset, orders.sequential(64), 16, seed=0, workers=2) as loader:
        list(loader.epoch(0))
    shares = [rows[:8] for rows in dataset.loaded()]
    assert sorted(shares) == [list(range(8)), list(range(8, 16))]


def test_a_worker_for_every_sample_loads_one(tmp_path):
    dataset = Noted(tmp_path)
    with Loader(dataset, orders.sequential(64), 4, seed=0, workers=6) as loader:
        next(loader.epoch(0))
        wait_until(lambda: len(dataset.loaded()) == 6)
    assert sorted(rows[0] for rows in dataset.loaded()) == [0, 0, 0, 1, 2, 3], "two are checked by those left over"


@pytest.mark.parametrize("start", [0, 2])
def test_the_next_epoch_is_loaded_while_nobody_asks(tmp_path, start):
    dataset, order = Noted(tmp_path), orders.shuffled(64)
    expected = [digest(batch) for batch in Loader(Numbers(64), order, 16, seed=0).epoch(1)]
    with Loader(dataset, order, 16, seed=0, workers=2, epochs=2) as loader:
        assert len(list(loader.epoch(0, start))) == 4 - start
        done = 64 - 16 * start + 3 * 8  # samples and checks: eight rows, and eight of each of two epochs
        wait_until(lambda: sum(map(len, dataset.loaded())) == done + 2 * stream.PIECES_AHEAD * 8)
        (tmp_path / "gate").touch()  # from here on no sample can be loaded
        epoch = loader.epoch(1)
        first = next(epoch)
        (tmp_path / "gate").unlink()
        assert [digest(first), *map(digest, epoch)] == expected
        total = sum(map(len, dataset.loaded()))
        assert total == done + 64, "the last epoch is followed by none"
        assert [digest(batch) for batch in loader.epoch(1)] == expected, "and can be loaded again"


def test_another_epoch_than_the_next_is_right_too():
    order = orders.shuffled(64)
    expected = [[digest(w) for w in Loader(Numbers(64), order, 16, seed=0).epoch(epoch)] for epoch in range(4)]
    with Loader(Numbers(64), order, 16, seed=0, workers=2) as loader:
        for epoch in (0, 1, 3, 2, 3, 3, 0):
            assert [digest(batch) for batch in loader.epoch(epoch)] == expected[epoch]


class KeepsCrops(Numbers):
    """Keeps the random crop of a row's first load in a cache."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def sample(self, index, rng):
        return self.kept.setdefault(index, rng.random(2)), index


class AsksItsProcess(Numbers):
    def sample(self, index, rng):
        return np.random.default_rng(os.getpid()).random(2), index


class AsksItsWorker(Numbers):
    def sample(self, index, rng):
        return torch.utils.data.get_worker_info().seed % 1000, index


class HashesText(Numbers):
    def sample(self, index, rng):
        return float(hash(f"row {index}") % 1000), index


class Counts(Numbers):
    """A curriculum that depends on the number of calls."""

    calls = 0

    def sample(self, index, rng):
        self.calls += 1
        return rng.random(2) * self.calls, index


@pytest.mark.parametrize(
    "dataset, method, workers",
    [
        (KeepsCrops(), "fork", 2),
        (AsksItsProcess(), "fork", 2),
        (AsksItsWorker(), "fork", 2),
        (HashesText(), "spawn", 2),
        (Counts(), "fork", 2),
        (Counts(), "fork", 1),
        (Counts(), None, 0),
    ],
)
def test_what_two_processes_see_differently_is_refused(dataset, method, workers):
    with (
        Loader(dataset, orders.sequential(64), 8, seed=0, workers=workers, start_method=method) as loader,
        pytest.raises(UserError, match=f"row 0 of {type(dataset).__name__} differs between two loads"),
    ):
        list(loader.epoch(0))


class Images(Numbers):
    """Large samples: an image of 300 kB, a bfloat16 tensor, and numbers."""

    def sample(self, index, rng):
        image = rng.integers(0, 256, (3, 320, 320), dtype=np.uint8)
        return {"image": image, "half": torch.full((40_000,), index, dtype=torch.bfloat16)}, (index, image[0] > 9)


def refuse(*_):
    raise AssertionError("this costs a millisecond, and memory of /dev/shm")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("slots, nbytes", [(16, 2**26), (1, 2**26), (16, 3 * 320 * 320 * 2)])
def test_samples_travel_in_slots_or_through_pipes(monkeypatch, method, slots, nbytes):
    """As many as there are, and as large: a piece of four images has no room in a slot of two."""
    expected = [digest(batch) for batch in Loader(Images(32), orders.shuffled(32), 8, seed=0).epoch(0)]
    monkeypatch.setattr("common.loading.slots.SLOTS", slots)
    monkeypatch.setattr("common.loading.slots.SLOT_BYTES", nbytes)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", refuse)
    with Loader(Images(32), orders.shuffled(32), 8, seed=0, workers=2, start_method=method) as loader:
        for _ in range(3):
            assert [digest(batch) for batch in loader.epoch(0)] == expected
            next(loader.epoch(1))  # what is loaded and never asked for leaves its slots too
        kept = [batch for _ in range(3) for batch in loader.epoch(0)]  # more than there are slots
        assert [digest(batch) for batch in kept] == 3 * expected


def test_a_slot_is_free_once_its_tensor_is_gone():
    slots = Slots(2)
    tensor = torch.arange(60_000, dtype=torch.float64).reshape(3, 20_000)[:, ::2]
    numbers = [slots.lend(tensor, 1) for _ in range(SLOTS)]
    assert numbers == [*range(SLOTS, 2 * SLOTS)] and slots.lend(tensor, 1) is None
    borrowed = [slots.borrow(number, tensor.dtype, tensor.shape) for number in numbers]
    assert all(torch.equal(one, tensor) for one in borrowed) and slots.lend(tensor, 0) == 0
    del borrowed[3]
    assert slots.lend(tensor + 1, 1) == numbers[3] and slots.lend(tensor, 1) is None
    assert all(torch.equal(one, tensor) for one in borrowed)


def test_a_copy_in_another_process_frees_no_slot(monkeypatch):
    slots, tensor = Slots(1), torch.zeros(3)
    borrowed = slots.borrow(slots.lend(tensor, 0), tensor.dtype, tensor.shape)
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        del borrowed
    assert slots.lend(tensor, 0) == 1


def test_slots_of_inference_mode_on_macos_are_written_to_outside_it(monkeypatch):
    monkeypatch.delattr("os.memfd_create", raising=False)
    with torch.inference_mode():
        slots = Slots(1)
    tensor = torch.arange(5.0, requires_grad=True)
    assert torch.equal(slots.borrow(slots.lend(tensor, 0), tensor.dtype, tensor.shape), tensor)


def test_where_slots_have_no_room_nothing_is_lent(monkeypatch):
    def limited(*_):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", limited)
    assert Slots(2).lend(torch.zeros(3), 1) is None


class Unsendable(Numbers):
    def __init__(self):
        super().__init__()
        self.change = lambda sample: sample

    def sample(self, index, rng):
        return {self.change: 0.0}, 1


def test_an_answer_that_has_no_pickle_is_told():
    with (
        Loader(Unsendable(), orders.sequential(8), 4, seed=0, workers=1, start_method="fork") as loader,
        pytest.raises(Exception, match="lambda"),
    ):
        next(loader.epoch(0))


class Large(Numbers):
    def __init__(self):
        super().__init__()
        self.table = np.zeros(10_000)
        self.tensor = torch.zeros(10**6)  # sent through shared memory


def test_what_workers_are_sent_is_measured(monkeypatch):
    with pytest.raises(UserError, match="Unsendable cannot be sent to worker processes.*lambda.*--workers 0"):
        next(Loader(Unsendable(), orders.sequential(8), 4, seed=0, workers=1, start_method="spawn").epoch(0))
    monkeypatch.setattr(worker, "LARGE_PICKLE", 200_000)
    assert worker.is_large_pickle(worker.Reader(Large(), 0, False), 3)
    assert not worker.is_large_pickle(worker.Reader(Large(), 0, False), 2)
    said = []
    monkeypatch.setattr(worker, "LARGE_PICKLE", 100_000)
    with Loader(Large(), orders.sequential(8), 4, seed=0, workers=2, start_method="spawn", log=said.append) as loader:
        assert len(list(loader.epoch(0))) == 2
    assert len(said) == 1 and "2 workers get copies of Large" in said[0]


TRAINER = """
import sys, time
from pathlib import Path
import numpy as np
from common import cli, device, run
from common.config import Config
from common.loading import orders
from common.loading.loader import Loader

class Data:
    def __len__(self):
        return 5000

    def sample(self, index, rng):
        time.sleep(600 if sys.argv[2] == "decode" else 0)
        return rng.integers(0, 255, (28, 28)).astype(np.uint8), index % 10

if __name__ == "__main__":
    rank, world = map(int, sys.argv[4:])
    if rank == 0:
        held = run.Run(Path(sys.argv[1]), {})
        held.lock()
    loader = Loader(Data(), orders.shuffled(5000), 64, seed=0, workers=2, rank=rank, world=world,
                    start_method=sys.argv[3])
    batches = loader.epoch(0)
    print("ready", flush=True)
    if sys.argv[2] == "pipe":
        next(batches)
        print("ready", flush=True)
        time.sleep(600)
    next(batches)
    time.sleep(600)
"""


def descendants(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found += [int(entry.name), *descendants(int(entry.name))]
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    "method, doing", [("fork", "pipe"), ("fork", "decode"), ("fork", "start"), ("spawn", "pipe"), ("spawn", "start")]
)
def test_workers_end_with_their_trainer_and_hold_no_lock(tmp_path, method, doing):
    """After all ranks are killed, the run can be locked again at once, and no worker is left."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    world = 2 if method == "fork" else 1
    trainers = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, doing, method, str(rank), str(world)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        for rank in range(world)
    ]
    workers = []
    for trainer in trainers:
        for _ in range(2 if doing == "pipe" else 1):
            assert trainer.stdout.readline() == b"ready\n"
        expected = 1 if doing == "start" else 2
        wait_until(lambda: len(descendants(trainer.pid)) >= expected)  # noqa: B023
        workers += descendants(trainer.pid)
    for trainer in trainers:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    run.Run(tmp_path, {}).lock()
    wait_until(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize(
    "there, quota, ranks, workers, threads",
    [
        (16, "max 100000", 1, 15, 1),
        (16, "max 100000", 4, 3, 1),
        (16, "400000 100000", 1, 3, 1),
        (16, "150000 100000", 1, 1, 1),
        (2, "", 1, 1, 1),
        (1, "", 1, 0, 1),
        (2, "", 4, 0, 1),
        (2, "", "no number", 1, 1),
        (2, "", 0, 1, 1),
    ],
)
def test_workers_and_threads_fit_on_the_cores(monkeypatch, tmp_path, there, quota, ranks, workers, threads):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: set(range(there)), raising=False)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "OLDER", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if quota:
        cores.QUOTA.write_text(quota + "\n")
    config, card = Config(), torch.device("cuda")
    assert device.workers_of(config, card) == workers
    assert device.threads_of(config, workers) == threads
    free = max(1, cores.cores())
    assert device.threads_of(config, 0) == free, "data held as tensors leave all cores to the threads"
    given = Config(workers=5, threads=3)
    assert device.workers_of(given, card) == 5 and device.threads_of(given, workers) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device.threads_of(config, 0) == 1


@pytest.mark.parametrize("quota, count", [("150000", 2), ("400000", 4), ("-1", 16)])
def test_the_quota_of_older_containers_counts_too(monkeypatch, tmp_path, quota, count):
    """With cgroups of version 1, where every core of the machine was taken."""
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "OLDER", tmp_path, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.cores() == count


class KilledOnce(Numbers):
    def __init__(self, mark: Path):
        super().__init__(24)
        self.mark = mark

    def sample(self, index: int, rng: np.random.Generator):
        if index == 9 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index, rng)


def test_a_loader_goes_on_after_a_worker_was_killed(tmp_path):
    settings = {"batch_size": 8, "seed": 0, "start_method": "fork"}
    with (
        Loader(KilledOnce(tmp_path / "mark"), orders.sequential(24), workers=2, **settings) as loader,
        Loader(Numbers(24), orders.sequential(24), **settings) as plain,
    ):
        with pytest.raises(UserError, match="a worker process was killed"):
            list(loader.epoch(0))
        assert [digest(batch) for batch in loader.epoch(0)] == [digest(batch) for batch in plain.epoch(0)]


def test_a_worker_killed_while_the_network_computes_is_one_line(monkeypatch, capsys):
    def computing(competition, argv):
        with Loader(Numbers(24), orders.sequential(24), 8, seed=0, workers=2, start_method="fork") as loader:
            for _ in loader.epoch(0):
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                time.sleep(LIMIT)

    monkeypatch.setitem(cli.VERBS, "train", computing)
    assert cli.main(["train", "clouds"]) == 1
    assert re.fullmatch(r"error: a worker process was killed, .* use fewer --workers .*\n", capsys.readouterr().err)
