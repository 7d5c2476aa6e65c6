"""What only a CUDA card can show: peak memory and speed of large networks, and an out-of-memory error survived."""

import time

import torch
from torch import nn

from common.engine.optimizers import allocate_state
from common.engine.step import Engine
from common.losses import BCEDice, CrossEntropy
from common.batch import Batch

GIB = 2**30


def nasnet() -> tuple[nn.Module, object, Batch]:
    import timm

    inputs = torch.randn(64, 4, 512, 512).pin_memory()
    batch = Batch(inputs, torch.randint(0, 5, (64,)), torch.arange(64))
    return timm.create_model("nasnetalarge", in_chans=4, num_classes=5), CrossEntropy(), batch


def unet() -> tuple[nn.Module, object, Batch]:
    import segmentation_models_pytorch

    inputs, masks = torch.randn(16, 3, 1408, 2112).pin_memory(), torch.rand(16, 4, 1408, 2112) > 0.7
    model = segmentation_models_pytorch.Unet("resnet34", encoder_weights=None, classes=4)
    return model, BCEDice(), Batch(inputs, masks.float().pin_memory(), torch.arange(16))


def cuda_part() -> None:
    """NASNet-A-Large at 4x512x512 and a U-Net at 1408x2112 with bf16, micro-batches found by the engine."""
    if not torch.cuda.is_available():
        print("\nCUDA: skipped, there is no card")
        return
    print("\n| network | batch | micro-batch | memory allowed, GiB | peak, GiB | images/s |\n|---|---|---|---|---|---|")
    whole = torch.cuda.get_device_properties(0).total_memory
    for make in (nasnet, unet):
        for part in (1.0, 0.25):
            torch.cuda.set_per_process_memory_fraction(part)
            row = measure(*make())
            print(f"| {make.__name__} | {row[0]} | {row[1]} | {whole * part / GIB:.0f} | {row[2]:.1f} | {row[3]:.1f} |")
    torch.cuda.set_per_process_memory_fraction(1.0)


def measure(model: nn.Module, loss: object, batch: Batch) -> tuple[int, int, float, float]:
    """(batch, settled micro-batch, peak GiB, images per second) of training steps after the micro-batch settled."""
    torch.cuda.empty_cache()
    model = model.cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    allocate_state(optimizer)
    engine = Engine(model, loss, optimizer, precision="bf16")
    engine.step(batch, 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for step in range(1, 4):
        engine.step(batch, step)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return len(batch), engine.micro_batch, torch.cuda.max_memory_allocated() / GIB, 3 * len(batch) / seconds
