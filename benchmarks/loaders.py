"""The kit's Loader compared with others: overhead per sample, waiting times, images per second and guarantees.

    make bench BENCH=loaders                                   all four parts
    make bench BENCH=loaders ARGS="--part guarantees"          overhead, first, clouds or guarantees
    make bench BENCH=loaders ARGS="--data path/to/clouds"      real images instead of generated ones
    make bench BENCH=loaders ARGS="--json benchmarks/figures/loaders.json"      and writes the figures of the README

torchdata and Lightning come from requirements-peers.txt; if they are not installed, their rows say so.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from benchmarks.tools import figures
from benchmarks.tools.arguments import existing
from benchmarks.tools.turns import least_seconds
from common.loading import orders
from common.loading.loader import Loader


def drain(items: Iterable) -> None:
    for _ in items:
        pass


# Overhead per sample.


class Rows:
    """The dataset with the cheapest samples: rows of two tensors."""

    def __init__(self, rows: int):
        self.inputs, self.targets = torch.zeros(rows, 16), torch.zeros(rows, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int):
        return self.inputs[index], self.targets[index]


class Augmented:
    """An image [384, 576, 3] and its masks of four classes, augmented by a pipeline whose steps all have p=1."""

    def __init__(self, rows: int):
        self.rows = rows
        self.image = np.random.default_rng(0).integers(0, 256, (384, 576, 3), dtype=np.uint8)
        self.masks = np.random.default_rng(1).integers(0, 2, (384, 576, 4), dtype=np.uint8)
        self.pipeline = A.Compose(
            [
                A.HorizontalFlip(p=1),
                A.VerticalFlip(p=1),
                A.Affine(rotate=(-10, 10), p=1),
                A.GridDistortion(p=1),
                A.RandomBrightnessContrast(p=1),
            ]
        )

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int):
        changed = self.pipeline(image=self.image, mask=self.masks)
        return changed["image"], changed["mask"]


def one_thread(worker: int) -> None:
    """As in the kit's workers; torch's own operations have one thread in every worker."""
    cv2.setNumThreads(0)


def overhead(data: Path | None) -> list[dict]:
    """Overhead per sample: this kit's Loader and torch's DataLoader with the same dataset, batches and workers."""
    rows = []
    for name, dataset, size, repeats in [
        ("16 numbers", Rows(32_768), 256, 7),
        ("albumentations 384x576", Augmented(96), 8, 5),
    ]:
        for workers in (0, 1, 2):
            plain = DataLoader(
                dataset,
                size,
                shuffle=True,
                num_workers=workers,
                persistent_workers=workers > 0,
                worker_init_fn=one_thread,
            )
            with Loader(dataset, orders.shuffled(len(dataset)), size, seed=0, workers=workers) as loader:
                epochs = iter(range(1000))
                runs = {
                    "plain": lambda p=plain: drain(p),
                    "keyed": lambda o=loader, e=epochs: drain(o.epoch(next(e))),
                }
                for run in runs.values():
                    run()  # starts the workers
                best = least_seconds(runs, repeats)
            plain, keyed = (best[key] / len(dataset) * 1e6 for key in ("plain", "keyed"))
            us = {"DataLoader us/sample": plain, "Loader us/sample": keyed, "difference": keyed - plain}
            rows.append({"dataset": name, "workers": workers} | us | {"ratio": keyed / plain})
    return rows


# Waiting for the first batch of an epoch.


class Slow(Rows):
    """A dataset whose samples take 20 ms, without using a core."""

    seconds = 0.02

    def __getitem__(self, index: int):
        time.sleep(self.seconds)
        return super().__getitem__(index)


def first(data: Path | None) -> list[dict]:
    """Wait for the first batch of an epoch, in multiples of a sample's 20 ms: batches of 16, two workers."""
    names = ["first epoch, with the workers' start", "next epoch", "next, after 1 s of validation"]
    rows, dataset = [], Slow(128)
    plain = DataLoader(dataset, 16, shuffle=True, num_workers=2, persistent_workers=True)
    with Loader(dataset, orders.shuffled(128), 16, seed=0, workers=2) as loader:
        for name, epoch in (("torch DataLoader", lambda number: iter(plain)), ("this kit's Loader", loader.epoch)):
            waits = []
            for number, pause in enumerate((0.0, 0.0, 1.0)):
                time.sleep(pause)
                started = time.perf_counter()
                batches = epoch(number)
                next(batches)
                waits.append((time.perf_counter() - started) / Slow.seconds)
                drain(batches)
            rows.append({"loader": name} | dict(zip(names, waits, strict=True)))
    return rows


# Images per second.


