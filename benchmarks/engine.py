"""The engine compared with a hand-written loop and other libraries: time, error and memory of an optimizer step.

    make bench BENCH=engine                  everything that this machine can run (about four minutes on two cores)
    make bench BENCH=engine ARGS="time"      one part: time, passes, error, memory
    make bench BENCH=engine ARGS="--json benchmarks/figures/engine.json"      and writes the figures of the README

Each loop runs in its own process, because merely importing some of the peers (the other libraries, listed in
requirements-peers.txt) slows every later torch call. The loops are measured in turn, and the fastest step of each
counts, the one least disturbed by other processes. All train the same network on the same batches, made before the
timing starts. The peers get their micro-batches as ready views of these batches; the kit's time includes the slicing.
The C allocator keeps freed memory: otherwise the ratios depend on when glibc returns pages to the system.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine_parts.peers import ACCUMULATE, PEERS, Work, installed, versions
from benchmarks.tools import figures
from benchmarks.tools.turns import in_turns
from common.batch import Batch
from common.engine.step import Engine
from common.losses import CrossEntropy, SoftFBeta, batch_value

PROCESSES = Path("/proc")  # Linux only
STEADY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "100000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 10))


NETWORKS = {"MLP 16-32-10": (mlp, (16,)), "CNN 3x32x32": (cnn, (3, 32, 32))}
STEPS = {"MLP 16-32-10": 60, "CNN 3x32x32": 16}  # optimizer steps of one training


def batches_of(shape: tuple[int, ...], sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(size, *shape, generator=generator, dtype=dtype),
            torch.randint(0, 10, (size,), generator=generator),
            torch.arange(size),
        )
        for size in sizes
    ]


def one_hot(batches: list[Batch], dtype: torch.dtype) -> list[Batch]:
    return [replace(batch, targets=F.one_hot(batch.targets, 10).to(dtype)) for batch in batches]


def hand_written(work: Work) -> None:
    """The usual loop: the mean loss divided by the number of micro-batches, and a step every few of them."""
    model, optimizer, last = work.model, work.optimizer(work.model), len(work.micro_batches) - 1
    for number, (inputs, targets) in enumerate(work.micro_batches):
        if number % ACCUMULATE == 0:
            work.tick()
        (work.loss(model(inputs), targets) / ACCUMULATE).backward()
        if number % ACCUMULATE == ACCUMULATE - 1 or number == last:
            optimizer.step()
            optimizer.zero_grad()
    work.tick()


def naive_soft_f1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Macro soft F1 as it is usually written; on a whole batch it equals SoftFBeta(1, "macro")."""
    probabilities = outputs.sigmoid()
    hits = (probabilities * targets).sum(0)
    return 1 - ((2 * hits + 1) / (probabilities.sum(0) + targets.sum(0) + 1)).mean()


def ours(work: Work) -> None:
    settings = {"micro_batch": work.micro_batch, "log": lambda line: None}
    engine = Engine(work.model, work.exact_loss, work.optimizer(work.model), **settings)
    for number, batch in enumerate(work.batches):
        work.tick()
        engine.step(batch, number)
    work.tick()


def ours_with_fused(work: Work) -> None:
    """The kit with a fused optimizer, as build_optimizer makes it: one pass over the weights."""
    work.make_optimizer = partial(work.make_optimizer, fused=True)
    ours(work)


KIT = {"this kit": ours, "this kit, its fused optimizer": ours_with_fused}
CONTESTANTS: dict[str, Callable[[Work], None]] = {"hand-written loop": hand_written} | KIT | PEERS


def step_times(ticks: list[float]) -> list[float]:
    """Seconds of each optimizer step after the first ten, in which caches and allocators warm up."""
    return [after - before for before, after in zip(ticks[10:], ticks[11:], strict=False)]


def quickest(turns: list[list[float]]) -> float:
    """Seconds of the fastest step of all turns, the one least disturbed by other processes."""
    return min(seconds for turn in turns for seconds in turn)


