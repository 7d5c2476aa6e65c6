"""Label vectors: their cost compared with scipy and dense decompositions, their quality, and their use in training.

    make bench BENCH=embedding                                        half an hour on two cores
    make bench BENCH=embedding ARGS="--part scale --no-reference"     without the dense float64 decompositions
    make bench BENCH=embedding ARGS="--part scale --labels 3000"      fewer labels, in proportion: a few minutes
    make bench BENCH=embedding ARGS="--part quality --data path/to/labels_only"
    make bench BENCH=embedding ARGS="--part training --data path/to/corel5k --epochs 20 --seeds 0,1 -- --precision bf16"

`training` trains the recipes of --recipes one after the other, with the same backbone, epochs and row order. Finished
runs are not trained again. --epochs sets the length of each run. Further flags of `make train` follow after --.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import eigsh

from benchmarks.tools.arguments import existing, positive
from benchmarks.tools.turns import in_turns
from common import run as runs
from common.files import read_table
from common.raw import RawData
from competitions.inclusive_images import labels as reader
from competitions.inclusive_images.config import RECIPES
from competitions.inclusive_images.label_embedding import LabelEmbedding, co_occurrence, ppmi

IMAGES, LABELS, GIVEN, DIM = 1_743_042, 7_178, 8_000_000, 512
TRAINED = ("small-bce", "small-f2", "small-embedding", "small-both")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def zipf_labels(labels: int, topics: int, seed: int = 0) -> csr_matrix:
    """A matrix of `labels` labels in the competition's proportions; label r has a probability ~ 1 / r.

    With `topics` above 0 three labels of five come from the image's topic, as in photographs. With 0 all are
    independent, which is harder: only noise separates the eigenvalues.
    """
    images, given = IMAGES * labels // LABELS, GIVEN * labels // LABELS
    rng = np.random.default_rng(seed)
    weights = np.cumsum(1 / np.arange(1, labels + 1))
    image = rng.integers(0, images, given, dtype=np.int32)
    label = np.searchsorted(weights / weights[-1], rng.random(given, np.float32)).astype(np.int32)
    np.minimum(label, labels - 1, out=label)
    if topics:
        of_image = rng.integers(0, topics, images, dtype=np.int32)
        size = labels // topics
        inside = np.exp(rng.random(given, np.float32) * np.log(size)).astype(np.int32) - 1
        label = np.where(rng.random(given, np.float32) < 0.6, of_image[image] + topics * inside, label)
    matrix = csr_matrix((np.ones(given, np.uint8), (image, label)), shape=(images, labels))
    matrix.data[:] = 1
    return matrix


def by_kit(labels: csr_matrix) -> np.ndarray:
    vectors = LabelEmbedding.fit(labels, DIM).vectors
    return vectors / np.linalg.norm(vectors, axis=0)


def by_eigsh(labels: csr_matrix, dtype: type) -> np.ndarray:
    return eigsh(ppmi(labels, smoothing=3.0).astype(dtype), DIM, which="LA")[1]


def by_eigh(labels: csr_matrix) -> np.ndarray:
    return np.linalg.eigh(ppmi(labels, smoothing=3.0).astype(np.float64))[1][:, -DIM:]


def by_svd(labels: csr_matrix) -> np.ndarray:
    left, _, right = np.linalg.svd(ppmi(labels, smoothing=3.0).astype(np.float64))
    return left[:, np.flatnonzero((left * right.T).sum(0) > 0)[:DIM]]  # the rest have negative eigenvalues


# Each solver computes its own matrix and returns an orthonormal basis of the leading eigenvectors [labels, DIM].
SOLVERS: dict[str, Callable[[csr_matrix], np.ndarray]] = {
    "this kit": by_kit,
    "scipy eigsh, float32": partial(by_eigsh, dtype=np.float32),
    "scipy eigsh, float64": partial(by_eigsh, dtype=np.float64),
    "numpy eigh, float64": by_eigh,
    "numpy svd, float64 (the blog)": by_svd,
}
DENSE = ("numpy eigh, float64", "numpy svd, float64 (the blog)")  # they compute all eigenvalues


def worker(solver: str, labels: int, topics: int, folder: Path) -> None:
    """Run one solver, as a process of its own: print seconds and peak memory as JSON, save the vectors to a file."""
    given = zipf_labels(labels, topics)
    before = peak_gb()
    start, busy = time.perf_counter(), time.process_time()
    basis = SOLVERS[solver](given)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    facts = {"seconds": seconds, "busy": busy, "peak": peak_gb(), "before": before}
    np.save(folder / f"{solver}.npy", basis)
    print(json.dumps(facts))


def solve(solver: str, labels: int, topics: int, folder: str) -> dict[str, float]:
    words = ["--worker", solver, "--labels", str(labels), "--topics", str(topics), "--folder", folder]
    command = [sys.executable, "-m", "benchmarks.embedding", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    print(f"{solver}: {facts['seconds']:.1f} s", file=sys.stderr, flush=True)  # progress, long before the table
    return facts


def sines(exact: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """The largest sine of the principal angles between two subspaces, and the root mean square of the sines."""
    found = np.linalg.qr(found.astype(np.float64))[0]
    missed = exact - found @ (found.T @ exact)
    return np.linalg.norm(missed, 2), np.linalg.norm(missed) / np.sqrt(exact.shape[1])


def scale(labels: int, topics: int, with_dense: bool, rounds: int) -> None:
    """Compare the kit's truncated solver with scipy's and dense decompositions: time, memory and subspace."""
    names = [name for name in SOLVERS if with_dense or name not in DENSE]
    exact = DENSE[0] if with_dense else "scipy eigsh, float64"
    with tempfile.TemporaryDirectory() as folder:
        taken = in_turns({name: partial(solve, name, labels, topics, folder) for name in names}, rounds)
        bases = {name: np.load(Path(folder) / f"{name}.npy") for name in names}
    least = {name: {key: min(turn[key] for turn in turns) for key in turns[0]} for name, turns in taken.items()}
    images = IMAGES * labels // LABELS
    print(f"{images:,} x {labels:,}, {topics or 'no'} topics, {DIM} numbers; minima of {rounds} turns")
    print(f"| | seconds | of this kit's | processor time | peak GB (before) | sine to {exact}: largest | RMS |")
    print("|---|---|---|---|---|---|---|")
    for name, facts in least.items():
        largest, mean = sines(bases[exact].astype(np.float64), bases[name])
        print(
            f"| {name} | {facts['seconds']:.1f} | {facts['seconds'] / least['this kit']['seconds']:.1f} | "
            f"{facts['busy']:.1f} s | {facts['peak']:.2f} ({facts['before']:.2f}) | {largest:.1e} | {mean:.1e} |"
        )


def quality(folder: Path, seeds: tuple[int, ...]) -> None:
    """Hide one label of every held-out image and rank all labels by its other labels; print the hits in the top ten."""
    raw = RawData(folder, "inclusive_images")
    index = reader.read_index(raw)
    matrix = reader.read_train(raw, index).matrix
    table: dict[str, list[float]] = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        held = np.zeros(matrix.shape[0], bool)
        held[rng.permutation(len(held))[: len(held) // 5]] = True
        train, test = matrix[~held], matrix[held]
        test = test[np.diff(test.indptr) >= 2]
        places = test.indptr[:-1] + rng.integers(0, np.diff(test.indptr))
        hidden = test.indices[places]
        given = test.astype(np.float32)
        given.data[places] = 0
        given.eliminate_zeros()
        counts = np.asarray(train.sum(0, dtype=np.int64)).ravel()

        def hits(scores: np.ndarray) -> float:
            scores[given.nonzero()] = -np.inf  # noqa: B023
            own = scores[np.arange(len(hidden)), hidden][:, None]  # noqa: B023
            better, equal = (scores > own).sum(1), (scores == own).sum(1) - 1
            return float((better + equal / 2 < 10).mean())

        def add(name: str, value: float) -> None:
            table.setdefault(name, []).append(value)

        add("frequency alone", hits(np.tile(counts.astype(np.float32), (len(hidden), 1))))
        shared = co_occurrence(train).toarray() / np.maximum(counts, 1)[:, None]
        np.fill_diagonal(shared, 0)
        add("co-occurrence probability, mean over the given", hits(given @ shared.astype(np.float32)))
        variants = {
            "PMI of the blog": {"kind": "pmi"},
            "PPMI, plain": {"smoothing": 0.0, "least_images": 1},
            "PPMI, smoothed 3": {"least_images": 1},
            "PPMI, smoothed 3, labels of few images out (default)": {},
            "PPMI, smoothed 10, labels of few images out": {"smoothing": 10.0},
        }
        for name, settings in variants.items():
            for dim in (128, 512):
                found = LabelEmbedding.fit(train, dim, **settings)
                outputs = given @ found.vectors
                outputs /= np.maximum(np.linalg.norm(outputs, axis=1, keepdims=True), 1e-12)
                # PMI does not contain the labels' own frequency, so one variant adds a part of it again.
                rates = np.log(counts[found.known], dtype=np.float32) / 16
                for way, rows, rate in (
                    ("cosine", found.unit_vectors, 0),
                    ("projection", found.projections, 0),
                    ("projection + ln(count) / 16", found.projections, rates),
                ):
                    scores = np.full((len(hidden), len(counts)), -1e9, np.float32)
                    scores[:, found.known] = outputs @ rows.T + rate
                    add(f"{name}, {dim}, {way}", hits(scores))
    print(f"hits@10 of {len(hidden):,} hidden labels, {len(seeds)} splits")
    for name, values in table.items():
        print(f"  {name:92} {both(values)}")


def training(data: Path, seeds: tuple[int, ...], epochs: int, recipes: tuple[str, ...], more: list[str]) -> None:
    """Train every recipe with every seed by the real command, and print their held-out scores side by side."""
    found: dict[str, list[dict]] = {}
    for seed in seeds:
        for recipe in recipes:
            name = f"bench-{recipe}-{epochs}-{seed}"
            words = ["train", "inclusive_images", "--recipe", recipe, "--data", str(data), "--run", name]
            words += ["--seed", str(seed), "--epochs", str(epochs), *more]
            subprocess.run([sys.executable, "-m", "common", *words], check=True)
            run = runs.load("inclusive_images", name)
            history = read_table(run.path / "metrics.csv")
            scored = [(int(row["epoch"]), float(row["precision_at_5"])) for row in history if row.get("precision_at_5")]
            found.setdefault(recipe, []).append(run.result | {"scored": scored})
    goal = max((value for run in found.get("small-bce", ()) for _, value in run["scored"]), default=math.inf)
    print(f"{data.name}, {epochs} epochs, seeds {list(seeds)}; {runs.machine()}")
    print("| recipe | mean F2 | F2, rule chosen elsewhere | precision@5 | epochs to BCE's best precision@5 | minutes |")
    print("|---|---|---|---|---|---|")
    for recipe, results in found.items():
        reached = [next((epoch for epoch, value in run["scored"] if value >= goal), None) for run in results]
        cells = [
            both([run["metrics"][run["monitor"]] for run in results]),
            both([run["score"] for run in results]),
            both([run["metrics"]["precision_at_5"] for run in results]),
            ", ".join("not" if epoch is None else str(epoch) for epoch in reached),
            f"{np.mean([run['training_seconds'] for run in results]) / 60:.1f}",
        ]
        print(f"| {recipe} | {' | '.join(cells)} |", flush=True)


def numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers and commas, for example 0,1")
    return tuple(map(int, text.split(",")))


def recipes(text: str) -> tuple[str, ...]:
    unknown = [name for name in text.split(",") if name not in RECIPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no recipe {unknown[0]!r}, only {', '.join(RECIPES)}")
    return tuple(text.split(","))


def both(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("scale", "quality", "training"))
    parser.add_argument("--no-reference", action="store_true", help="leave the dense decompositions out")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of every solver [3]")
    parser.add_argument("--labels", type=positive, default=LABELS, help=f"labels of the generated matrix [{LABELS}]")
    parser.add_argument("--topics", type=int, default=0, help="topics of the generated labels; 0: independent")
    parser.add_argument("--data", type=existing, help="labels_only for quality, corel5k for training")
    parser.add_argument("--seeds", type=numbers, default="0,1")
    parser.add_argument("--epochs", type=positive, default=20)
    parser.add_argument("--recipes", type=recipes, default=",".join(TRAINED))
    parser.add_argument("--worker", choices=SOLVERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="flags of make train, after --")
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.labels, given.topics, given.folder)
        return
    if given.labels <= DIM:
        parser.error(f"--labels {given.labels}: expected more than the {DIM} numbers of a vector")
    if given.part in (None, "scale"):
        scale(given.labels, given.topics, not given.no_reference, given.rounds)
    if given.part in ("quality", "training") and not given.data:
        parser.error(f"--part {given.part} needs --data")
    if given.part == "quality":
        quality(given.data, given.seeds)
    if given.part == "training":
        training(given.data, given.seeds, given.epochs, given.recipes, given.more)


if __name__ == "__main__":
    main()
