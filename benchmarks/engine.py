"""The engine beside a hand-written loop and beside its peers: time, exactness and memory of an optimizer step.

    make bench BENCH=engine                  everything that this machine can run (about three minutes on two cores)
    make bench BENCH=engine ARGS="time"      one part: time, passes, error, memory, cuda

Every contestant has a process of its own, because merely importing some of the peers slows every torch call around it.
They take turns, and the undisturbed steps of each count. All train the same network on the same batches, drawn from a
DataLoader that holds them ready, with a C allocator that keeps its memory: otherwise the ratios show where glibc
happens to give pages back. requirements-peers.txt lists the peers.
"""

import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.engine_parts.cuda import cuda_part
from benchmarks.engine_parts.peers import PEERS, Work, installed
from common.engine.step import Engine
from common.losses import CrossEntropy, SoftFBeta, window_value
from common.window import Window

PROCESSES = Path("/proc")  # Linux only
ACCUMULATE = 4
STEADY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "100000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


def silent(message: str) -> None:
    """The engine's log, which nobody reads here."""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 10))


NETWORKS = {"MLP 16-32-10": (mlp, (16,)), "CNN 3x32x32": (cnn, (3, 32, 32))}
STEPS = {"MLP 16-32-10": 60, "CNN 3x32x32": 16}  # of a training


def batches_of(shape: tuple[int, ...], sizes: list[int], dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=dtype),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for size in sizes
    ]


def as_windows(batches: list, accumulate: int = ACCUMULATE) -> list[Window]:
    """The same samples as windows of `accumulate` batches, the last one of what is left."""
    groups = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    inputs = [torch.cat([x for x, _ in group]) for group in groups]
    targets = [torch.cat([y for _, y in group]) for group in groups]
    return [Window(x, y, torch.arange(len(x))) for x, y in zip(inputs, targets, strict=True)]


def hand_written(work: Work) -> None:
    """The loop that everybody writes: a mean loss over the number of batches, a step every few of them."""
    model, optimizer, last = work.model, work.optimizer(work.model), len(work.batches) - 1
    for number, (inputs, targets) in enumerate(DataLoader(work.batches, batch_size=None)):
        if number % ACCUMULATE == 0:
            work.tick()
        (work.loss(model(inputs), targets) / ACCUMULATE).backward()
        if number % ACCUMULATE == ACCUMULATE - 1 or number == last:
            optimizer.step()
            optimizer.zero_grad()
    work.tick()


def ours(work: Work) -> None:
    engine = Engine(
        work.model, work.exact_loss, work.optimizer(work.model), micro_batch=len(work.batches[0][0]), log=silent
    )
    for number, window in enumerate(DataLoader(as_windows(work.batches), batch_size=None)):
        work.tick()
        engine.step(window, number)
    work.tick()


def ours_with_fused(work: Work) -> None:
    """With the optimizer that build_optimizer makes: torch's fused kernels, one pass over the weights."""
    work.make_optimizer = partial(work.make_optimizer, fused=True)
    ours(work)


KIT = {"this kit": ours, "this kit, its fused optimizer": ours_with_fused}
CONTESTANTS: dict[str, Callable[[Work], None]] = {"hand-written loop": hand_written} | KIT | PEERS


def step_times(ticks: list[float]) -> list[float]:
    """Seconds of every optimizer step but the first ten, in which caches and allocators warm up."""
    return [after - before for before, after in zip(ticks[10:], ticks[11:], strict=False)]


