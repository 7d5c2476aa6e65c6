"""One GPU, at most five minutes: steps compared with a hand-written loop and other libraries, trainings, memory.

    make bench BENCH=gpu                          everything
    python -m benchmarks.gpu steps memory         some parts, with the installed torch and packages
    python -m benchmarks.gpu --json card.json     the file for the figures [gpu.json]

Missing packages, and measurements for which no time is left, are reported and skipped. Many steps are timed in a row,
until the card has finished the last one.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine_parts.peers import versions
from benchmarks.gpu_parts.timing import seconds_of
from benchmarks.tools import figures
from common.batch import Batch
from common.device import prepare_device
from common.engine import memory
from common.engine.optimizers import allocate_state
from common.engine.precision import autocast, best_precision
from common.engine.prepare import enable_checkpointing
from common.engine.step import Engine
from common.errors import first_line
from common.losses import BCEDice, CrossEntropy

GIB = 2**30
ROOT = Path(__file__).parents[1]
CARD = torch.device("cuda", 0)


@dataclass
class Clock:
    """The end of the time allowed for a part of the benchmark (time.monotonic), and the seconds left."""

    end: float

    def left(self) -> float:
        return self.end - time.monotonic()


# Networks and their data.


@dataclass(frozen=True)
class Network:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    cuts: int  # micro-batches of a batch
    masks: int = 0  # classes of a segmentation; 0: classification into ten labels

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, ...] in pinned host memory."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.batch, *self.shape, generator=generator)
        if self.masks:
            targets = (torch.rand(self.batch, self.masks, *self.shape[1:], generator=generator) > 0.7).float()
        else:
            targets = torch.randint(0, 10, (self.batch,), generator=generator)
        return inputs.pin_memory(), targets.pin_memory()

    def losses(self) -> tuple[Callable, Any]:
        """The loss of the other loops (the mean over a micro-batch) and the loss of the kit."""
        if self.masks:
            return (
                F.binary_cross_entropy_with_logits,
                lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none").flatten(1).mean(1),
            )
        return F.cross_entropy, CrossEntropy(ignore_index=None)


def digits() -> nn.Module:
    from competitions.digit_recognizer.model import DigitNet

    return DigitNet(32, 5, 0.3)


def resnet50() -> nn.Module:
    import timm

    return timm.create_model("resnet50", num_classes=10)


def unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None, classes=4)


def nasnet() -> nn.Module:
    import timm

    return timm.create_model("nasnetalarge", in_chans=4, num_classes=10)


NETWORKS = {
    "MLP 64-256-10": Network(lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), (64,), 256, 1),
    "digits": Network(digits, (1, 28, 28), 512, 1),
    "ResNet-50 224": Network(resnet50, (3, 224, 224), 256, 4),
    "ResNet-34 Unet 512": Network(unet, (3, 512, 512), 16, 4, masks=4),
}
LARGE = {
    "NASNet-A-Large 4x512x512": Network(nasnet, (4, 512, 512), 64, 1),
    "ResNet-34 Unet 1408x2112": Network(unet, (3, 1408, 2112), 16, 1, masks=4),
}


# Contestants: each returns a function that makes one optimizer step.

Step = Callable[[Tensor, Tensor], None]


def by_hand(network: Network, model: nn.Module) -> Step:
    optimizer, loss = torch.optim.AdamW(model.parameters(), fused=True), network.losses()[0]
    precision = best_precision(CARD)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")

    def step(inputs: Tensor, targets: Tensor) -> None:
        for x, t in zip(inputs.chunk(network.cuts), targets.chunk(network.cuts), strict=True):
            with autocast(precision, CARD.type):
                outputs = model(x.to(CARD, non_blocking=True))
            scaler.scale(loss(outputs.float(), t.to(CARD, non_blocking=True)) / network.cuts).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def kit(network: Network, model: nn.Module, graph: bool = False) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    allocate_state(optimizer)
    size, count, index = network.batch // network.cuts, iter(range(10**9)), torch.arange(network.batch)
    settings = {"micro_batch": size, "precision": best_precision(CARD), "graph": graph, "log": lambda line: None}
    engine = Engine(model, network.losses()[1], optimizer, **settings)
    return lambda inputs, targets: engine.step(Batch(inputs, targets, index), next(count)) and None


def kit_with_graph(network: Network, model: nn.Module) -> Step:
    return kit(network, model, graph=True)


def fabric(network: Network, model: nn.Module) -> Step:
    from lightning.fabric import Fabric

    precision = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[best_precision(CARD)]
    runner = Fabric(accelerator="cuda", devices=1, precision=precision)
    model, optimizer = runner.setup(model, torch.optim.AdamW(model.parameters(), fused=True))
    loss = network.losses()[0]

    def step(inputs: Tensor, targets: Tensor) -> None:
        pairs = list(zip(inputs.chunk(network.cuts), targets.chunk(network.cuts), strict=True))
        for number, (x, t) in enumerate(pairs, 1):
            with runner.no_backward_sync(model, enabled=number < len(pairs)):
                outputs = model(x.to(CARD, non_blocking=True))
                runner.backward(loss(outputs.float(), t.to(CARD, non_blocking=True)) / network.cuts)
        optimizer.step()
        optimizer.zero_grad()

    return step


def accelerate(network: Network, model: nn.Module) -> Step:
    from accelerate import Accelerator

    precision = {"fp32": "no"}.get(best_precision(CARD), best_precision(CARD))
    runner = Accelerator(mixed_precision=precision, gradient_accumulation_steps=network.cuts)
    model, optimizer = runner.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    loss = network.losses()[0]

    def step(inputs: Tensor, targets: Tensor) -> None:
        for x, t in zip(inputs.chunk(network.cuts), targets.chunk(network.cuts), strict=True):
            with runner.accumulate(model):
                outputs = model(x.to(CARD, non_blocking=True))
                runner.backward(loss(outputs.float(), t.to(CARD, non_blocking=True)))
                optimizer.step()
                optimizer.zero_grad()

    return step


CONTESTANTS = {
    "hand-written loop": by_hand,
    "this kit": kit,
    "this kit, replayed": kit_with_graph,
    "Fabric": fabric,
    "accelerate": accelerate,
}


def steps_part(clock: Clock) -> list[dict]:
    """Time of a step and its ratio to the hand-written loop, with data on the card and in pinned host memory."""
    rows = []
    for name, network in NETWORKS.items():
        for where in ("card", "host"):
            by_hand_seconds = None
            for contestant, make in CONTESTANTS.items():
                row = {"network": name, "data": where, "loop": contestant}

                def measured(network=network, where=where, make=make) -> dict:
                    torch.manual_seed(0)
                    model = network.make().to(CARD, memory_format=torch.channels_last)
                    data = network.data()
                    inputs, targets = (x.to(CARD) for x in data) if where == "card" else data
                    torch.cuda.reset_peak_memory_stats()
                    seconds = seconds_of(partial(make(network, model), inputs, targets))
                    peak = torch.cuda.max_memory_allocated() / GIB
                    return {"ms": seconds * 1e3, "images/s": network.batch / seconds, "peak GiB": peak}

                row |= tried(measured, clock, 15)
                if contestant == "hand-written loop":
                    by_hand_seconds = row.get("ms")
                if by_hand_seconds and "ms" in row:
                    row["ratio"] = row["ms"] / by_hand_seconds
                rows.append(row)
    return rows


def memory_part(clock: Clock) -> list[dict]:
    """The micro-batch that the engine finds in 11, 16 and 80 GiB, peak and speed, with and without checkpointing.

    If the whole batch does not fit, the engine recovers from an out-of-memory error of the card.
    """
    rows, total, longest = [], torch.cuda.get_device_properties(CARD).total_memory / GIB, 25.0
    for name, network in LARGE.items():
        for checkpointing in (False, True):
            for allowed in (16, 80, 11):
                row = {"network": name, "allowed GiB": min(allowed, round(total)), "checkpointing": checkpointing}
                if allowed != 80 and allowed > total:
                    rows.append(row | {"skipped": "the card has less"})
                    continue
                work = partial(settled, network, checkpointing, min(1.0, allowed / total))
                started = time.monotonic()
                rows.append(row | tried(work, clock, longest))
                longest = max(longest, time.monotonic() - started)
    return rows


def settled(network: Network, checkpointing: bool, allowed: float) -> dict:
    """Measure two steps of a batch after the engine has found its micro-batch in this part of the memory."""
    torch.cuda.set_per_process_memory_fraction(allowed)
    try:
        return _settled(network, checkpointing)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _settled(network: Network, checkpointing: bool) -> dict:
    inputs, targets = network.data()
    model = network.make().to(CARD, memory_format=torch.channels_last)
    batch = Batch(inputs, targets, torch.arange(len(inputs)))
    if checkpointing:
        enable_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    allocate_state(optimizer)
    said: list[str] = []
    loss = BCEDice() if network.masks else network.losses()[1]
    engine = Engine(model, loss, optimizer, precision=best_precision(CARD), log=said.append)
    engine.step(batch, 0)
    engine.settle()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for number in (1, 2):
        engine.step(batch, number)
    engine.settle()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "batch": len(batch),
        "micro-batch": engine.micro_batch,
        "out of memory": sum("out of memory" in line for line in said),
        "peak GiB": torch.cuda.max_memory_allocated() / GIB,
        "images/s": 2 * len(batch) / seconds,
    }


TRAININGS = (  # competition, recipe, epochs (0: the recipe's)
    ("digit_recognizer", "fast", 0),
    ("digit_recognizer", "default", 0),
    ("clouds", "default", 3),
    ("clouds", "full", 1),
    ("protein_atlas", "default", 3),
)


def trainings_part(clock: Clock) -> list[dict]:
    """Images per second of a training's last epoch and of prediction, beside the same work on data that is ready."""
    return [
        {"competition": competition, "recipe": recipe}
        | tried(partial(trained, competition, recipe, epochs, clock), clock, 25)
        for competition, recipe, epochs in TRAININGS
    ]


