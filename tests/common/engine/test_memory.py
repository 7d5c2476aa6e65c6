"""Out of memory: recognised in any library's message, exact at every place in a batch, and remembered."""

import ctypes
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from common.engine import memory
from common.errors import UserError
from common.loading.keys import keyed_seed
from tests.common.engine.toys import (
    LOSSES,
    RootMeanSquare,
    SmallMemory,
    cross_entropy,
    gradient_of,
    make_batch,
    make_engine,
    make_model,
    reference,
    relative_error,
    silent,
)

ROOT = Path(__file__).parents[3]
MESSAGES = [
    "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 15.90 GiB total capacity)",
    "CUDA error: out of memory",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    "[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate 800 bytes.",
    "MPS backend out of memory (MPS allocated: 17.2 GB, other allocations: 1.0 GB, max allowed: 18.1 GB)",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_known_messages_are_out_of_memory(message):
    assert memory.is_out_of_memory(RuntimeError(message))
    assert not memory.is_out_of_memory(ValueError(message))


def test_other_errors_are_not():
    assert memory.is_out_of_memory(torch.OutOfMemoryError("")) and memory.is_out_of_memory(MemoryError())
    for message in ("CUDA error: device-side assert triggered", "CUDA error: an illegal memory access was encountered"):
        assert not memory.is_out_of_memory(RuntimeError(message))


def test_the_cpus_own_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float64)
    assert memory.is_out_of_memory(caught.value)


