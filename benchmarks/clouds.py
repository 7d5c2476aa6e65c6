"""Clouds compared with common code: decoding and encoding masks, inference from images to the CSV, and memory.

make bench BENCH=clouds                                        masks and inference
make bench BENCH=clouds ARGS="--part memory"                   peak memory of a full-resolution step (minutes)
make bench BENCH=clouds ARGS="--data path/to/clouds"           real images and masks instead of generated ones
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import cv2
import numpy as np
import torch
from pycocotools import mask as coco

from benchmarks.tools.arguments import existing, height_and_width, positive
from benchmarks.tools.turns import least_seconds
from common import submission
from common.batch import Batch
from common.defaults import completed
from common.device import peak_memory
from common.engine import memory
from common.engine.optimizers import allocate_state, build_optimizer
from common.engine.precision import autocast
from common.engine.prepare import prepare
from common.engine.step import Engine
from common.inference import Predictor
from common.raw import RawData
from common.task import AS_IS
from common.vision import rle
from competitions.clouds import decision, demo, loss, reader, task
from competitions.clouds.config import RECIPES
from competitions.clouds.model import CloudNet
from competitions.clouds.reader import MASK_SIZE, SUBMISSION_SIZE

WORKING_SIZE = (384, 576)
MASKS, ROUNDS = 40, 9


def usual_decode(text: str) -> np.ndarray:
    """The decoder of many notebooks: a float mask of the full size, filled run by run."""
    numbers = text.split()
    starts, lengths = (np.asarray(part, dtype=int) for part in (numbers[0::2], numbers[1::2]))
    starts -= 1
    mask = np.zeros(MASK_SIZE[0] * MASK_SIZE[1], np.float32)
    for start, length in zip(starts, lengths, strict=True):
        mask[start : start + length] = 1
    return mask.reshape(MASK_SIZE, order="F")


def usual_encode(mask: np.ndarray) -> str:
    """The encoder of many notebooks: np.where on neighbours that differ, then join."""
    pixels = np.concatenate([[0], mask.T.flatten(), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return " ".join(str(number) for number in runs)


def coco_decode(text: str) -> np.ndarray:
    """Decode with pycocotools, which takes alternating lengths of gaps and runs and fills a byte mask."""
    runs = rle.parse(text)
    edges = np.append(np.stack((runs[:, 0], runs.sum(1)), 1).reshape(-1), MASK_SIZE[0] * MASK_SIZE[1])
    packed = coco.frPyObjects({"size": list(MASK_SIZE), "counts": np.diff(edges, prepend=0).tolist()}, *MASK_SIZE)
    return coco.decode(packed)


def show(title: str, taken: dict[str, float], count: int, usual: str) -> None:
    print(f"\n{title}")
    for name, value in taken.items():
        print(f"  {name:44} {1e3 * value / count:8.3f} ms   {taken[usual] / value:6.1f} x")


def masks(data: RawData) -> None:
    rows = [line.split(",") for line in data.read("train.csv").decode().splitlines()[1:]]
    texts = [text for _, text in rows if text][:MASKS]
    runs = np.mean([len(text.split()) / 2 for text in texts])
    size = WORKING_SIZE[::-1]
    ways = {
        "full size, then cv2.resize (linear)": lambda: [cv2.resize(usual_decode(text), size) for text in texts],
        "full size, then cv2.resize (area)": lambda: [
            cv2.resize(usual_decode(text), size, interpolation=cv2.INTER_AREA) for text in texts
        ],
        "pycocotools, then cv2.resize (area)": lambda: [
            cv2.resize(coco_decode(text), size, interpolation=cv2.INTER_AREA) for text in texts
        ],
        "full size only": lambda: [usual_decode(text) for text in texts],
        "rle.parse and decode_to_size": lambda: [
            rle.decode_to_size(rle.parse(text), *MASK_SIZE, *WORKING_SIZE) for text in texts
        ],
    }
    title = f"mask to {WORKING_SIZE}, {len(texts)} masks of {runs:.0f} runs"
    show(title, least_seconds(ways, ROUNDS), len(texts), next(iter(ways)))

    small = [np.ascontiguousarray(rle.decode_to_size(rle.parse(text), *MASK_SIZE, *SUBMISSION_SIZE)) for text in texts]
    assert [usual_encode(mask) for mask in small] == [rle.encode(mask) for mask in small]
    ways = {
        "diff and join": lambda: [usual_encode(mask) for mask in small],
        "pycocotools (its own format)": lambda: [coco.encode(np.asfortranarray(mask.view(np.uint8))) for mask in small],
        "rle.encode": lambda: [rle.encode(mask) for mask in small],
    }
    show(f"mask of {SUBMISSION_SIZE} to run lengths", least_seconds(ways, ROUNDS), len(texts), "diff and join")


def inference(data: RawData, encoder: str) -> None:
    """Time test images to the checked CSV, and the network alone on images that are already in memory."""
    config = replace(
        RECIPES["full"],
        encoder=encoder,
        encoder_weights="none",
        encoder_lr=1.0,
        tta=False,
        workers=1,
    )
    built = completed(task.build(config, data, print), data)
    test, ids, form = built.data.test, built.data.test_ids, built.submission
    network = built.network.model().eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    count = min(len(test), 16)
    ready = [test[row][0][None].to(device) for row in range(count)]
    predictor = Predictor([network], built, AS_IS, config, 1, device)

    def alone() -> None:
        with torch.inference_mode(), autocast(predictor.precision, device.type):
            for image in ready:
                network(image)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def to_csv() -> None:
        def rows():
            for index, predictions, _, _ in predictor.batches(test, np.arange(count)):
                yield from form.rows([ids[row] for row in index], decision.apply(predictions, {}))

        expected = [("Image_Label", "EncodedPixels")]
        expected += [(f"{name}_{label}", "") for name in ids[:count] for label in reader.CLASSES]
        with tempfile.TemporaryDirectory() as folder:
            sample = submission.Sample.of(enumerate(expected, 1), "the sample")
            submission.write(Path(folder) / "bench.csv", sample, rows(), form.valid, {})

    taken = least_seconds({"forward alone": alone, "images to CSV": to_csv}, rounds=3)
    print(f"\nfull resolution 1400x2100, {encoder} Unet, {count} images on {device}")
    for name, value in taken.items():
        ratio = taken["forward alone"] / value
        print(f"  {name:44} {count / value:8.3f} images/s   {ratio:6.2f} of the forward alone")


def peak(batch: int, micro: int, checkpointing: bool, size: tuple[int, int], encoder: str) -> float | None:
    """Peak memory in GiB of a process that makes one optimizer step; None if it runs out of memory."""
    words = [sys.executable, "-m", "benchmarks.clouds", "--part", "step", "--batch", str(batch), "--micro", str(micro)]
    words += ["--size", f"{size[0]},{size[1]}", "--encoder", encoder, *(["--checkpointing"] if checkpointing else [])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    if is_out_of_memory(done.returncode, done.stderr):
        return None
    raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")


def is_out_of_memory(returncode: int, stderr: str) -> bool:
    """Whether the system killed a process (a shell returns 128 + 9) or its last error is an allocation that failed."""
    if returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return True
    error = [line for line in stderr.rpartition("Traceback")[2].splitlines() if not line.startswith(" ")]
    return any(text in line for line in error for text in (*memory.TEXTS, "MemoryError", "bad_alloc"))


def peaks(size: tuple[int, int], encoder: str) -> None:
    print(f"\npeak GiB of a training step, {encoder} Unet at {size[0]}x{size[1]}")
    for words, batch, micro in (("micro-batch 1 of 1", 1, 1), ("micro-batch 1 of 16", 16, 1), ("16 at once", 16, 16)):
        found = (peak(batch, micro, checkpointing, size, encoder) for checkpointing in (False, True))
        plain, cheap = ("out of memory" if gib is None else f"{gib:.2f}" for gib in found)
        print(f"  {words:24} {plain:>13} plain   {cheap:>13} with --checkpointing", flush=True)


def step(batch: int, micro: int, checkpointing: bool, size: tuple[int, int], encoder: str) -> None:
    config = replace(RECIPES["full"], encoder=encoder, encoder_weights="none", encoder_lr=1.0, size=size)
    config = replace(config, batch_size=batch, checkpointing=checkpointing)
    memory.keep_freed(config.keep_memory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = CloudNet(config.architecture, encoder, config.class_head, config.dropout, config.decoder_width).to(device)
    prepare(network, checkpointing)
    optimizer = build_optimizer(network, config)
    allocate_state(optimizer)
    precision = "bf16" if device.type == "cuda" else "fp32"
    engine = Engine(network, loss.build(config), optimizer, micro_batch=micro, precision=precision)
    pixels = torch.zeros(batch, *size, dtype=torch.uint8)
    pixels[:, : size[0] // 2] = 0b1111
    inputs = torch.randint(0, 255, (batch, 3, *size), dtype=torch.uint8)
    done = engine.step(Batch(inputs, pixels, torch.arange(batch), total=batch), 0)
    if done.micro_batch < micro:  # the engine recovered with smaller ones; here that counts as out of memory
        raise MemoryError(f"micro-batches of {micro} did not fit, the engine went on with {done.micro_batch}")
    print(peak_memory(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "masks", "inference", "memory", "step"), default="all")
    parser.add_argument("--data", type=existing, help="folder with the competition's files [demo data]")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=height_and_width, default="1400,2100")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--micro", type=positive, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    if given.part == "step":
        step(given.batch, given.micro, given.checkpointing, given.size, given.encoder)
        return
    if given.part == "memory":
        peaks(given.size, given.encoder)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.data is None:
            demo.write_demo(Path(folder))
        data = RawData(given.data or Path(folder), "clouds", is_demo=given.data is None)
        if given.part in ("all", "masks"):
            masks(data)
        if given.part in ("all", "inference"):
            inference(data, given.encoder)


if __name__ == "__main__":
    main()
