"""The benchmarks start, refuse wrong arguments and compare equal work; nothing is timed here."""

import importlib
import json
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import clouds, embedding, engine, gpu, kdd, loaders
from benchmarks.engine_parts.peers import Work
from benchmarks.gpu_parts import training
from benchmarks.tools import arguments, figures, turns
from common.losses import CrossEntropy, SoftFBeta, batch_value

ROOT = Path(__file__).parents[1]
MODULES = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in ROOT.glob("benchmarks/**/*.py"))
OFFERED = sorted(file.stem for file in ROOT.glob("benchmarks/*.py") if file.stem != "__init__")  # as in the Makefile


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_without_the_peers(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", OFFERED)
def test_whatever_make_offers_is_a_benchmark(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


# The engine.


@pytest.mark.parametrize("contestant", engine.KIT.values(), ids=engine.KIT)
def test_the_update_of_the_kit_is_exact(contestant):
    batches = engine.batches_of((16,), [32, 5], torch.float64)
    length, error = engine.update_error(contestant, batches, F.cross_entropy, CrossEntropy())
    assert length == pytest.approx(1, abs=1e-12) and error < 1e-12
    hot = engine.one_hot(batches[:1], torch.float64)
    _, error = engine.update_error(contestant, hot, engine.naive_soft_f1, SoftFBeta(1, "macro"))
    assert error < 1e-12


def test_the_error_of_the_hand_written_loop_is_seen():
    batches = engine.batches_of((16,), [32, 5], torch.float64)
    length, error = engine.update_error(engine.hand_written, batches, F.cross_entropy, CrossEntropy())
    assert length == pytest.approx(0.25) and error == pytest.approx(0.75)


def test_all_contestants_train_on_the_same_memory():
    batches = engine.batches_of((16,), [32, 5])
    work = Work(engine.mlp(), partial(torch.optim.SGD, lr=0.5), F.cross_entropy, batches, 8, CrossEntropy())
    assert [len(inputs) for inputs, _ in work.micro_batches] == [8, 8, 8, 8, 5]
    for place, attribute in enumerate(("inputs", "targets")):
        whole = getattr(batches[0], attribute)
        parts = [batch[place] for batch in work.micro_batches[:4]]
        assert torch.equal(torch.cat(parts), whole)
        assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}


def test_the_naive_soft_f1_is_the_kits_on_one_batch():
    (batch,) = engine.one_hot(engine.batches_of((10,), [32], torch.float64), torch.float64)
    ours = batch_value(SoftFBeta(1, "macro"), batch.inputs, batch.targets)
    assert float(engine.naive_soft_f1(batch.inputs, batch.targets)) == pytest.approx(float(ours), rel=1e-12)


def test_a_step_counts_by_the_least():
    assert engine.quickest([[3.0, 2.0], [5.0, 1.5]]) == 1.5


# The card.


@pytest.fixture
def no_card(monkeypatch):
    """Let the GPU benchmark run on the CPU with a small network; returns that network."""
    monkeypatch.setattr(gpu, "CARD", torch.device("cpu"))
    monkeypatch.setattr(gpu, "best_precision", lambda device: "fp32")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    small = gpu.Network(lambda: torch.nn.Linear(4, 10), (4,), 8, 2)
    monkeypatch.setattr(gpu, "NETWORKS", {"small": small})
    return small


@pytest.mark.parametrize("make", [gpu.by_hand, gpu.kit, gpu.kit_with_graph])
def test_every_contestant_of_the_card_makes_the_same_step(no_card, make):
    weights = []
    for contestant in (gpu.by_hand, make):
        torch.manual_seed(0)
        model = no_card.make()
        step = contestant(no_card, model)
        for _ in range(3):
            step(*no_card.data())
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], no_card.make().weight)


@pytest.mark.parametrize("colours", [("",), ("_red", "_blue")])
def test_the_trainings_of_a_card_have_enough_rows(tmp_path, monkeypatch, colours):
    """Images of one file or several are copied with their rows; without image files only train.csv grows."""
    monkeypatch.setattr(training, "IMAGES", 5)
    monkeypatch.setattr(training, "ROWS", 5)
    for name in ("train.csv", "sample_submission.csv"):
        (tmp_path / name).write_text("id,label\na,1\nb,2\n")
    training.multiplied(tmp_path)
    assert (tmp_path / "train.csv").read_text().split() == ["id,label", *["a,1", "b,2"] * 3]
    assert (tmp_path / "sample_submission.csv").read_text().split() == ["id,label", "a,1", "b,2"]
    (tmp_path / "train.csv").write_text("id,label\na,1\nb,2\n")
    for part in ("test_images", "train_images"):
        (tmp_path / part).mkdir()
        for name in "ab" if part.startswith("train") else "a":
            for colour in colours:
                (tmp_path / part / f"{name}{colour}.png").touch()
    training.multiplied(tmp_path)
    lines = ["a,1", "b,2", "1a,1", "1b,2", "2a,1", "2b,2"]
    for name in ("train.csv", "sample_submission.csv"):
        assert (tmp_path / name).read_text().split() == ["id,label", *lines]
    there = sorted(file.name for file in (tmp_path / "train_images").iterdir())
    assert there == sorted(f"{line.split(',')[0]}{colour}.png" for line in lines for colour in colours)
    assert len(list((tmp_path / "test_images").iterdir())) == 3 * len(colours)


