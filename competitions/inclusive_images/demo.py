"""Demo data in the competition's file format: drawn scenes whose labels occur together as in photographs."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from common.files import write_csv

HEIGHT, WIDTH = 96, 128
IMAGES = {"train_images": 240, "tuning": 40, "test": 40}
Drawer = Callable[[np.ndarray, np.random.Generator], None]

# Scene -> labels that it always has, then labels with the fraction of its images that have them. Half of the labels
# have a parent label, as in Open Images: a boat is also a vehicle.
SCENES: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "coast": (("sky", "water", "beach"), {"boat": 0.5, "sun": 0.4, "bird": 0.3, "person": 0.3, "palm": 0.25}),
    "sea": (("sky", "water"), {"boat": 0.7, "bird": 0.4, "cloud": 0.4, "sun": 0.3}),
    "mountains": (("sky", "mountain"), {"snow": 0.6, "tree": 0.4, "cloud": 0.5, "bird": 0.2}),
    "city": (("sky", "building"), {"car": 0.6, "person": 0.5, "tree": 0.2, "cloud": 0.3, "road": 0.7}),
    "field": (("sky", "grass"), {"tree": 0.6, "flower": 0.5, "cow": 0.3, "sun": 0.3, "person": 0.15}),
    "garden": (("grass", "flower"), {"tree": 0.5, "bird": 0.2, "person": 0.2}),
    "night": (("building", "moon"), {"car": 0.4, "road": 0.5}),
}
KINDS = {
    "boat": "vehicle",
    "car": "vehicle",
    "tree": "plant",
    "flower": "plant",
    "palm": "plant",
    "grass": "plant",
    "bird": "animal",
    "cow": "animal",
}
LABELS = sorted({name for always, sometimes in SCENES.values() for name in (*always, *sometimes)} | set(KINDS.values()))
NEVER = "rainbow"  # in the list of trainable labels, but on no image
UNTRAINABLE = "outdoors"  # on images, but not in the list of trainable labels


def write_demo(folder: Path) -> None:
    """Draw the images and write all files of the competition; the same bytes every time."""
    rng = np.random.default_rng(0)
    names = [*LABELS, NEVER, UNTRAINABLE]
    code = {name: f"/m/0s{number:03d}" for number, name in enumerate(names)}
    order = rng.permutation(len(names) - 1)
    write_csv(folder / "classes-trainable.csv", ["label_code"], [(code[names[place]],) for place in order])
    write_csv(folder / "class-descriptions.csv", ["label_code", "description"], [(code[n], n) for n in names])

    train = []
    for number in range(IMAGES["train_images"]):
        image = f"{rng.integers(2**62):016x}"
        there = _scene(rng, poor=False, path=folder / "train_images" / f"{image}.jpg", number=number)
        noted = [name for name in there if rng.random() > 0.1] or there  # annotators overlook labels
        absent = [name for name in LABELS if name not in there]
        train += [(image, "verification", code[name], 1) for name in noted]
        train += [(image, "verification", code[name], 0) for name in rng.choice(absent, 2, replace=False)]
        train += [(image, "verification", code[UNTRAINABLE], 1)] if rng.random() < 0.1 else []
    write_csv(folder / "train_human_labels.csv", ["ImageID", "Source", "LabelName", "Confidence"], train)

    tuning, test = [], []
    for number in range(IMAGES["tuning"] + IMAGES["test"]):
        image = f"{rng.integers(2**62):016x}"
        there = _scene(rng, poor=True, path=folder / "stage_1_test_images" / f"{image}.jpg", number=number)
        if number < IMAGES["tuning"]:
            tuning.append((image, " ".join(code[name] for name in there)))
        else:
            test.append((image, f"{code['person']} {code['sky']}"))
    write_csv(folder / "tuning_labels.csv", tuning[0], tuning[1:])  # it has no header
    write_csv(folder / "stage_1_sample_submission.csv", ["image_id", "labels"], test)


def _scene(rng: np.random.Generator, poor: bool, path: Path, number: int) -> list[str]:
    """Draw one scene into `path`; returns its labels. `poor` images are blurred and noisy, like the test images."""
    kind = list(SCENES)[number % len(SCENES)]
    always, sometimes = SCENES[kind]
    there = [*always, *(name for name, part in sometimes.items() if rng.random() < part)]
    image = _background(kind, there, rng)
    for name in there:
        if name in DRAWERS:
            DRAWERS[name](image, rng)
    if poor:
        image = cv2.GaussianBlur(image, (3, 3), 0)
        image = np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70 if poor else 90])
    return [*there, *dict.fromkeys(KINDS[name] for name in there if name in KINDS)]


def _background(kind: str, there: list[str], rng: np.random.Generator) -> np.ndarray:
    """The background uint8 [H, W, 3] of a scene: the sky, if there is one, and the ground."""
    top = (20, 20, 45) if kind == "night" else (110, 165, 235) if "sky" in there else (70, 130, 60)
    image = np.full((HEIGHT, WIDTH, 3), top, np.uint8)
    horizon = int(HEIGHT * rng.uniform(0.4, 0.6))
    grounds = {"water": (40, 90, 150), "grass": (80, 160, 60), "mountain": (120, 110, 95), "building": (130, 130, 130)}
    image[horizon:] = next((colour for name, colour in grounds.items() if name in there), top)
    if "beach" in there:
        image[int(HEIGHT * 0.8) :] = (225, 205, 150)
    if "mountain" in there:
        peak = (int(rng.integers(30, 100)), int(rng.integers(8, 25)))
        ridge = np.array([(0, horizon + 12), peak, (WIDTH, horizon + 12)], np.int32)
        cv2.fillPoly(image, [ridge], (105, 95, 85))
        if "snow" in there:
            cv2.fillPoly(
                image, [np.array([peak, (peak[0] - 13, peak[1] + 14), (peak[0] + 13, peak[1] + 14)])], (245,) * 3
            )
    if "building" in there:
        for left in range(int(rng.integers(0, 12)), WIDTH - 20, int(rng.integers(22, 30))):
            roof = int(rng.integers(12, 40))
            cv2.rectangle(image, (left, roof), (left + 17, horizon + 15), (150, 110, 95), -1)
            for window in range(roof + 4, horizon + 10, 9):
                cv2.rectangle(image, (left + 4, window), (left + 8, window + 4), (250, 235, 150), -1)
    if "road" in there:
        cv2.rectangle(image, (0, 78), (WIDTH, 92), (60, 60, 65), -1)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def _round(colour: tuple[int, int, int], radius: int, low: int, high: int) -> Drawer:
    def draw(image: np.ndarray, rng: np.random.Generator) -> None:
        centre = int(rng.integers(12, WIDTH - 12)), int(rng.integers(low, high))
        cv2.circle(image, centre, radius, colour, -1)

    return draw


def _cloud(image: np.ndarray, rng: np.random.Generator) -> None:
    x, y = int(rng.integers(20, WIDTH - 20)), int(rng.integers(10, 24))
    for shift in (-10, 0, 10):
        cv2.ellipse(image, (x + shift, y), (11, 6), 0, 0, 360, (245, 245, 250), -1)


def _tree(image: np.ndarray, rng: np.random.Generator) -> None:
    x, y = int(rng.integers(12, WIDTH - 12)), int(rng.integers(48, 66))
    cv2.rectangle(image, (x - 2, y), (x + 2, y + 18), (95, 65, 35), -1)
    cv2.circle(image, (x, y - 4), 11, (25, 95, 35), -1)


def _palm(image: np.ndarray, rng: np.random.Generator) -> None:
    x, y = int(rng.integers(12, WIDTH - 12)), int(rng.integers(45, 60))
    cv2.line(image, (x, y), (x + 3, y + 30), (120, 85, 45), 3)
    for angle in range(0, 360, 60):
        end = (int(x + 13 * np.cos(np.radians(angle))), int(y + 8 * np.sin(np.radians(angle))))
        cv2.line(image, (x, y), end, (35, 125, 45), 2)


def _boat(image: np.ndarray, rng: np.random.Generator) -> None:
    x, y = int(rng.integers(20, WIDTH - 20)), int(rng.integers(60, 74))
    cv2.fillPoly(image, [np.array([(x - 13, y), (x + 13, y), (x + 8, y + 7), (x - 8, y + 7)])], (150, 50, 40))
    cv2.fillPoly(image, [np.array([(x, y - 20), (x, y - 2), (x + 11, y - 2)])], (250, 250, 245))


def _car(image: np.ndarray, rng: np.random.Generator) -> None:
    x, colour = int(rng.integers(18, WIDTH - 18)), tuple(int(value) for value in rng.choice([40, 120, 220], 3))
    cv2.rectangle(image, (x - 14, 76), (x + 14, 84), colour, -1)
    cv2.rectangle(image, (x - 7, 70), (x + 7, 77), colour, -1)
    for wheel in (x - 8, x + 8):
        cv2.circle(image, (wheel, 86), 4, (10, 10, 10), -1)


def _person(image: np.ndarray, rng: np.random.Generator) -> None:
    x, y = int(rng.integers(8, WIDTH - 8)), int(rng.integers(58, 68))
    cv2.circle(image, (x, y), 4, (225, 180, 150), -1)
    cv2.rectangle(image, (x - 3, y + 4), (x + 3, y + 20), (200, 30, 120), -1)


def _cow(image: np.ndarray, rng: np.random.Generator) -> None:
    x, y = int(rng.integers(18, WIDTH - 18)), int(rng.integers(64, 78))
    cv2.ellipse(image, (x, y), (12, 6), 0, 0, 360, (245, 240, 235), -1)
    cv2.circle(image, (x + 4, y), 4, (25, 20, 20), -1)
    cv2.circle(image, (x - 13, y - 4), 4, (25, 20, 20), -1)


def _flower(image: np.ndarray, rng: np.random.Generator) -> None:
    for _ in range(7):
        centre = int(rng.integers(4, WIDTH - 4)), int(rng.integers(66, HEIGHT - 4))
        cv2.circle(image, centre, 3, (230, 60, 110), -1)
        cv2.circle(image, centre, 1, (250, 220, 60), -1)


def _bird(image: np.ndarray, rng: np.random.Generator) -> None:
    x, y = int(rng.integers(10, WIDTH - 10)), int(rng.integers(10, 36))
    for side in (-1, 1):
        cv2.line(image, (x, y + 4), (x + side * 7, y), (15, 15, 20), 2)


DRAWERS: dict[str, Drawer] = {
    "sun": _round((255, 225, 60), 9, 10, 26),
    "moon": _round((235, 235, 215), 7, 9, 20),
    "cloud": _cloud,
    "tree": _tree,
    "palm": _palm,
    "boat": _boat,
    "car": _car,
    "person": _person,
    "cow": _cow,
    "flower": _flower,
    "bird": _bird,
}
