"""The device, precision and threads of a run, and the memory that it used."""

import os
import resource
import sys

import torch

from common.config import Config
from common.engine import memory
from common.engine.precision import Precision, best_precision
from common.engine.ranks import SINGLE, Ranks
from common.errors import UserError
from common.loading.cores import cores


def device_of(config: Config, local_rank: int = 0, world: int = 1) -> torch.device:
    """The device that --device names; `auto` takes a CUDA card, then Apple's GPU, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    asked = next(kind for kind, there in available.items() if there) if config.device == "auto" else config.device
    kind, colon, number = asked.partition(":")
    cards = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind, False) or (colon and not (number.isdecimal() and int(number) < cards)):
        there = ", ".join(kind for kind, there in available.items() if there)
        numbers = f" (cuda:0 to cuda:{torch.cuda.device_count() - 1})" * available["cuda"]
        raise UserError(f"--device {config.device} is not available: expected auto or one of {there}{numbers}")
    if colon and world > 1:
        raise UserError(f"--device {asked}: {world} processes cannot share it: --device {kind} gives each its own")
    if kind == "cuda" and local_rank >= cards:
        raise UserError(
            f"process {local_rank + 1} of this machine has no card of its own (cards: {cards}): "
            f"start as many as there are, NPROC={cards}, or use --device cpu"
        )
    if kind == "mps" and world > 1:
        raise UserError(f"{world} processes cannot share an Apple GPU: start one, without NPROC, or use --device cpu")
    return torch.device(f"cuda:{local_rank}" if asked == "cuda" else asked)


def precision_of(config: Config, device: torch.device, ranks: Ranks = SINGLE) -> Precision:
    """fp32, bf16 or fp16; `auto` is the one that the hardware multiplies fastest.

    Of the cards of several processes the oldest decides: with the loss scale of fp16 in only one of them, their
    gradients would not add up.
    """
    if config.precision != "auto":
        return config.precision
    order = ("bf16", "fp16", "fp32")  # from the newest cards to the oldest
    return order[int(ranks.max_(torch.tensor(order.index(best_precision(device)))))]


def prepare_device(device: torch.device, channels_last: bool) -> torch.memory_format:
    """Set torch up to train or predict on `device`; returns the memory format for the models.

    On a CUDA card: TF32 for the operations left in float32, and always channels_last, the layout that tensor cores work
    in. cuDNN chooses its convolutions by rule: trying all of them took 4 s at the start, did not make a U-Net's steps
    faster and those of digits by 3 %, and may choose others in the next run. A CPU keeps torch's defaults.
    Frees what an earlier fold has left: its engine and the CUDA graph refer to each other.
    """
    memory.release()
    if device.type != "cuda":
        return torch.channels_last if channels_last else torch.preserve_format
    torch.set_float32_matmul_precision("high")
    return torch.channels_last


def workers_of(config: Config, device: torch.device) -> int:
    """How many loading workers this process starts: --workers if that is a number.

    "auto" is its share of the cores less one for itself, or a quarter of them when they compute the network too.
    """
    if config.workers != "auto":
        return config.workers
    return max(0, cores() - 1) if device.type != "cpu" else cores() // 4


def threads_of(config: Config, workers: int) -> int:
    """CPU threads of this process beside its `workers` (0 for data held as tensors): --threads unless that is 0.

    0 takes the cores that the workers leave free, at most OMP_NUM_THREADS.
    """
    free = cores() - workers
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return config.threads or max(1, min(free, int(wanted)) if wanted.isdecimal() and int(wanted) else free)


def use_threads(config: Config, with_workers: bool = False) -> None:
    """Apply --threads and --keep-memory to this process; `with_workers` leaves cores to its loading workers."""
    memory.keep_freed(config.keep_memory)
    torch.set_num_threads(threads_of(config, workers_of(config, device_of(config)) if with_workers else 0))


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: what torch has allocated on a card, or what this process has used of main memory."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)