def test_the_figures_of_a_card_have_their_ratios_and_reasons(no_card, monkeypatch):
    clock = gpu.Clock(float("inf"))
    monkeypatch.setattr(gpu, "seconds_of", lambda step: 2e-3 if step() is None else 0)
    monkeypatch.setattr(gpu, "CONTESTANTS", {"hand-written loop": gpu.by_hand, "this kit": gpu.kit, "none": missing})
    rows = gpu.steps_part(clock)
    assert len(rows) == 6 and [row.get("ratio") for row in rows] == [1.0, 1.0, None] * 2
    assert rows[0]["images/s"] == 4000 and rows[2]["skipped"] == "no_such_package is not installed"
    header, _, first, *_ = figures.table(rows)
    assert header.startswith("| network | data |") and first.startswith(
        "| small | card | hand-written loop | 2 | 4e+03 |"
    )


def missing(network, model):
    import no_such_package  # noqa: F401


def test_nothing_takes_the_other_figures_of_a_card_with_it(no_card):
    def raising(error):
        raise error

    found = [
        gpu.tried(partial(raising, error), gpu.Clock(float("inf")), 1)["skipped"]
        for error in (torch.OutOfMemoryError("CUDA out of memory"), subprocess.TimeoutExpired("x", 1), ValueError("3"))
    ]
    assert found == ["does not fit on this card", "took too long", "ValueError: 3"]
    assert gpu.tried(dict, gpu.Clock(0.0), 1) == {"skipped": "no time left"}


def test_an_error_after_which_every_call_fails_leaves_the_figures(no_card, monkeypatch):
    def fail(*given):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    for name in ("empty_cache", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, fail)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(total_memory=80 * gpu.GIB))
    monkeypatch.setattr(gpu, "LARGE", {"small": no_card})
    rows = gpu.memory_part(gpu.Clock(float("inf")))
    assert [row["skipped"][:16] for row in rows] == ["AcceleratorError"] * 6


@pytest.mark.parametrize("uses, lefts", [(1, [116, 87, 87]), (0, [116, 145, 290])])
def test_no_part_of_a_card_takes_the_time_of_the_next(monkeypatch, uses, lefts):
    now, seen = [0.0], []

    def part(clock):
        """A part."""
        seen.append(round(clock.left()))
        now[0] += uses * clock.left()

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(gpu.PARTS, part))
    for one in gpu.timed(list(gpu.PARTS), 290).values():
        assert one.__doc__ == "A part."
        one()
    assert seen == lefts


def test_without_a_card_one_line_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpu.main([])
    assert capsys.readouterr().out.count("\n") == 1 and not list(tmp_path.iterdir())


# Figures.


def test_the_figures_of_a_part_are_printed_and_written(capsys, tmp_path):
    def toy(rows):
        """A toy part."""
        return [{"loop": "a", "ratio": 1 / 3, "exact": True}] * rows

    figures.measure({"toy": toy}, figures.facts(seed=0), str(tmp_path / "toy.json"), 2)
    assert capsys.readouterr().out.count("| a | 0.333 | yes |\n") == 2
    written = json.loads((tmp_path / "toy.json").read_text())
    assert written["toy"] == toy(2) and {"processor", "python", "torch", "seed", "commit"} <= set(written)


# Taking turns.