@pytest.mark.parametrize("count, largest", [(37, 8), (64, 64), (5, 8), (9, 1), (65, 64), (0, 4)])
def test_parts_cover_everything_evenly(count, largest):
    sizes = memory.sizes(count, largest)
    assert sum(sizes) == count and len(sizes) == -(-count // largest)
    assert not sizes or (max(sizes) <= largest and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("at", range(4))
def test_a_batch_that_failed_anywhere_is_exact_in_the_end(name, phase, at, monkeypatch):
    """Only 4 rows fit: fails at micro-batch number `at` of 16 rows, then of 8 rows, if there are so many."""
    monkeypatch.setattr(memory, "release", lambda: None)  # collecting garbage takes most of a test's time
    small = SmallMemory(4, phase, at)
    model, loss, batch = make_model(small), LOSSES[name](), make_batch(61, weighted=True)
    small.limit = 10**9
    _, expected = reference(model, loss, batch)
    small.limit, small.calls = 4, 0
    engine = make_engine(model, loss, micro_batch=16)
    engine.gradients(batch, 0)
    assert relative_error(gradient_of(model, loss), expected) <= 1e-12
    assert engine.micro_batch == 4


def test_halving_32_16_8():
    said, small = [], SmallMemory(8, "backward")
    engine = make_engine(make_model(small), cross_entropy, log=said.append)
    engine.step(make_batch(64), 0)
    engine.step(make_batch(64), 1)
    assert engine.micro_batch == 8 and engine.state_dict()["micro_batch"] == 8
    assert [line.split(":")[0] for line in said] == [
        "out of memory at 64 samples",
        "out of memory at 32 samples",
        "out of memory at 16 samples",
        "micro-batch 8",
    ]
    resumed = make_engine(make_model(small), cross_entropy)
    resumed.load_state_dict(engine.state_dict())
    resumed.step(make_batch(64), 2)
    assert resumed.micro_batch == 8


def test_auto_grows_with_the_batches_until_a_limit_is_known():
    engine = make_engine(make_model(), cross_entropy)
    for count, expected in [(5, 5), (64, 64), (7, 64)]:
        assert engine.step(make_batch(count), 0).micro_batch == expected


def test_every_sample_is_seen_in_the_pass_that_counts():
    """The ids that reach the loss in the last, successful pass are those of the batch."""
    seen: list[list[int]] = []
    small = SmallMemory(3, "backward", at=1)
    model, batch = make_model(small), make_batch(29)

    def loss(outputs, targets):
        seen.append(targets.tolist())
        return cross_entropy(outputs, targets % 6)

    batch.targets.copy_(batch.index)
    engine = make_engine(model, loss, micro_batch=8)
    engine.gradients(batch, 0)
    last_pass = seen[-len(memory.sizes(29, engine.micro_batch)) :]
    assert sorted(row for part in last_pass for row in part) == list(range(29))


def test_dropout_and_batchnorm_after_a_failure_are_those_of_a_first_try():
    batch = make_batch(32)

    def run(limit):
        small = SmallMemory(limit, "backward", at=1)
        model = make_model(nn.BatchNorm1d(48), nn.Dropout(0.3), small)
        engine = make_engine(model, cross_entropy, micro_batch=8 if limit > 8 else 16, seed=3)
        engine.gradients(batch, 0)
        return gradient_of(model, None), model[1].state_dict(), engine.micro_batch

    (gradient, norm, size), (expected, expected_norm, expected_size) = run(8), run(100)
    assert size == expected_size == 8
    assert torch.equal(gradient, expected)
    assert all(torch.equal(norm[name], expected_norm[name]) for name in norm)
    assert int(norm["num_batches_tracked"]) == 4


def test_the_failed_pass_is_given_back_before_the_next(monkeypatch):
    """Activations of the failure are freed when the cache is emptied, not only after the retry."""
    alive, at_release = [], []

    class Watch(nn.Module):
        def forward(self, inputs):
            output = inputs * 1.0
            alive.append(weakref.ref(output))
            return output

    def release():
        gc.collect()
        at_release.append(sum(reference() is not None for reference in alive))

    monkeypatch.setattr(memory, "release", release)
    for name in LOSSES:
        alive.clear()
        model = make_model(Watch(), SmallMemory(4, "backward", at=1))
        make_engine(model, LOSSES[name](), micro_batch=8).gradients(make_batch(32), 0)
    assert at_release and not any(at_release)


def test_a_single_sample_that_does_not_fit_names_the_flags():
    engine = make_engine(make_model(SmallMemory(0)), cross_entropy)
    with pytest.raises(UserError, match="--checkpointing.*input size.*--precision bf16"):
        engine.step(make_batch(8), 0)


def test_other_errors_pass_through():
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side"):
        make_engine(make_model(SmallMemory(0, error=error)), cross_entropy).step(make_batch(8), 0)


def test_out_of_memory_in_the_optimizer_is_final():
    engine = make_engine(make_model(), cross_entropy, micro_batch=8)
    calls = []

    def full(closure=None):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine.optimizer.step = full
    with pytest.raises(UserError, match="inside the optimizer, in step 6.*--micro-batch 4"):
        engine.step(make_batch(16), 5)
    assert len(calls) == 1


def test_a_buffer_that_is_assigned_is_put_back_too():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, inputs):
            self.count = self.count + 1
            return inputs

    model = make_model(Counter(), SmallMemory(8, "backward", at=1))
    make_engine(model, RootMeanSquare(), micro_batch=16, log=silent).step(make_batch(32), 0)
    assert float(model[1].count) == 4


def test_seeds_of_steps_and_ranks_differ():
    assert keyed_seed(0, 0) != keyed_seed(0, 1)
    engines = [make_engine(make_model(), cross_entropy, seed=seed) for seed in (0, 1)]
    assert engines[0].passes.generators._first != engines[1].passes.generators._first


STEPS = """
import resource, sys, torch
from common.engine import memory
memory.keep_freed(sys.argv[1] == "keep")
torch.ones(1000)
def step():
    for _ in range(8):
        torch.ones(1 << 20)  # 4 MiB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's malloc only")
def test_freed_memory_is_kept_or_given_back():
    """Counts page faults: memory that was given back to the system costs at least one fault in each of 64 blocks."""

    def cleared(choice):
        done = subprocess.run(
            [sys.executable, "-c", STEPS, choice], capture_output=True, text=True, check=True, cwd=ROOT
        )
        return int(done.stdout)

    kept, given_back = cleared("keep"), cleared("give back")
    assert given_back >= 64 and kept < given_back / 10, "kept may be a block more, where the heap lay badly at first"
