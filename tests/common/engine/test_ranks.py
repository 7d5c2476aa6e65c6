"""Two real processes with unequal shares of the rows, compared with a single process."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.engine.ranks import SINGLE, Ranks
from common.fit import fit
from common.fold import MACHINE_COLUMNS
from common.run import Run
from tests.common.engine.toys import LOSSES, make_batch, make_model, reference, relative_error
from tests.common.test_fit import CONFIG, task_of

ROOT = Path(__file__).parents[3]
SECONDS = 120  # counted once both are connected; importing torch before can take as long on a busy machine


def free_port() -> int:
    """A port below the range that the system assigns, so that no parallel test is given it before it is used."""
    first = 20_000 + os.getpid() % 10_000
    for port in range(first, first + 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {first} to {first + 99} is free")


def run_two(scenario: str, folder: Path) -> list[subprocess.CompletedProcess]:
    """Run two processes as torchrun starts them; they are killed SECONDS after they connected."""
    port = free_port()
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "tests.common.engine.two_ranks", scenario, str(folder)]
    children = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    ended = []
    try:
        for child in children:
            child.stdout.readline()
        for child in children:
            _, errors = child.communicate(timeout=SECONDS)
            ended.append(subprocess.CompletedProcess(command, child.returncode, stderr=errors))
    finally:
        for child in children:
            child.kill()
            child.wait()
    return ended


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder with the results of two processes, started once because starting takes longer than their work."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_two("exact,talk,trained", folder)
    assert [child.returncode for child in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    return folder


def said_by(folder: Path) -> list:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def exact(done):
    return said_by(done / "exact")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shares, rows", [("unequal", 90), ("one empty", 3)])
def test_the_gradient_of_a_single_process(exact, name, shares, rows):
    value, expected = reference(make_model(), LOSSES[name](), make_batch(rows, weighted=True))
    for rank in range(2):
        for step in range(2):
            found_value, found = exact[rank][f"{name}, {shares}, {step}"]
            assert relative_error(found, expected) <= 1e-12
            assert float(found_value) == pytest.approx(float(value), rel=1e-12)
    assert all(
        torch.equal(exact[0][f"{name}, {shares}, {s}"][1], exact[1][f"{name}, {shares}, {s}"][1]) for s in (0, 1)
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_out_of_memory_on_one_rank_shrinks_both(exact, name, phase):
    """The ranks have 50 and 40 rows, and only 8 fit on the second one."""
    _, expected = reference(make_model(), LOSSES[name](), make_batch(90, weighted=True))
    for rank in range(2):
        assert relative_error(exact[rank][f"{name}, full in {phase}"][1], expected) <= 1e-12
    sizes = [exact[rank][f"{name}, micro-batch after {phase}"] for rank in range(2)]
    assert sizes[0] == sizes[1] <= 8


def test_the_small_calls(done):
    said = said_by(done / "talk")
    for rank, found in enumerate(said):
        assert found["any"] == [False, True]
        assert found["sum"].tolist() == [2, 1]
        assert found["share"] == {"run": "one"}
        rows, first = found["gather"]
        assert rows["a"].tolist() == [[0, 0], [1, 1], [1, 1]] and first == rank
        assert rows["b"][0].tolist() == [True, True, False]
        assert found["gather from the second"][0]["a"].tolist() == [[1, 1], [1, 1]]
        assert found["union"] == {0: "own", 1: "own", "both": 0}
        assert found["losses"] == said[0]["losses"]
        assert all(torch.equal(found["model"][name], said[0]["model"][name]) for name in found["model"])
        assert int(found["model"]["1.num_batches_tracked"]) == 12, "three steps of 50 rows in micro-batches of 16"


def test_a_fold_trained_by_two_is_that_of_one(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared, alone = done / "trained" / "fold-1", fit(task_of(CONFIG), CONFIG, Run(tmp_path, {}), 1, SINGLE)
    two, one = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (shared, alone))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    two, one = (np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True) for folder in (shared, alone))
    for name in set(one.dtype.names) - set(MACHINE_COLUMNS):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)
    assert np.array_equal(np.load(shared / "oof_rows.npy"), np.load(alone / "oof_rows.npy"))
    rows = said_by(done / "trained")  # (rows of this rank, rows of both) for every step
    assert [a + b for (a, _), (b, _) in zip(*rows, strict=True)] == [total for _, total in rows[0]] == 3 * [16, 16, 1]


def test_a_killed_rank_ends_the_job_with_a_message(tmp_path):
    writer, other = run_two("killed", tmp_path)
    assert other.returncode == -9 and writer.returncode == 1
    last = writer.stderr.strip().splitlines()[-1]
    assert last.startswith("error: process 0 of 2 lost the others") and "Repeat the same command" in last


def test_alone_everything_is_at_once():
    with Ranks.from_environment() as ranks:
        assert ranks is SINGLE and ranks.is_writer
        assert ranks.any(True) and not ranks.any(False)
        tensor = torch.ones(2)
        assert ranks.sum_(tensor) is tensor and ranks.gather(tensor) == (tensor, 0) and ranks.broadcast(3) == 3
        assert ranks.union({"a": 1}) == {"a": 1}
        ranks.barrier()


def test_statistics_of_ranks_are_averaged_by_what_they_saw(monkeypatch):
    """The other rank has means 5 and 7 from a single sample, and has counted 9 batches."""
    others = torch.tensor([5.0, 7.0])
    monkeypatch.setattr(Ranks, "sum_", lambda self, tensor: tensor + (others if tensor.ndim else 1.0))
    monkeypatch.setattr(Ranks, "max_", lambda self, tensor: tensor.clamp(min=9))
    for weight, expected in ((3, [2, 4]), (0, [5, 7])):
        mean, count = torch.tensor([1.0, 3.0]), torch.tensor(5)
        Ranks(0, 2).average_([mean, count], weight)
        assert mean.tolist() == expected and int(count) == 9


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_gradient_that_others_sent_lies_in_memory_as_its_weight_does(name, monkeypatch):
    """A rank without samples gets its gradient from the others, and fused kernels ignore its strides."""
    weights, gradient = torch.randn(2, 4, 3, 3, 3)
    monkeypatch.setattr(Ranks, "max_", lambda self, present: torch.ones_like(present))
    monkeypatch.setattr(Ranks, "sum_", lambda self, flat: flat + gradient.reshape(-1))
    found, expected = (
        torch.nn.Parameter(weights.clone().contiguous(memory_format=form))
        for form in (torch.channels_last, torch.contiguous_format)
    )
    Ranks(0, 2).sum_gradients([found])
    expected.grad = gradient
    assert torch.equal(found.grad, gradient) and found.grad.stride() == found.stride()
    for parameter in (found, expected):
        getattr(torch.optim, name)([parameter], lr=0.1, fused=True).step()
    torch.testing.assert_close(found.detach(), expected.detach())