def test_contestants_take_turns():
    calls = []
    ways = {name: partial(lambda name: calls.append(name) or len(calls), name) for name in "ab"}
    assert turns.in_turns(ways, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert calls == list("ababab")


def test_the_bare_loops_take_every_row_once_in_every_turn():
    taken = torch.zeros(20, dtype=torch.int64).share_memory_()

    class Rows:
        def __getitem__(self, index):
            taken[index] += 1

    loops = loaders.BareLoops(Rows(), torch.arange(20).numpy())
    for turn in (1, 2):
        loops.run()
        assert taken.tolist() == [turn] * 20
    loops.end()
    assert [process.exitcode for process in loops.processes] == [0, 0]


# Wrong arguments.


def refusal(capsys, module, words: list[str], monkeypatch) -> str:
    """The last line that a benchmark prints when it refuses its arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    with pytest.raises(SystemExit) as stopped:
        module.main(words) if module in (engine, gpu) else module.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "module, words, told",
    [
        (engine, "typo", "there is no part typo, only time, passes, error, memory"),
        (engine, "error typo", "there is no part typo"),
        (gpu, "typo", "there is no part typo, only steps, memory, trainings"),
        (kdd, "--train", "--train needs --data"),
        (kdd, "--jobs 0", "0: expected a whole number of 1 or more"),
        (clouds, "--size 5", "5: expected height,width"),
        (clouds, "--part typo", "invalid choice: 'typo'"),
        (embedding, "--part quality", "--part quality needs --data"),
        (embedding, "--labels 100", "expected more than the 512 numbers of a vector"),
        (embedding, "--part training --recipes typo", "there is no recipe 'typo', only "),
        (embedding, "--seeds 0,x", "0,x: expected whole numbers and commas"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(capsys, monkeypatch, module, words, told):
    assert told in refusal(capsys, module, words.split(), monkeypatch)


@pytest.mark.parametrize("module", [clouds, embedding, kdd, loaders])
def test_missing_data_is_named(capsys, monkeypatch, module):
    line = refusal(capsys, module, ["--data", "/nowhere/at/all"], monkeypatch)
    assert "/nowhere/at/all does not exist" in line


def test_types_of_arguments():
    assert arguments.positive("12") == 12 and arguments.height_and_width("1400,2100") == (1400, 2100)
    for text in ("0", "-1", "x", ""):
        with pytest.raises(ArgumentTypeError):
            arguments.positive(text)
    for text in ("5", "5,", "1,2,3", "0,4"):
        with pytest.raises(ArgumentTypeError):
            arguments.height_and_width(text)


# Timing of whole runs: each in a new folder, because a finished run is not repeated.


def test_kdd_trains_and_predicts_in_a_fresh_folder_every_time(monkeypatch, tmp_path):
    seen = []

    def run(words, cwd, **_):
        seen.append((words[3], Path(cwd)))
        assert Path(cwd).is_dir() and words[words.index("--data") + 1] == str(tmp_path)

    monkeypatch.setattr(subprocess, "run", run)
    kdd.time_train(tmp_path)
    kdd.time_train(tmp_path)
    assert [verb for verb, _ in seen] == ["train", "predict"] * 2
    folders = [folder for _, folder in seen]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert not any(folder.exists() for folder in folders)


# Out of memory and other failures.


@pytest.mark.parametrize(
    "returncode, stderr, expected",
    [
        (-signal.SIGKILL, "", True),
        (137, "", True),
        (1, "Traceback ...\n  step()\nRuntimeError: DefaultCPUAllocator: can't allocate memory: 9 bytes", True),
        (1, "Traceback ...\n  step()\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", True),
        (1, "Traceback ...\n  step()\nMemoryError: micro-batches of 16 did not fit", True),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", True),
        (1, "Traceback ...\n  # out of memory\nValueError: 3", False),
        (-signal.SIGSEGV, "", False),
        (2, "error: argument --size", False),
    ],
)
def test_out_of_memory_is_told_from_other_failures(returncode, stderr, expected):
    assert clouds.is_out_of_memory(returncode, stderr) is expected


def test_another_failure_is_raised_with_what_the_process_said(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ValueError: no such encoder")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="ValueError: no such encoder"):
        clouds.peak(1, 1, False, (64, 96), "typo")


# The label vectors.


def test_the_table_of_trainings_has_what_a_run_keeps(monkeypatch, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("fold,epoch,precision_at_5\n0,1,\n0,2,0.5\n")
    result = {"monitor": "f2", "metrics": {"f2": 0.6, "precision_at_5": 0.5}, "score": 0.4, "training_seconds": 90}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(embedding.runs, "load", lambda *_: SimpleNamespace(path=tmp_path, result=result))
    embedding.training(tmp_path, (0,), 2, ("small-bce",), [])
    assert "| small-bce | 0.6000 (0.6000) | 0.4000 (0.4000) | 0.5000 (0.5000) | 2 | 1.5 |" in capsys.readouterr().out


def test_all_solvers_find_the_same_subspace(monkeypatch):
    monkeypatch.setattr(embedding, "DIM", 8)
    labels = embedding.zipf_labels(60, topics=12)
    exact = embedding.SOLVERS["numpy eigh, float64"](labels)
    for name, solver in embedding.SOLVERS.items():
        largest, mean = embedding.sines(exact, solver(labels))
        assert mean <= largest < 1e-4, name