class Contestant:
    """One of CONTESTANTS in its own process, so that importing a peer does not slow the others."""

    def __init__(self, name: str, network: str):
        command = [sys.executable, "-m", "benchmarks.engine", "child", "trainings", name, network]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def train(self) -> list[float]:
        """Seconds of every step of one more training."""
        print("go", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of a contestant ended with {self.process.wait()}: {self.process.args}")
        return json.loads(answer)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def train_on_demand(name: str, network: str) -> None:
    """The child process of Contestant: one training per line of input; output of the peers goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    make, shape = NETWORKS[network]
    batches = batches_of(shape, [32 * ACCUMULATE] * STEPS[network])
    for _ in sys.stdin:
        optimizer, exact = partial(torch.optim.AdamW, lr=1e-3), CrossEntropy(ignore_index=None)
        work = Work(make(), optimizer, F.cross_entropy, batches, 32, exact)
        CONTESTANTS[name](work)
        print(json.dumps(step_times(work.ticks)), file=answers, flush=True)


def time_part(turns: int = 12) -> list[dict]:
    """Least time of an optimizer step, 4 micro-batches of 32, AdamW."""
    rows = {name: {"loop": name} for name in CONTESTANTS}
    for network in NETWORKS:
        contestants = {name: Contestant(name, network) for name in CONTESTANTS if installed(name)}
        taken = in_turns({name: contestant.train for name, contestant in contestants.items()}, turns)
        by_hand = quickest(taken["hand-written loop"])
        for name, contestant in contestants.items():
            contestant.end()
            seconds = quickest(taken[name])
            rows[name] |= {f"{network}, ms": seconds * 1e3, f"{network}, ratio": seconds / by_hand}
    return [row | ({} if installed(name) else {"skipped": "not installed"}) for name, row in rows.items()]


def passes_part(turns: int = 12) -> list[dict]:
    """Macro soft F1: two passes against naive accumulation of the same loss."""
    rows = []
    for network, (make, shape) in NETWORKS.items():
        batches = one_hot(batches_of(shape, [32 * ACCUMULATE] * STEPS[network]), torch.float32)

        def trained(contestant: Callable[[Work], None], make=make, batches=batches) -> list[float]:
            optimizer = partial(torch.optim.AdamW, lr=1e-3)
            work = Work(make(), optimizer, naive_soft_f1, batches, 32, SoftFBeta(1, "macro"))
            contestant(work)
            return step_times(work.ticks)

        ways = {
            "naive": partial(trained, hand_written),
            "exact": partial(trained, ours),
            "forward": partial(trained, forward_alone),
        }
        naive, exact, forward = map(quickest, in_turns(ways, turns).values())
        times = {"naive, ms": naive * 1e3, "exact, ms": exact * 1e3, "ratio": exact / naive}
        rows.append({"network": network} | times | {"a second forward pass, + 5 %": 1 + forward / naive + 0.05})
    return rows


def forward_alone(work: Work) -> None:
    with torch.no_grad():
        for number, (inputs, targets) in enumerate(work.micro_batches):
            if number % ACCUMULATE == 0:
                work.tick()
            work.loss(work.model(inputs), targets)
    work.tick()


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def error_part() -> list[dict]:
    """Error of the update against SGD on the exact gradient; 37 samples, micro-batches of 8, an update every 4."""
    rows = []
    for name, contestant in CONTESTANTS.items():
        if not installed(name):
            rows.append({"loop": name, "skipped": "not installed"})
            continue
        batches = batches_of((16,), [32, 5], torch.float64)
        ratio, tail_error = update_error(contestant, batches, F.cross_entropy, CrossEntropy())
        hot = one_hot(batches[:1], torch.float64)
        _, f1_error = update_error(contestant, hot, naive_soft_f1, SoftFBeta(1, "macro"))
        last = {"last batch: update / exact": ratio, "last batch: error": tail_error}
        rows.append({"loop": name} | last | {"macro soft F1: error": f1_error})
    return rows


def update_error(
    contestant: Callable[[Work], None], batches: list[Batch], loss: Callable, exact_loss: object
) -> tuple[float, float]:
    """(length along the exact update, relative error) of the update made by the last batch."""

    def trained(batches: list[Batch]) -> nn.Module:
        torch.manual_seed(0)
        work = Work(mlp().double(), partial(torch.optim.SGD, lr=0.5), loss, batches, 8, exact_loss)
        if batches:
            contestant(work)
        return work.model

    start, end = trained(batches[:-1]), trained(batches)
    start.zero_grad()  # some loops leave their last gradient in place
    batch_value(exact_loss, start(batches[-1].inputs), batches[-1].targets).backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in start.parameters()]) * -0.5
    update = weights_of(end) - weights_of(start)
    return float(update @ exact / exact.square().sum()), float((update - exact).norm() / exact.norm())


def memory_part() -> list[dict]:
    """Peak resident memory of a process that holds 64 images, CNN 3x128x128 of width 32, AdamW."""
    if not PROCESSES.exists():
        return [{"skipped": "the peak of a process is read from Linux's /proc"}]
    cases = {"plain, batch 4": "plain", "this kit, batch 64, micro-batch 4": "batch", "whole batch of 64": "whole"}
    peaks = {}
    for name, case in cases.items():
        command = [sys.executable, "-m", "benchmarks.engine", "child", case]
        # Large freed blocks return to the system at once, so that the peak is that of the tensors in use.
        environment = {name: value for name, value in os.environ.items() if name not in STEADY_ALLOCATOR}
        environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        before, peak = map(float, found.stdout.split()[-2:])
        peaks[name] = (peak, peak - before)
    plain, plain_net = peaks["plain, batch 4"]
    net = "MiB above that before the first step"
    return [
        {"way": name, "MiB": peak, "ratio": peak / plain, net: own, "its ratio": own / plain_net}
        for name, (peak, own) in peaks.items()
    ]


def train_once(case: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer, (batch,) = torch.optim.AdamW(model.parameters()), batches_of((3, 128, 128), [64])
    engine = Engine(model, CrossEntropy(), optimizer, micro_batch=4, log=lambda line: None)
    with open(PROCESSES / "self/clear_refs", "w") as switch:
        switch.write("5")  # resets VmHWM, which holds the peak of the imports
    before = resident("VmRSS")
    for step in range(3):
        if case == "batch":
            engine.step(batch, step)
            continue
        size = 64 if case == "whole" else 4
        for start in range(0, 64, size):
            part = batch.slice(start, start + size)
            F.cross_entropy(model(part.inputs), part.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(before, resident("VmHWM"))


def resident(which: str) -> float:
    """MiB of this process now (VmRSS) or at its peak (VmHWM)."""
    return next(int(line.split()[1]) for line in open(PROCESSES / "self/status") if line.startswith(which)) / 1024


PARTS = {"time": time_part, "passes": passes_part, "error": error_part, "memory": memory_part}


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments[:1] == ["child"]:
        return train_on_demand(*arguments[2:]) if arguments[1] == "trainings" else train_once(arguments[1])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} [all of them]")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    given = parser.parse_args(arguments)
    if wrong := [name for name in given.parts if name not in PARTS]:
        parser.error(f"there is no part {wrong[0]}, only {', '.join(PARTS)}")
    if not os.environ.keys() >= STEADY_ALLOCATOR.keys():  # glibc reads them when a process starts
        again = [sys.executable, "-m", "benchmarks.engine", *arguments]
        os.execve(sys.executable, again, os.environ | STEADY_ALLOCATOR)
    found = figures.facts(threads=1, peers=versions(), seed=0)
    figures.measure({name: PARTS[name] for name in given.parts or PARTS}, found, given.json)


if __name__ == "__main__":
    main(sys.argv[1:])
