"""Two real processes with unequal shares against a single one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.engine.ranks import SINGLE, Ranks
from tests.common.engine.toys import LOSSES, make_model, make_window, reference, relative_error

ROOT = Path(__file__).parents[3]
SECONDS = 30  # from the moment that the processes have met: importing torch can take as long on a busy machine


def run_two(scenario: str, folder: Path) -> list[subprocess.CompletedProcess]:
    """Two processes as torchrun starts them; killed SECONDS after they have met."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
def exact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_two("exact", folder)
    assert [child.returncode for child in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shares, rows", [("unequal", 90), ("one empty", 3)])
def test_the_gradient_of_a_single_process(exact, name, shares, rows):
    value, expected = reference(make_model(), LOSSES[name](), make_window(rows, weighted=True))
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
    """50 and 40 rows, and 8 that fit on the second rank."""
    _, expected = reference(make_model(), LOSSES[name](), make_window(90, weighted=True))
    for rank in range(2):
        assert relative_error(exact[rank][f"{name}, full in {phase}"][1], expected) <= 1e-12
    sizes = [exact[rank][f"{name}, micro-batch after {phase}"] for rank in range(2)]
    assert sizes[0] == sizes[1] <= 8


def test_the_small_calls(tmp_path):
    ended = run_two("talk", tmp_path)
    assert [child.returncode for child in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    said = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
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
        assert ranks.sum_(tensor) is tensor and ranks.gather(tensor) == (tensor, 0) and ranks.share(3) == 3
        assert ranks.union({"a": 1}) == {"a": 1}
        ranks.barrier()