class BareLoops:
    """Two processes that only loop over the rows, each taking the next row: the upper bound for two cores.

    Like the Loader's workers they stay alive, so that process start-up is not timed.
    """

    def __init__(self, dataset: Any, rows: np.ndarray):
        context = torch.multiprocessing.get_context("fork")
        self.taken = context.Value("i", 0)
        self.ports, self.processes = [], []
        for _ in range(2):
            here, there = context.Pipe()
            self.ports.append(here)
            self.processes.append(context.Process(target=self._serve, args=(dataset, rows, there), daemon=True))
            self.processes[-1].start()
            there.close()  # otherwise recv would wait for ever if the process dies

    def _serve(self, dataset: Any, rows: np.ndarray, port: Any) -> None:
        while port.recv():
            while (place := self._next()) < len(rows):
                dataset[int(rows[place])]
            port.send(True)

    def _next(self) -> int:
        with self.taken.get_lock():
            self.taken.value += 1
            return self.taken.value - 1

    def run(self) -> None:
        self.taken.value = 0
        for port in self.ports:
            port.send(True)
        for port in self.ports:
            port.recv()

    def end(self) -> None:
        for port, process in zip(self.ports, self.processes, strict=True):
            port.send(False)
            process.join()


def clouds(data: Path | None) -> list[dict]:
    """Images per second of the clouds training: decode, masks, augment."""
    from common.raw import RawData
    from competitions.clouds.config import RECIPES
    from competitions.clouds.demo import write_demo
    from competitions.clouds.task import build

    folder = tempfile.TemporaryDirectory()
    if data is None:
        write_demo(Path(folder.name))
    found = RawData(data or Path(folder.name), "clouds", is_demo=data is None)
    dataset = build(RECIPES["default"], found, lambda line: None).data.train
    rows = np.arange(len(dataset))[:256]
    if len(rows) < 128:
        rows = np.tile(rows, 128 // len(rows))
    cv2.setNumThreads(0)

    bare = BareLoops(dataset, rows)
    with Loader(dataset, orders.shuffled(rows), 8, seed=0, workers=2) as loader:
        epochs = iter(range(1000))
        runs = {
            "one bare loop": lambda: drain(dataset[int(row)] for row in rows),
            "two bare loops": bare.run,
            "Loader, 2 workers": lambda: drain(loader.epoch(next(epochs))),
        }
        for run in runs.values():
            run()  # starts the workers
        best = least_seconds(runs, 5)
    bare.end()
    folder.cleanup()
    facts = {"data": "generated" if data is None else data.name, "images": len(rows)}
    bound = best["two bare loops"]
    return [
        {"way": name} | facts | {"images/s": len(rows) / seconds, "of two bare loops": bound / seconds}
        for name, seconds in best.items()
    ]


# Which guarantees hold.


class Flips:
    """Three random flips and a random number per sample, from global generators or from albumentations pipelines."""

    def __init__(self, source: str, rows: int):
        self.source, self.rows = source, rows
        self.pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.InvertImg(p=0.5)], seed=0)
        self.noise = A.Compose([A.GaussNoise(std_range=(0.1, 0.4), p=1)], seed=1)
        self.image = np.repeat(np.array([[0, 1], [2, 3]], np.uint8)[:, :, None], 3, axis=2)
        self.canvas = np.full((8, 8, 3), 0.5, np.float32)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int):
        if self.source == "globals":
            flips = [random.random() < 0.5, np.random.rand() < 0.5, torch.rand(()).item() < 0.5]
            return index, np.array([*flips, random.random() + np.random.rand() + torch.rand(()).item()], np.float64)
        corner = int(self.pipeline(image=self.image)["image"][0, 0, 0])
        place = 255 - corner if corner > 127 else corner
        number = self.noise(image=self.canvas)["image"].sum(dtype=np.float64)
        return index, np.array([place & 1, place >> 1, corner > 127, number], np.float64)


BATCH = 8


class Peer:
    """A loader to compare: `epochs` returns each epoch's (index [B], numbers [B, 4]), resumed after `start` batches."""

    def __init__(self, seed: Callable[[], Any], init: Callable[[int], Any] | None = None, stateful: type | None = None):
        self.seed, self.init, self.stateful = seed, init, stateful

    def epochs(
        self, dataset: Flips, workers: int, count: int = 1, rank: int = 0, world: int = 1, start: int = 0
    ) -> list:
        self.seed()
        generator = torch.Generator().manual_seed(0)
        sampler = (
            DistributedSampler(dataset, world, rank, seed=0)
            if world > 1
            else RandomSampler(dataset, generator=generator)
        )
        if self.stateful is None:
            batches = torch.utils.data.BatchSampler(sampler, BATCH, drop_last=False)
            if start:  # as a careful user resumes: the same order without the finished batches
                batches = list(batches)[start:]
            loader = DataLoader(
                dataset,
                batch_sampler=batches,
                num_workers=workers,
                worker_init_fn=self.init,
                generator=torch.Generator().manual_seed(1),
            )
            return [list(loader) for _ in range(count)]

        def make() -> Any:
            return self.stateful(
                dataset,
                BATCH,
                sampler=sampler,
                num_workers=workers,
                worker_init_fn=self.init,
                generator=torch.Generator().manual_seed(1),
            )

        loader = make()
        if start:
            batches = iter(loader)
            for _ in range(start):
                next(batches)
            state = loader.state_dict()
            self.seed()
            generator.manual_seed(0)
            loader = make()
            loader.load_state_dict(state)
        return [list(loader) for _ in range(count)]


