"""The program of each process in the tests of ranks.

python -m tests.common.engine.two_ranks SCENARIO,SCENARIO... FOLDER: writes FOLDER/SCENARIO/RANK.pt for each.
"""

import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from common.__main__ import leave
from common.engine import memory
from common.engine import ranks as module
from common.engine.ranks import Ranks
from common.engine.step import Engine
from common.errors import UserError
from common.fit import fit
from common.run import Run
from tests.common.engine.toys import LOSSES, SmallMemory, gradient_of, make_batch, make_engine, make_model
from tests.common.test_fit import CONFIG, task_of

SHARES = {"unequal": (0, 50, 90), "one empty": (0, 3, 3)}  # bounds of the rows of rank 0 and rank 1


def share_of(ranks: Ranks, shares: str):
    bounds = SHARES[shares]
    whole = make_batch(bounds[-1], weighted=True)
    return replace(whole.slice(bounds[ranks.rank], bounds[ranks.rank + 1]), total=len(whole))


def exact(ranks: Ranks, folder: Path) -> None:
    """Gradients for every kind of loss, with enough memory, and with too little on the second rank."""
    found = {}
    for name in LOSSES:
        for shares in SHARES:
            model, loss = make_model(), LOSSES[name]()
            engine = make_engine(model, loss, micro_batch=16, ranks=ranks)
            for step in range(2):
                value = engine.gradients(share_of(ranks, shares), step)
                found[f"{name}, {shares}, {step}"] = (value, gradient_of(model, loss))
        for phase in ("forward", "backward"):
            small = SmallMemory(10**9 if ranks.is_writer else 8, phase)
            model, loss = make_model(small), LOSSES[name]()
            engine = make_engine(model, loss, ranks=ranks)
            value = engine.gradients(share_of(ranks, "unequal"), 0)
            found[f"{name}, full in {phase}"] = (value, gradient_of(model, loss))
            found[f"{name}, micro-batch after {phase}"] = engine.micro_batch
    torch.save(found, folder / f"{ranks.rank}.pt")


def talk(ranks: Ranks, folder: Path) -> None:
    """Call every method of Ranks once, after steps with BatchNorm and a frozen parameter that keep the ranks equal."""
    model = make_model(nn.BatchNorm1d(48), nn.Dropout(0.2))
    model[0].bias.requires_grad_(False)
    engine = make_engine(model, LOSSES["cross-entropy"](), micro_batch=16, clip_norm=0.1, ranks=ranks)
    losses = [float(engine.step(share_of(ranks, "unequal"), step).loss) for step in range(3)]
    rows = {"a": torch.full((ranks.rank + 1, 2), ranks.rank), "b": (torch.tensor([True, False])[: ranks.rank + 1],)}
    said = {
        "any": [ranks.any(False), ranks.any(ranks.rank == 1)],
        "sum": ranks.sum_(torch.tensor([1.0, ranks.rank])),
        "share": ranks.broadcast({"run": "one"} if ranks.is_writer else None),
        "gather": ranks.gather(rows),
        "gather from the second": ranks.gather(None if ranks.is_writer else rows),
        "union": ranks.union({ranks.rank: "own", "both": 0}),
        "losses": losses,
        "model": model.state_dict(),
    }
    ranks.barrier()
    torch.save(said, folder / f"{ranks.rank}.pt")


def killed(ranks: Ranks, folder: Path) -> None:
    """The second process is killed in its third step."""
    engine = make_engine(make_model(), LOSSES["cross-entropy"](), micro_batch=16, ranks=ranks)
    for step in range(10):
        if step == 2 and not ranks.is_writer:
            os.kill(os.getpid(), signal.SIGKILL)
        engine.step(share_of(ranks, "unequal"), step)


def trained(ranks: Ranks, folder: Path) -> None:
    """Train a whole fold of the toy, with validation, averaged weights, and a last batch of one row."""
    rows, step = [], Engine.step

    def counting(self, batch, number):
        rows.append((len(batch), batch.total))
        return step(self, batch, number)

    Engine.step = counting
    home = folder / str(ranks.rank)
    home.mkdir()
    os.chdir(home)
    fit(task_of(CONFIG), CONFIG, Run(folder, {}, is_writer=ranks.is_writer), 1, ranks)
    torch.save(rows, folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.SGD(make_model().parameters())  # the first optimizer imports torch's compiler, which takes seconds
    module.PATIENCE = timedelta(minutes=2)
    memory.release = lambda: None  # collecting garbage takes most of the time of so small an example
    try:
        with Ranks.from_environment() as all_ranks:
            print("met", flush=True)
            for name in sys.argv[1].split(","):
                place = Path(sys.argv[2]) / name
                place.mkdir(exist_ok=True)
                {"exact": exact, "talk": talk, "killed": killed, "trained": trained}[name](all_ranks, place)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(1)
