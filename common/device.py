"""Where and how exactly a run computes: the device, the precision, the threads, and the memory it took."""

import resource
import sys

import torch

from common.config import Config
from common.engine import memory
from common.errors import UserError


def device_of(config: Config, local_rank: int = 0, world: int = 1) -> torch.device:
    """The device that --device names; `auto` takes a CUDA card, then Apple's GPU, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, there in available.items() if there) if config.device == "auto" else config.device
    if not available.get(kind.split(":")[0], False):
        there = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"--device {config.device} is not there: expected auto or one of {there}")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank + 1} of this machine has no card of its own (cards: {torch.cuda.device_count()}): "
            f"start as many as there are, NPROC={torch.cuda.device_count()}, or use --device cpu"
        )
    if kind == "mps" and world > 1:
        raise UserError(f"{world} processes cannot share an Apple GPU: start one, without NPROC, or use --device cpu")
    return torch.device(kind if kind != "cuda" else f"cuda:{local_rank}")


def precision_of(config: Config, device: torch.device) -> str:
    """fp32, bf16 or fp16; `auto` is bf16 where the hardware multiplies it natively (CUDA cards, CPUs with AMX)."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def use_threads(config: Config) -> None:
    """Apply --threads and --keep-memory to this process."""
    memory.keep_freed(config.keep_memory)
    if config.threads:
        torch.set_num_threads(config.threads)


def peak_memory(device: torch.device) -> float:
    """GiB: the most that torch has allocated on a card, or that this process has taken of the computer."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)