def trained(competition: str, recipe: str, epochs: int, clock: Clock) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu_parts.training", competition, recipe, str(epochs)]
    with tempfile.TemporaryDirectory() as folder:
        environment, limit = os.environ | {"PYTHONPATH": _import_path()}, min(75.0, clock.left())
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _import_path() -> str:
    """For a process in another folder."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def tried(work: Callable[[], dict], clock: Clock, seconds: float) -> dict:
    """The result of `work`, or the reason for skipping it: no time, a missing package, no memory on the card."""
    if clock.left() < seconds:
        return {"skipped": "no time left"}
    try:
        found, fits = memory.attempt(work)
        return found if fits else {"skipped": "does not fit on this card"}
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    except subprocess.TimeoutExpired:
        return {"skipped": "took too long"}
    except Exception as error:  # a peer that fails with this torch must not stop the other measurements
        return {"skipped": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        with suppress(RuntimeError):  # after some errors of CUDA every call fails
            gc.collect()
            torch.cuda.empty_cache()


PARTS = {"steps": steps_part, "memory": memory_part, "trainings": trainings_part}
SHARES = {"steps": 4, "memory": 3, "trainings": 3}  # of the time; what a part leaves goes to those after it


def timed(names: list[str], seconds: float) -> dict[str, Callable]:
    """The parts, each with a clock of its own, so that a slow one does not take the time of those after it."""
    end = time.monotonic() + seconds

    def started(name: str) -> list[dict]:
        share = SHARES[name] / sum(SHARES[other] for other in names[names.index(name) :])
        now = time.monotonic()
        return PARTS[name](Clock(now + share * (end - now)))

    return {name: wraps(PARTS[name])(partial(started, name)) for name in names}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} [all of them]")
    parser.add_argument("--seconds", type=float, default=290.0, help="that the whole may take [290]")
    parser.add_argument("--json", default="gpu.json", help="the file for the figures [gpu.json]")
    given = parser.parse_args(arguments)
    if wrong := [name for name in given.parts if name not in PARTS]:
        parser.error(f"there is no part {wrong[0]}, only {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("gpu: skipped, there is no CUDA card that torch sees")
        return
    prepare_device(CARD, False)
    parts = timed(list(dict.fromkeys(given.parts)) or list(PARTS), given.seconds)
    found = figures.facts(
        card=torch.cuda.get_device_name(CARD),
        GiB=round(torch.cuda.get_device_properties(CARD).total_memory / GIB, 1),
        precision=best_precision(CARD),
        peers=versions(),
        seed=0,
    )
    figures.measure(parts, found, given.json)


if __name__ == "__main__":
    main()