def quickest(turns: list[list[float]]) -> float:
    """The lower decile of all steps: those that shared the processor with something else drop out."""
    steps = sorted(seconds for turn in turns for seconds in turn)
    return steps[len(steps) // 10]


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


class Turns:
    """A contestant in a process of its own: what a peer changes by being imported slows nobody else."""

    def __init__(self, name: str, network: str):
        command = [sys.executable, "-m", "benchmarks.engine", "child", "turns", name, network]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take(self) -> list[float]:
        """Seconds of every step of one more training."""
        print("go", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of a contestant ended with {self.process.wait()}: {self.process.args}")
        return json.loads(answer)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(name: str, network: str) -> None:
    """The child's side of Turns: a training for every line of the input, whatever the peers print."""
    answers, sys.stdout = sys.stdout, sys.stderr
    make, shape = NETWORKS[network]
    batches = batches_of(shape, [32] * (ACCUMULATE * STEPS[network]))
    for _ in sys.stdin:
        optimizer, exact = partial(torch.optim.AdamW, lr=1e-3), CrossEntropy(ignore_index=None)
        work = Work(make(), optimizer, F.cross_entropy, batches, exact)
        CONTESTANTS[name](work)
        print(json.dumps(step_times(work.ticks)), file=answers, flush=True)


def time_part(turns: int = 12) -> None:
    """Time of an optimizer step of 4 batches of 32, AdamW."""
    names = [name for name in CONTESTANTS if installed(name)]
    columns: dict[str, dict[str, float]] = {}
    for network in NETWORKS:
        contestants = {name: Turns(name, network) for name in names}
        taken: dict[str, list[list[float]]] = {name: [] for name in names}
        for _ in range(turns if network.startswith("MLP") else turns // 2):
            for name, contestant in contestants.items():
                taken[name].append(contestant.take())
        for contestant in contestants.values():
            contestant.end()
        columns[network] = {name: quickest(taken[name]) for name in names}
    rows = []
    for name in CONTESTANTS:
        cells = []
        for found in columns.values():
            if name in found:
                cells += [f"{found[name] * 1e3:.2f}", f"{found[name] / found['hand-written loop']:.2f}"]
            else:
                cells += ["not installed", ""]
        rows.append([name, *cells])
    header = ["", *(f"{network}, {what}" for network in NETWORKS for what in ("ms", "ratio"))]
    table("Time per optimizer step, 4 batches of 32, AdamW", header, rows)


def passes_part(turns: int = 12) -> None:
    """A loss that needs two passes against the naive accumulation of the same loss."""
    rows = []
    for network, (make, shape) in NETWORKS.items():
        steps = 40 if network.startswith("MLP") else 16
        batches = batches_of(shape, [32] * (ACCUMULATE * steps))
        batches = [(inputs, F.one_hot(targets, 10).float()) for inputs, targets in batches]
        f1 = SoftFBeta(1, "macro")
        naive_loss = partial(window_value, f1)
        taken: dict[str, list[list[float]]] = {"naive": [], "exact": [], "forward": []}
        for _ in range(turns):
            for name, contestant in (("naive", hand_written), ("exact", ours)):
                work = Work(make(), partial(torch.optim.AdamW, lr=1e-3), naive_loss, batches, f1)
                contestant(work)
                taken[name].append(step_times(work.ticks))
            model, ticks = make(), []
            with torch.no_grad():
                for number, (inputs, targets) in enumerate(batches):
                    if number % ACCUMULATE == 0:
                        ticks.append(time.perf_counter())
                    f1.stats(model(inputs), targets)
            taken["forward"].append(step_times(ticks))
        naive, exact, forward = (quickest(taken[name]) for name in ("naive", "exact", "forward"))
        bound = 1 + forward / naive + 0.05
        rows.append([network, f"{naive * 1e3:.2f}", f"{exact * 1e3:.2f}", f"{exact / naive:.2f}", f"{bound:.2f}"])
    header = ["", "naive, ms", "exact, ms", "ratio", "1 + F/(F+B) + 5 %"]
    table("Macro soft F1: two passes against naive accumulation", header, rows)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def error_part() -> None:
    """The update against SGD on the exact gradient of the window; 37 samples, batches of 8, 4 of them an update."""
    rows = []
    for name, contestant in CONTESTANTS.items():
        if not installed(name):
            rows.append([name, "not installed", "", ""])
            continue
        batches = batches_of((16,), [8, 8, 8, 8, 5], torch.float64)
        ratio, tail_error = update_error(contestant, batches, F.cross_entropy, CrossEntropy(), first=4)
        f1, hot = SoftFBeta(1, "macro"), [(x, F.one_hot(y, 10).double()) for x, y in batches[:4]]
        _, f1_error = update_error(contestant, hot, partial(window_value, f1), f1, first=0)
        rows.append([name, f"{ratio:.3f}", f"{tail_error:.1e}", f"{f1_error:.1e}"])
    header = ["", "last window: update / exact", "relative error", "macro soft F1: relative error"]
    table("Error of the update", header, rows)


def update_error(
    contestant: Callable[[Work], None], batches: list, loss: Callable, exact_loss: object, first: int
) -> tuple[float, float]:
    """(length along the exact update, relative error) of the update made by the batches from number `first` on."""

    def trained(count: int) -> nn.Module:
        torch.manual_seed(0)
        work = Work(mlp().double(), partial(torch.optim.SGD, lr=0.5), loss, batches[:count], exact_loss)
        if count:
            contestant(work)
        return work.model

    start, end = trained(first), trained(len(batches))
    (window,) = as_windows(batches[first:])
    start.zero_grad()  # some leave the last gradient behind
    window_value(exact_loss, start(window.inputs), window.targets).backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in start.parameters()]) * -0.5
    update = weights_of(end) - weights_of(start)
    return float(update @ exact / exact.square().sum()), float((update - exact).norm() / exact.norm())


def memory_part() -> None:
    """Peak memory of a child process; every child holds the same 64 images."""
    if not PROCESSES.exists():
        print("memory: skipped, the peak of a process is read from Linux's /proc")
        return
    cases = {"plain, batch 4": "plain", "this kit, window 64, micro-batch 4": "window", "whole batch of 64": "whole"}
    peaks = {}
    for name, case in cases.items():
        command = [sys.executable, "-m", "benchmarks.engine", "child", case]
        # Large blocks go back to the system at once, so that the peak is the tensors' and not the allocator's.
        environment = {name: value for name, value in os.environ.items() if name not in STEADY_ALLOCATOR}
        environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        before, peak = map(float, found.stdout.split()[-2:])
        peaks[name] = (peak, peak - before)
    plain, plain_net = peaks["plain, batch 4"]
    rows = [
        [name, f"{peak:.0f}", f"{peak / plain:.3f}", f"{net:.0f}", f"{net / plain_net:.3f}"]
        for name, (peak, net) in peaks.items()
    ]
    header = ["", "MiB", "ratio", "MiB above that before the first step", "ratio"]
    table("Peak resident memory, CNN 3x128x128 of width 32, AdamW", header, rows)


def train_once(case: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer, ((inputs, targets),) = torch.optim.AdamW(model.parameters()), batches_of((3, 128, 128), [64])
    engine = Engine(model, CrossEntropy(), optimizer, micro_batch=4, log=silent)
    with open(PROCESSES / "self/clear_refs", "w") as switch:
        switch.write("5")  # forget the peak of the imports
    before = resident("VmRSS")
    for step in range(3):
        if case == "window":
            engine.step(Window(inputs, targets, torch.arange(64)), step)
            continue
        size = 64 if case == "whole" else 4
        for start in range(0, 64, size):
            F.cross_entropy(model(inputs[start : start + size]), targets[start : start + size]).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(before, resident("VmHWM"))


def resident(which: str) -> float:
    """MiB of this process now (VmRSS) or at its peak (VmHWM)."""
    return next(int(line.split()[1]) for line in open(PROCESSES / "self/status") if line.startswith(which)) / 1024


def machine() -> Iterator[str]:
    """Hardware and versions, a line each."""
    facts = (PROCESSES / "cpuinfo").read_text().splitlines() if PROCESSES.exists() else []
    cpu = next((line.split(":")[1].strip() for line in facts if "model name" in line), platform.machine())
    yield f"{cpu}, {os.cpu_count()} cores, 1 thread used, load {os.getloadavg()[0]:.1f}"
    yield f"Python {platform.python_version()}, torch {torch.__version__}"
    yield "peers: " + ", ".join(f"{name} {installed(name) or 'not installed'}" for name in PEERS)
    yield f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no card, its part is skipped'}"


PARTS = {"time": time_part, "passes": passes_part, "error": error_part, "memory": memory_part, "cuda": cuda_part}


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments[:1] == ["child"]:
        return take_turns(*arguments[2:]) if arguments[1] == "turns" else train_once(arguments[1])
    if not os.environ.keys() >= STEADY_ALLOCATOR.keys():  # glibc reads them when a process starts
        again = [sys.executable, "-m", "benchmarks.engine", *arguments]
        os.execve(sys.executable, again, os.environ | STEADY_ALLOCATOR)
    print("\n".join(machine()))
    for name in arguments or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