class Ours:
    def epochs(
        self, dataset: Flips, workers: int, count: int = 1, rank: int = 0, world: int = 1, start: int = 0
    ) -> list:
        with Loader(
            dataset, orders.shuffled(len(dataset)), BATCH * world, seed=0, workers=workers, rank=rank, world=world
        ) as loader:
            return [[(batch.inputs, batch.targets) for batch in loader.epoch(epoch, start)] for epoch in range(count)]


def joined(batches: list) -> dict[int, tuple[float, ...]]:
    """Row number -> its random numbers."""
    return {int(index): tuple(numbers.tolist()) for part in batches for index, numbers in zip(*part, strict=True)}


def sequence(batches: list) -> list[tuple]:
    return [(int(index), tuple(numbers.tolist())) for part in batches for index, numbers in zip(*part, strict=True)]


def guarantees_of(system: Any, source: str) -> list[bool]:
    dataset = Flips(source, 64)
    first, second = (joined(epoch) for epoch in system.epochs(dataset, 4, count=2))
    numbers = [{row[3] for row in epoch.values()} for epoch in (first, second)]
    expected = sequence(system.epochs(dataset, 0)[0])
    counts = [sequence(system.epochs(Flips(source, 64), workers)[0]) for workers in (0, 1, 2, 4)]
    ranks = [joined(system.epochs(Flips(source, 64), 2, rank=rank, world=2)[0]) for rank in range(2)]
    whole = sequence(system.epochs(Flips(source, 64), 2)[0])
    resumed = sequence(system.epochs(Flips(source, 64), 2, start=3)[0])
    gates = np.array(list(joined(system.epochs(Flips(source, 1024), 2)[0]).values()))[:, :3]
    correlation = abs(np.corrcoef(gates.T) - np.eye(3)).max()
    return [
        len(numbers[0]) >= 60,
        len(numbers[0] & numbers[1]) <= 4,
        all(count == expected for count in counts),
        ranks[0] | ranks[1] == dict(whole),
        resumed == whole[3 * BATCH :],
        bool(correlation < 0.15 and len({tuple(gate) for gate in gates}) == 8),
    ]


def versions() -> str:
    """The versions of the peers that are installed, in one line."""
    there = [name for name in ("torchdata", "lightning") if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there) or "none installed"


def peers() -> dict[str, Any]:
    """The loaders by name; None for a missing package."""

    def seed_all() -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    torchdata, lightning = "torchdata StatefulDataLoader", "Lightning seed_everything(workers=True)"
    found: dict[str, Any] = {"torch DataLoader": Peer(seed_all), torchdata: None, lightning: None}
    with suppress(ImportError):
        from torchdata.stateful_dataloader import StatefulDataLoader

        found[torchdata] = Peer(seed_all, stateful=StatefulDataLoader)
    with suppress(ImportError):
        from lightning.fabric.utilities.seed import pl_worker_init_function, seed_everything

        found[lightning] = Peer(partial(seed_everything, 0, workers=True, verbose=False), pl_worker_init_function)
    return found | {"this kit's Loader": Ours()}


GUARANTEES = [
    "workers differ",
    "epochs differ",
    "any worker count",
    "any rank count",
    "exact resume in an epoch",
    "independent transforms",
]


def guarantees(data: Path | None) -> list[dict]:
    """Which guarantees hold: 64 samples, batches of 8, random numbers and their order compared bit by bit."""
    rows = []
    for name, system in peers().items():
        for source in ("globals", "albumentations"):
            row = {"loader": name, "draws from": source}
            if system is None:
                rows.append(row | {"skipped": "not installed"})
            else:
                rows.append(row | dict(zip(GUARANTEES, guarantees_of(system, source), strict=True)))
    return rows


PARTS = {"overhead": overhead, "first": first, "clouds": clouds, "guarantees": guarantees}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--data", type=existing, help="folder with the competition's files in Kaggle's layout")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = PARTS if given.part == "all" else {given.part: PARTS[given.part]}
    found = figures.facts(threads=1, albumentations=A.__version__, peers=versions(), seed=0)
    figures.measure(parts, found, given.json, given.data)


if __name__ == "__main__":
    main()
