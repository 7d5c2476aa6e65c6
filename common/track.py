"""`--track tensorboard` or `--track wandb`: every row of metrics.csv goes there too.

Both are optional packages, imported only when they are used. Every fold has its own curves in both; in wandb a fold
that was resumed goes on in another run of the same name.
"""

from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import UserError
from common.run import Run

Ways = tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]  # log an epoch's numbers; close
_open: dict[Path, Ways] = {}  # by the fold's folder; folds are trained one at a time


def check(config: Config) -> None:
    """Raises UserError when the tracker is not installed: before anything is trained."""
    if config.track != "none" and find_spec(config.track) is None:
        raise UserError(f"--track {config.track} needs a package: .venv/bin/python -m pip install {config.track}")


def epoch(run: Run, config: Config, fold: int | None, row: dict[str, Any]) -> None:
    """Send an epoch's row of metrics.csv; of several processes only the first one sends it."""
    if config.track == "none" or not run.is_writer:
        return
    folder = run.fold_folder(fold).absolute()
    if folder not in _open:
        close()
        _open[folder] = {"tensorboard": _tensorboard, "wandb": _wandb}[config.track](run, config, folder, row["epoch"])
    numbers = {name: float(value) for name, value in row.items() if name not in ("fold", "epoch") and value is not None}
    add, _ = _open[folder]
    add(numbers, row["epoch"])


def close() -> None:
    """Close the open tracker; exiting the program does so too."""
    while _open:
        _, (_, end) = _open.popitem()
        end()


def _tensorboard(run: Run, config: Config, folder: Path, first: int) -> Ways:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.path / "tensorboard" / folder.name), purge_step=first)  # a resumed run repeats some

    def add(numbers: dict[str, float], number: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, number)
        writer.flush()

    return add, writer.close


def _wandb(run: Run, config: Config, folder: Path, first: int) -> Ways:
    import wandb

    there = wandb.init(
        project=run.provenance["competition"],
        group=run.name,
        name=f"{run.name} {folder.name}",
        config=asdict(config),
        dir=str(run.path),
        reinit="create_new",
    )
    return lambda numbers, number: there.log(numbers, step=number), there.finish
