"""Demo data in the competition's file format: blue sea under four textures of cloud, with their masks."""

from pathlib import Path

import cv2
import numpy as np

from common.files import write_csv
from common.vision import rle
from competitions.clouds.reader import CLASSES, MASK_SIZE

TRAIN_IMAGES, TEST_IMAGES = 24, 6
SEED = 2019
HALF = (MASK_SIZE[0] // 2, MASK_SIZE[1] // 2)  # textures are drawn at half size: seconds instead of a minute
SEA = np.array((38, 58, 92), np.float32)  # RGB
QUALITY = 85  # of the JPEGs, about 400 kB each


def write_demo(folder: Path) -> None:
    """Write train.csv, sample_submission.csv and the JPEGs into `folder`; the same bytes every time."""
    rng = np.random.default_rng(SEED)
    rows = []
    names = [f"{number:07x}.jpg" for number in rng.choice(16**7, TRAIN_IMAGES + TEST_IMAGES, replace=False)]
    for number, name in enumerate(names):
        test = number >= TRAIN_IMAGES
        image, masks = draw(rng, first=number % len(CLASSES))
        path = folder / ("test_images" if test else "train_images") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _, data = cv2.imencode(".jpg", image[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, QUALITY))
        path.write_bytes(data.tobytes())
        if not test:
            rows += [(f"{name}_{label}", rle.encode(mask)) for label, mask in zip(CLASSES, masks, strict=True)]
    expected = [(f"{name}_{label}", "1 1") for name in sorted(names[TRAIN_IMAGES:]) for label in CLASSES]
    for file, cells in (("train.csv", rows), ("sample_submission.csv", expected)):
        write_csv(folder / file, ["Image_Label", "EncodedPixels"], cells)


def draw(rng: np.random.Generator, first: int) -> tuple[np.ndarray, np.ndarray]:
    """One RGB image uint8 [1400, 2100, 3] with its masks bool [4, 1400, 2100]; class `first` is always present."""
    masks = np.zeros((len(CLASSES), *MASK_SIZE), bool)
    cover = 0.25 * smooth(rng, 90) + 0.05 * smooth(rng, 4)  # haze over the whole image
    others = rng.permutation([label for label in range(len(CLASSES)) if label != first])
    free = np.ones(HALF, bool)
    for label in (first, *others[: rng.integers(0, 3)]):
        region = rectangles(rng) & free
        free &= ~region
        masks[label] = np.repeat(np.repeat(region, 2, axis=0), 2, axis=1)
        soft = cv2.GaussianBlur(region.astype(np.float32), (0, 0), 12)
        cover = np.maximum(cover, soft * TEXTURES[CLASSES[label]](rng))
    image = SEA + np.clip(cover, 0, 1)[:, :, None] * (np.float32(245) - SEA)
    return cv2.resize(image.astype(np.uint8), MASK_SIZE[::-1]), masks


def rectangles(rng: np.random.Generator) -> np.ndarray:
    """A region of one or two overlapping boxes, like those of the annotators: bool, of size HALF."""
    region = np.zeros(HALF, bool)
    height, width = (int(side * rng.uniform(0.4, 0.75)) for side in HALF)
    top, left = rng.integers(0, HALF[0] - height), rng.integers(0, HALF[1] - width)
    region[top : top + height, left : left + width] = True
    if rng.random() < 0.4:
        region[top + height // 2 : top + height + 60, left + width // 3 : left + width + 120] = True
    return region


def smooth(rng: np.random.Generator, scale: float, stretch: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """Noise of size HALF, mean 0 and deviation 1: spots of about `scale` pixels, `stretch` times longer at `angle`."""
    step = max(1, int(scale / 2))  # coarse noise is drawn smaller and enlarged, because a wide blur is slow
    height, width = (side // step + 4 for side in HALF)
    noise = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), scale / step)
    if stretch != 1:
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
        turn[0] /= stretch
        noise = cv2.warpAffine(noise, turn, (width, height), flags=cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT)
    noise = cv2.resize(noise, HALF[::-1], interpolation=cv2.INTER_CUBIC)
    return (noise - noise.mean()) / noise.std()


def _fish(rng: np.random.Generator) -> np.ndarray:
    """Fish bones: long bands with fine stripes across."""
    angle = rng.uniform(-40, 40)
    bands = 1 - np.abs(smooth(rng, 16, 5, angle))
    return np.clip(bands, 0, 1) * (0.75 + 0.25 * smooth(rng, 3, 3, angle + 90))


def _flower(rng: np.random.Generator) -> np.ndarray:
    """Large bright heads with dark sea between them."""
    return np.clip(2 * smooth(rng, 26) - 0.9, 0, 1) * (0.9 + 0.1 * smooth(rng, 2))


def _gravel(rng: np.random.Generator) -> np.ndarray:
    """Small cells: thin rings of cloud around open water."""
    return np.clip(1 - 2.5 * np.abs(smooth(rng, 7)), 0, 1)


def _sugar(rng: np.random.Generator) -> np.ndarray:
    """Dust: only very fine grains."""
    return np.clip(0.35 + 0.4 * smooth(rng, 1.2), 0, 0.8)


TEXTURES = {"Fish": _fish, "Flower": _flower, "Gravel": _gravel, "Sugar": _sugar}
