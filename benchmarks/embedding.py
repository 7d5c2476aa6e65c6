"""Label vectors: what they cost beside the dense decomposition, what they know, and what they are worth in training.

    make bench BENCH=embedding                                        scale and decoding, some minutes for the reference
    make bench BENCH=embedding ARGS="--part scale --no-reference"     without the dense float64 decomposition
    make bench BENCH=embedding ARGS="--part quality --data path/to/labels_only"
    make bench BENCH=embedding ARGS="--part training --data path/to/corel5k --epochs 20 --seeds 0,1 -- --precision bf16"

`training` trains the recipes named below, one after the other, with the same backbone, epochs and order; a run that is
there already is not trained again. --epochs sets the budget; further flags of `make train` follow a lone --.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix

from common import run as runs
from common.raw import RawData
from competitions.inclusive_images import labels as reader
from competitions.inclusive_images.label_embedding import LabelEmbedding, co_occurrence, ppmi

IMAGES, LABELS, GIVEN, DIM = 1_743_042, 7_178, 8_000_000, 512
TRAINED = ("small-bce", "small-f2", "small-embedding", "small-both")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def zipf_labels(topics: int, seed: int = 0) -> csr_matrix:
    """As many images and labels as the competition has, label r with probability ~ 1 / r.

    With `topics` above 0 three labels of five come from the image's topic, as in photographs; with 0 all are
    independent, which is harder: nothing but noise separates one eigenvalue from the next.
    """
    rng = np.random.default_rng(seed)
    weights = np.cumsum(1 / np.arange(1, LABELS + 1))
    image = rng.integers(0, IMAGES, GIVEN, dtype=np.int32)
    label = np.searchsorted(weights / weights[-1], rng.random(GIVEN, np.float32)).astype(np.int32)
    np.minimum(label, LABELS - 1, out=label)
    if topics:
        of_image = rng.integers(0, topics, IMAGES, dtype=np.int32)
        size = LABELS // topics
        inside = np.exp(rng.random(GIVEN, np.float32) * np.log(size)).astype(np.int32) - 1
        label = np.where(rng.random(GIVEN, np.float32) < 0.6, of_image[image] + topics * inside, label)
    matrix = csr_matrix((np.ones(GIVEN, np.uint8), (image, label)), shape=(IMAGES, LABELS))
    matrix.data[:] = 1
    return matrix


def worker(kind: str, topics: int, folder: Path) -> None:
    """One side of the comparison in a process of its own: seconds and peak memory as JSON, vectors in a file."""
    labels = zipf_labels(topics)
    before = peak_gb()
    start, busy = time.perf_counter(), time.process_time()
    if kind == "kit":
        found = LabelEmbedding.fit(labels, DIM)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        basis = found.vectors / np.linalg.norm(found.vectors, axis=0)
    else:
        matrix = ppmi(labels, smoothing=3.0).astype(np.float64)
        left, _, right = np.linalg.svd(matrix)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        positive = np.flatnonzero((left * right.T).sum(0) > 0)[:DIM]  # the others belong to negative eigenvalues
        basis = left[:, positive]
    np.save(folder / f"{kind}.npy", basis)
    print(json.dumps({"seconds": seconds, "busy": busy, "peak": peak_gb(), "before": before}))


def scale(topics: int, reference: bool) -> None:
    """Time, memory and subspace of the truncated solver beside the dense decomposition of the blog."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder, facts = Path(name), {}
        for kind in ("kit", "dense float64 SVD")[: 1 + reference]:
            words = ["--worker", kind.split()[0], "--topics", str(topics), "--folder", name]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.embedding", *words], stdout=subprocess.PIPE, check=True, text=True
            )
            facts[kind] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{IMAGES:,} x {LABELS:,}, {topics or 'no'} topics, {DIM} numbers: {kind:18} "
                f"{facts[kind]['seconds']:7.1f} s ({facts[kind]['busy']:.1f} s of processor time), "
                f"peak {facts[kind]['peak']:.2f} GB ({facts[kind]['before']:.2f} GB before)"
            )
        if reference:
            fast, slow = np.load(folder / "kit.npy").astype(np.float64), np.load(folder / "dense.npy")
            fast = np.linalg.qr(fast)[0]
            missed = np.linalg.norm(slow - fast @ (fast.T @ slow), 2)
            mean = np.linalg.norm(slow - fast @ (fast.T @ slow)) / np.sqrt(DIM)
            ratio = facts["dense float64 SVD"]["seconds"] / facts["kit"]["seconds"]
            print(f"  {ratio:.1f} times as fast; sines between the subspaces: largest {missed:.1e}, mean {mean:.1e}")


