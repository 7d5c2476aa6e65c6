"""The time of `make data` compared with a plain download and unzip of the same archive.

make bench BENCH=kaggle [ARGS="--megabytes 200 --rounds 5"]

Both run the kaggle program against a server on loopback, in turn. `make data` also lists the files, compares them with
the disk and the archive, verifies every checksum, refuses unsafe names, and records the sha256 of every file.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.tools.arguments import positive
from benchmarks.tools.turns import in_turns
from common.kaggle.client import KAGGLE

ROOT = Path(__file__).parents[1]
OURS = """
import sys
sys.path.insert(0, sys.argv[1])
from common.kaggle.data import fetch
from common.kaggle.source import Source
fetch("toy", Source(sys.argv[2], ("train.csv", "train_images/*.jpg"), higher_is_better=True))
"""


def serve(megabytes: int, port) -> None:
    """Serve a competition of incompressible images and one tenth text, in a process separate from the clients."""
    import random

    from tests.common.kaggle.server import Kaggle

    draw = random.Random(0)
    files = {f"train_images/{n:04}.jpg": draw.randbytes(1_000_000) for n in range(megabytes * 9 // 10)}
    lines = b"".join(b"%d,%d %d\n" % (n, draw.randrange(10**6), draw.randrange(10)) for n in range(100_000))
    files["train.csv"] = lines * max(1, megabytes * 200_000 // len(lines))
    server = Kaggle(files)
    port.send((server.port, len(server.archive)))
    port.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=positive, default=200)
    parser.add_argument("--rounds", type=positive, default=5)
    given = parser.parse_args()
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(given.megabytes, there), daemon=True)
    server.start()
    port, size = here.recv()
    from tests.common.kaggle.server import KEY, SLUG, USER

    with tempfile.TemporaryDirectory(prefix="kit-bench-") as temporary:
        folder = Path(temporary)
        environment = {
            **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
            "HOME": temporary,
            "KAGGLE_USERNAME": USER,
            "KAGGLE_KEY": KEY,
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": f"http://127.0.0.1:{port}",
        }
        download = [*KAGGLE, "competitions", "download", SLUG, "-p", "raw", "-q"]
        unzips = {"Python's zipfile": [sys.executable, "-m", "zipfile", "-e", f"raw/{SLUG}.zip", "raw/out"]}
        if shutil.which("unzip"):
            unzips["unzip"] = ["unzip", "-q", f"raw/{SLUG}.zip", "-d", "raw/out"]

        def timed(*commands: list[str]) -> float:
            for old in ("raw", "data"):
                shutil.rmtree(folder / old, ignore_errors=True)
            os.sync()  # so that pending writes of the other way are not timed here
            start = time.perf_counter()
            for command in commands:
                subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        ways = {f"kaggle download, then {name}": partial(timed, download, unzip) for name, unzip in unzips.items()}
        ways["make data"] = partial(timed, [sys.executable, "-c", OURS, str(ROOT), SLUG])
        times = in_turns(ways, given.rounds)
    here.send("done")

    print(f"archive of {size / 1e6:.0f} MB on loopback, {given.rounds} rounds in turn, seconds")
    ours = times["make data"]
    for label, seconds in times.items():
        ratio = f"   make data: {min(ours) / min(seconds):.2f} of it" if seconds is not ours else ""
        print(f"  {label:42} min {min(seconds):6.2f}   median {statistics.median(seconds):6.2f}{ratio}")


if __name__ == "__main__":
    main()