def decoding() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((LABELS, DIM), np.float32)
    ones = np.ones(LABELS, np.float32)
    embedding = LabelEmbedding(vectors, np.ones(DIM, np.float32), ones, ones.astype(np.int64), "ppmi")
    outputs = torch.from_numpy(rng.standard_normal((100_000, DIM), np.float32))
    before, start, busy = peak_gb(), time.perf_counter(), time.process_time()
    embedding.decode(outputs, 10)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    print(
        f"decoding 100,000 outputs against {LABELS:,} vectors of {DIM}: {seconds:.1f} s ({busy:.1f} s of processor "
        f"time), {peak_gb() - before:.2f} GB more than before"
    )


def quality(folder: Path, dims: tuple[int, ...] = (128, 512), seeds: tuple[int, ...] = (0, 1)) -> None:
    """Hide one label of every held-out image, rank the others by what is left: how often is it among the first ten?"""
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
            "PPMI without diagonal": {"diagonal": False},
            "PPMI, plain": {"smoothing": 0.0, "least_images": 1},
            "PPMI, smoothed 3": {"least_images": 1},
            "PPMI, smoothed 3, labels of few images out (default)": {},
            "PPMI, smoothed 10, labels of few images out": {"smoothing": 10.0},
        }
        for name, settings in variants.items():
            for dim in dims:
                found = LabelEmbedding.fit(train, dim, **settings)
                outputs = found.encode(given)
                outputs /= np.maximum(np.linalg.norm(outputs, axis=1, keepdims=True), 1e-12)
                # PMI is what chance does not explain: a share of the labels' own frequency goes back in.
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
        print(f"  {name:92} {np.mean(values):.4f}  ({', '.join(f'{value:.4f}' for value in values)})")


def training(data: Path, seeds: list[int], epochs: int, recipes: tuple[str, ...], more: list[str]) -> None:
    """Train every recipe on every seed by the real command, and set their held-out scores side by side."""
    found: dict[str, list[dict]] = {}
    for seed in seeds:
        for recipe in recipes:
            name = f"bench-{recipe}-{epochs}-{seed}"
            words = ["train", "inclusive_images", "--recipe", recipe, "--data", str(data), "--run", name]
            words += ["--seed", str(seed), "--epochs", str(epochs), *more]
            subprocess.run([sys.executable, "-m", "common", *words], check=True)
            run = runs.load("inclusive_images", name)
            lines = (run.path / "metrics.csv").read_text().splitlines()
            header = lines[0].split(",")
            history = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
            scored = [(int(row["epoch"]), float(row["precision_at_5"])) for row in history if row.get("precision_at_5")]
            found.setdefault(recipe, []).append(run.result | {"scored": scored})
    goal = (
        max(value for run in found.get("small-bce", []) for _, value in run["scored"]) if "small-bce" in found else 2.0
    )
    print(f"{data.name}, {epochs} epochs, seeds {seeds}; {runs.machine()}")
    print("| recipe | mean F2 | F2, rule chosen elsewhere | precision@5 | epochs to BCE's best precision@5 | minutes |")
    print("|---|---|---|---|---|---|")
    for recipe, results in found.items():
        reached = [next((epoch for epoch, value in run["scored"] if value >= goal), None) for run in results]
        cells = [
            both([run["metrics"][run["monitor"]] for run in results]),
            both([run["learnt"]["score"] for run in results]),
            both([run["metrics"]["precision_at_5"] for run in results]),
            ", ".join("not" if epoch is None else str(epoch) for epoch in reached),
            f"{np.mean([run['training_seconds'] for run in results]) / 60:.1f}",
        ]
        print(f"| {recipe} | {' | '.join(cells)} |", flush=True)


def both(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("scale", "decoding", "quality", "training"))
    parser.add_argument("--no-reference", action="store_true", help="leave the dense decomposition out")
    parser.add_argument("--topics", type=int, default=0, help="topics of the generated labels; 0: independent")
    parser.add_argument("--data", type=Path, help="labels_only for quality, corel5k for training")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--recipes", default=",".join(TRAINED))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="flags of make train, after --")
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.topics, given.folder)
        return
    if given.part in (None, "scale"):
        scale(given.topics, not given.no_reference)
    if given.part in (None, "decoding"):
        decoding()
    if given.part in ("quality", "training") and not given.data:
        parser.error(f"--part {given.part} needs --data")
    if given.part == "quality":
        quality(given.data, seeds=tuple(map(int, given.seeds.split(","))))
    if given.part == "training":
        training(
            given.data,
            list(map(int, given.seeds.split(","))),
            given.epochs,
            tuple(given.recipes.split(",")),
            given.more,
        )


if __name__ == "__main__":
    main()
