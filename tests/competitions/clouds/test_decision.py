"""Decisions and their tuning, compared with slow loops, cases worked out by hand and the applied decisions."""

from functools import partial

import cv2
import numpy as np
import pytest
import torch

from common.vision.tta import FLIPS
from competitions.clouds import decision, tuning
from competitions.clouds.decision import Rule
from competitions.clouds.reader import CLASSES
from competitions.clouds.task import _undo

HEIGHT, WIDTH = 350, 525


def packed(pixels: np.ndarray, presence: np.ndarray) -> torch.Tensor:
    """Pixels [B, 4, 350, 525] and presence [B, 4] -> flat predictions whose presence by head and by pixels is equal."""
    pixels, presence = torch.as_tensor(pixels, dtype=torch.float32), torch.as_tensor(presence, dtype=torch.float32)
    return torch.cat((presence[:, :, None], presence[:, :, None], pixels.flatten(2)), 2)


def split(values):
    """Flat predictions [B, 4, 2 + n], which tests make and compare more easily, -> the competition's dict."""
    return {"presence": values[:, :, :2], "pixels": values[:, :, 2:].reshape(*values.shape[:2], HEIGHT, WIDTH)}


def flat(predictions: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat((predictions["presence"], predictions["pixels"].flatten(2)), 2)


def tuned(rule: Rule, force: bool = False, presence: str = "head") -> dict:
    return decision.to_tuned([rule] * 4, force, presence)


def smooth(rng: np.random.Generator, spots: float) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32), (0, 0), spots)
    return noise / noise.std()


@pytest.fixture(scope="module")
def toy() -> tuple[np.ndarray, np.ndarray]:
    """Stored predictions uint8 [30, 4, 2 + n] correlated with the truth bool [30, 4, 350, 525]."""
    rng = np.random.default_rng(0)
    kept, truth = np.zeros((30, 4, 2 + HEIGHT * WIDTH), np.uint8), np.zeros((30, 4, HEIGHT, WIDTH), bool)
    for image in range(30):
        for label in range(4):
            shape, present = smooth(rng, 25), rng.random() < 0.5
            truth[image, label] = (shape > 0.7) & present
            logits = 2 * (shape - 0.9) + smooth(rng, 12) - (0 if present else 1.5)
            pixels = 1 / (1 + np.exp(-logits))
            kept[image, label, 1] = np.rint(255 * (pixels**4).mean() ** 0.25)
            kept[image, label, 2:] = np.rint(255 * pixels).reshape(-1)
            kept[image, label, 0] = 255 * np.clip((0.65 if present else 0.35) + 0.15 * rng.standard_normal(), 0, 1)
    return kept, truth


def test_minimum_size_removes_one_pixel_less_and_keeps_it_itself():
    pixels = np.zeros((1, 4, HEIGHT, WIDTH))
    pixels[0, :, 10:20, 10:20] = 0.9  # 100 pixels
    predictions = packed(pixels, np.ones((1, 4)))
    assert decision.apply(split(predictions), tuned(Rule(size=100))).sum() == 400
    assert decision.apply(split(predictions), tuned(Rule(size=101))).sum() == 0


def test_the_lower_threshold_reaches_out_of_surviving_regions_only():
    pixels = np.zeros((1, 4, HEIGHT, WIDTH))
    pixels[0, :, 10:60, 10:60] = 0.4
    pixels[0, :, 20:40, 20:40] = 0.8  # a core of 400 in a region of 2500
    pixels[0, :, 100:150, 100:150] = 0.4  # no core
    pixels[0, :, 200:250, 200:250] = 0.4
    pixels[0, :, 200:205, 200:205] = 0.8  # a core that is too small
    predictions = packed(pixels, np.ones((1, 4)))
    bottom = decision.apply(split(predictions), tuned(Rule(top=0.7, size=100, bottom=0.3)))[0, 0].bool()
    top = decision.apply(split(predictions), tuned(Rule(top=0.7, size=100, bottom=0.7)))[0, 0].bool()
    assert top.sum() == 400 and bottom.sum() == 2500 and bottom[top].all() and bottom[10:60, 10:60].all()


def test_the_gate_empties_the_class_and_the_best_class_can_be_forced():
    pixels = np.full((2, 4, HEIGHT, WIDTH), 0.9)
    presence = np.array([[0.1, 0.4, 0.3, 0.2], [0.6, 0.1, 0.7, 0.1]])
    found = decision.apply(split(packed(pixels, presence)), tuned(Rule(gate=0.5))).flatten(2).any(2)
    assert found.tolist() == [[False] * 4, [True, False, True, False]]
    found = decision.apply(split(packed(pixels, presence)), tuned(Rule(gate=0.5), force=True)).flatten(2).any(2)
    assert found.tolist() == [[False, True, False, False], [True, False, True, False]]


def test_convex_hull_fills_each_region_by_itself():
    pixels = np.zeros((1, 4, HEIGHT, WIDTH))
    pixels[0, :, 10:50, 10:15] = pixels[0, :, 45:50, 10:50] = 0.9  # an L
    pixels[0, :, 200:210, 300:310] = 0.9
    mask = decision.apply(split(packed(pixels, np.ones((1, 4)))), tuned(Rule(hull=True)))[0, 0].bool()
    assert mask[40, 20] and not mask[12, 45] and not mask[120, 150]
    assert mask[200:210, 300:310].all() and mask[200:, 200:].sum() == 100
    assert mask.sum() > (pixels[0, 0] > 0).sum() + 500


def test_rules_that_nothing_was_learnt_for():
    pixels = np.full((1, 4, HEIGHT, WIDTH), 0.45)
    pixels[0, :, :, :100] = 0.55
    found = decision.apply(split(packed(pixels, np.array([[0.4, 0.6, 0.4, 0.6]]))), {})
    assert found.flatten(2).sum(2).tolist() == [[0, 35000, 0, 35000]]


def test_kept_predictions_decide_like_fresh_ones(toy):
    from common.predictions import pack, unpack

    rng = np.random.default_rng(1)
    fresh = packed(rng.random((2, 4, HEIGHT, WIDTH)), rng.random((2, 4)))
    rule = tuned(Rule(gate=0.3, top=0.6, size=3, bottom=0.45))
    assert torch.equal(decision.apply(split(fresh), rule), decision.apply(split(unpack(pack(fresh, "uint8"))), rule))


def test_predict_is_probabilities_at_the_scored_size():
    logits = {"pixels": torch.randn(2, 4, 64, 96), "classes": torch.randn(2, 4)}
    predictions = flat(decision.predict(logits))
    assert predictions.shape == (2, 4, 2 + HEIGHT * WIDTH)
    assert torch.equal(predictions[:, :, 0], logits["classes"].sigmoid())
    even = {"pixels": torch.full((1, 4, 700, 1050), 2.0), "classes": torch.zeros(1, 4)}
    assert torch.allclose(flat(decision.predict(even))[:, :, 2:], torch.tensor(2.0).sigmoid())


def test_every_pixel_of_a_larger_network_counts():
    """Every fourth column is 1: bilinear interpolation without antialiasing would sample between zeros only."""
    logits = torch.full((1, 4, 4 * HEIGHT, 4 * WIDTH), -50.0)
    logits[..., ::4] = 50.0
    pixels = flat(decision.predict({"pixels": logits, "classes": torch.zeros(1, 4)}))[:, :, 2:].unflatten(
        2, (HEIGHT, WIDTH)
    )
    assert torch.allclose(pixels[..., 2:-2], torch.tensor(0.25), atol=0.07)
    assert float(pixels.mean()) == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("way", list(FLIPS.values())[1:])
def test_tta_undoes_what_it_did(way):
    """If a network treats all positions alike, flipping the image and undoing it does not change the predictions."""

    def network(images):
        values = images.float().mean(1, keepdim=True).expand(-1, 4, -1, -1) / 255
        return {"pixels": values, "classes": values.mean((2, 3))}

    images = torch.randint(0, 255, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    direct = flat(decision.predict(network(images)))
    turned = flat(_undo(way, decision.predict(network(way.apply(images)))))
    assert torch.allclose(direct, turned, atol=1e-6)
    assert not torch.allclose(direct, flat(decision.predict(network(way.apply(images)))), atol=1e-3)


def test_dice_hand_cases():
    masks, truth = np.zeros((2, 1, 4, 2, 2), bool)
    masks[0, 1, 0, 0] = True  # found, not there
    truth[0, 2, 0, 0] = True  # there, not found
    masks[0, 3, 0], truth[0, 3, :, 0] = True, True  # one pixel of two in common
    assert decision.dice(masks, truth).tolist() == [[1.0, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("source", ["head", "pixels"])
def test_tables_hold_the_dice_of_the_decisions_themselves(toy, source):
    kept, truth = toy
    found = tuning.tables(split(kept[:6]), lambda row: truth[row], source)
    rng = np.random.default_rng(2)
    for _ in range(150):
        top = rng.integers(len(tuning.LEVELS))
        bottom, size, gate = rng.integers(top + 1), rng.integers(len(tuning.SIZES)), rng.integers(len(tuning.GATES))
        rule = Rule(tuning.GATES[gate], tuning.LEVELS[top], tuning.SIZES[size], tuning.LEVELS[bottom])
        row, label = rng.integers(6), rng.integers(4)
        rules = tuned(rule, presence=source)
        masks = decision.apply(split(torch.from_numpy(kept[row : row + 1] / np.float32(255))), rules)
        expected = decision.dice(masks.bool().numpy(), truth[row : row + 1])[0, label]
        assert tuning.dice_of(found[label], rule)[row] == pytest.approx(float(expected), abs=1e-6)


def test_search_finds_the_best_of_a_slow_loop(toy):
    kept, truth = toy
    table = tuning.tables(split(kept[:8]), lambda row: truth[row])[1]
    rows = np.array([0, 2, 3, 5, 7])
    best = max(
        tuning.dice_of(table, Rule(gate, tuning.LEVELS[top], size, tuning.LEVELS[bottom]))[rows].mean()
        for gate in tuning.GATES
        for bottom, top in tuning.PAIRS
        for size in tuning.SIZES
    )
    assert tuning.dice_of(table, tuning.search(table, rows, "bottom"))[rows].mean() == pytest.approx(best, abs=1e-6)
    for stage, free in (("plain", ""), ("gate", "gate"), ("threshold", "gate top"), ("size", "gate top size")):
        rule = tuning.search(table, rows, stage)
        assert "gate" in free or rule.gate == 0
        assert "top" in free or rule.top == 0.5
        assert "size" in free or rule.size == 1
        assert rule.bottom == rule.top


def test_learning_reports_what_holds_on_images_it_was_not_tuned_on(toy):
    kept, truth = toy
    found = tuning.tune(split(kept), lambda row: truth[row])
    assert set(found["rules"]) == set(CLASSES) and set(tuning.STAGES) < set(found["held_out"])
    assert found["held_out"]["gate"] > found["held_out"]["plain"] + 0.1
    masks = decision.apply(split(torch.from_numpy(kept / np.float32(255))), found)
    tuned_on = decision.dice(masks.bool().numpy(), truth).mean()
    assert float(tuned_on) > max(found["held_out"].values())  # the optimistic bias that nested validation removes
    import json

    assert json.loads(json.dumps(found)) == found


def test_presence_by_pixels_is_the_fourth_root_of_their_mean_fourth_power():
    logits = {"pixels": torch.randn(2, 4, HEIGHT, WIDTH), "classes": torch.randn(2, 4)}
    predictions = flat(decision.predict(logits)).double()
    slow = (predictions[:, :, 2:] ** 4).sum(2) / (HEIGHT * WIDTH)
    torch.testing.assert_close(predictions[:, :, 1], slow**0.25, rtol=1e-5, atol=0)
    certain = flat(decision.predict({"pixels": torch.full((1, 4, 64, 96), 50.0), "classes": torch.zeros(1, 4)}))
    assert torch.allclose(certain[:, :, 1], torch.tensor(1.0))


def test_the_gate_of_several_networks_is_that_of_one():
    """Two networks predict different places with the same confidence: each passes the gate, so their mean does too.

    The presence computed from the averaged pixels would be lower than that of either (Minkowski's inequality).
    """
    logits = torch.full((2, 4, HEIGHT, WIDTH), -8.0)
    logits[0, :, :100], logits[1, :, 200:300] = 3.0, 3.0
    single = flat(decision.predict({"pixels": logits, "classes": torch.zeros(2, 4)}))
    mean = single.mean(0, keepdim=True)
    of_the_mean = float((mean[:, :, 2:] ** 4).mean(2).pow(0.25)[0, 0])
    assert of_the_mean < 0.7 * float(mean[0, 0, 1]) == pytest.approx(0.7 * float(single[0, 0, 1]), rel=1e-5)
    gate = (of_the_mean + float(mean[0, 0, 1])) / 2
    rule = tuned(Rule(gate=gate, top=0.4, bottom=0.4), presence="pixels")
    assert decision.apply(split(mean), rule)[0].flatten(1).sum(1).tolist() == [200 * WIDTH] * 4


def test_a_class_head_that_knows_nothing_is_left_aside(toy):
    kept, truth = toy[0].copy(), toy[1]
    kept[:, :, 0] = np.random.default_rng(5).integers(0, 256, (len(kept), 4))
    found = tuning.tune(split(kept), lambda row: truth[row])
    assert found["presence"] == "pixels" and found["score"] > found["held_out"]["gate"]


def tuner(gain: np.ndarray, empty: np.ndarray, presence: np.ndarray, seed: int = 0) -> tuning.Tuner:
    """A Tuner with one table [m, cells] for all classes and presence sources, and without images for convex hulls."""
    made = object.__new__(tuning.Tuner)
    made.seed, made.count, made.hulls = seed, len(empty), [None] * len(CLASSES)
    found = [tuning.Table(gain.astype(np.float32), empty.astype(np.float32), presence)] * len(CLASSES)
    made.tables = {(source, force): found for source in decision.SOURCES for force in (False, True)}
    return made


def test_noise_gains_nothing_on_held_out_images():
    """Control: rules tuned on random presence score better on the tuning images but not on held-out ones."""
    rng = np.random.default_rng(4)
    count = 60
    gain = rng.random((count, len(tuning.PAIRS) * len(tuning.SIZES)))
    made = tuner(gain, np.zeros(count), rng.integers(0, 256, count).astype(np.uint8))
    way, rows = tuning.Way("bottom"), np.arange(count)
    tuned = tuning.dice_of(made.tables["head", False][0], made.rule(way, 0, rows)).mean()
    assert tuned > 0.55
    assert made.held_out(way, rows).mean() < 0.53


def test_the_score_is_that_of_a_slow_loop_that_shows_the_held_out_images_to_nobody():
    """The slow loop repeats choice and tuning for every outer split, on copies of the images outside it only."""
    rng = np.random.default_rng(3)
    count, seed = 40, 2
    gain = rng.normal(0.05, 0.5, (count, len(tuning.PAIRS) * len(tuning.SIZES)))
    empty, presence = rng.random(count), rng.integers(0, 256, count).astype(np.uint8)
    whole = tuner(gain, empty, presence, seed)
    whole.choose = partial(without_extras, whole)
    total = 0.0
    for repeat in range(tuning.OUTER_REPEATS):
        part = np.random.default_rng((seed, tuning.OUTER, repeat)).permutation(count) % tuning.SPLITS
        for held in range(tuning.SPLITS):
            seen = part != held
            alone = tuner(gain[seen], empty[seen], presence[seen], seed)
            way, _ = without_extras(alone, np.arange(seen.sum()))
            rule = alone.rule(way, 0, np.arange(seen.sum()))
            total += tuning.dice_of(whole.tables["head", False][0], rule)[~seen].sum()
    assert whole.score() == pytest.approx(total / count / tuning.OUTER_REPEATS)


def without_extras(made: tuning.Tuner, rows: np.ndarray) -> tuple[tuning.Way, dict]:
    """`choose` without its hull and force options, for a Tuner without images."""
    dice = {way: made.held_out(way, rows) for way in tuning.WAYS}
    best = max(dice, key=lambda way: dice[way].mean())
    return next(way for way in tuning.WAYS if not tuning._better(dice[best], dice[way])), {}


def test_one_and_two_images_can_be_learnt_from(toy):
    kept, truth = toy
    for count in (1, 2):
        with np.errstate(all="raise"):
            assert tuning.tune(split(kept[:count]), lambda row: truth[row])["rules"]


def test_a_class_that_no_held_out_image_has_is_gated_away(toy):
    kept, truth = toy
    label, without = CLASSES.index("Sugar"), truth.copy()
    without[:, label] = False
    with np.errstate(all="raise"):
        found = tuning.tune(split(kept), lambda row: without[row])
    masks = decision.apply(split(torch.from_numpy(kept / np.float32(255))), found)
    dice = decision.dice(masks.bool().numpy(), without)
    assert not masks[:, label].any() and dice[:, label].mean() == 1
    assert all(np.isfinite(score) for score in found["held_out"].values())


def test_of_ways_that_differ_by_chance_the_simplest_is_taken(toy, monkeypatch):
    made = tuning.Tuner(split(toy[0][:2]), lambda row: toy[1][row])
    noise = np.random.default_rng(0).normal(0.6, 0.1, 400)

    def worth(better: dict[tuning.Way, np.ndarray]):
        monkeypatch.setattr(made, "held_out", lambda way, rows: noise + better.get(way, 0))
        return made.choose(np.arange(400))[0]

    plain, by_pixels, by_head = tuning.WAYS[:3]
    assert (plain.stage, by_pixels.name, by_head.name) == ("plain", "gate by pixels", "gate")
    chance, real = np.random.default_rng(1).normal(0.002, 0.1, (2, 400)), np.full(400, 0.05)
    assert worth({}) == plain == worth({by_head: chance[0]})
    assert worth({by_head: real}) == by_head and worth({by_head: real, by_pixels: real}) == by_pixels
    last = tuning.WAYS[-1]
    assert worth({last: real + chance[1], by_head: real}) == by_head  # `last` is better by less than a standard error
    forced, filled = tuning.replace(plain, force=True), tuning.replace(plain, hull=True)
    assert worth({forced: chance[0], filled: chance[1]}) == plain
    assert worth({forced: real}) == forced and worth({filled: real}) == filled


def ring(*box: int) -> np.ndarray:
    """bool [350, 525]: the border of a box, ten pixels wide."""
    top, bottom, left, right = box
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    mask[top + 10 : bottom - 10, left + 10 : right - 10] = False
    return mask


@pytest.fixture(scope="module")
def rings() -> tuple[np.ndarray, np.ndarray]:
    """Stored predictions of rings on three images; the truth of the first two classes is the filled boxes."""
    kept, truth = np.zeros((3, 4, 2 + HEIGHT * WIDTH), np.uint8), np.zeros((3, 4, HEIGHT, WIDTH), bool)
    for image in range(3):
        box = (50, 150 + 20 * image, 100, 200 + 30 * image)
        for label in range(4):
            kept[image, label, 2:] = 230 * ring(*box).reshape(-1)
            truth[image, label] = ring(*box)
            if label < 2:
                truth[image, label, box[0] : box[1], box[2] : box[3]] = True
    # The head's presence is below 0.5 for every class and highest for the first.
    kept[:, :, 0] = 255 * np.array([[0.3, 0.2, 0.1, 0.2]])
    kept[:, :, 1] = 200
    return kept, truth


def test_hulls_are_filled_for_the_classes_where_that_is_better(rings):
    made = tuning.Tuner(split(rings[0]), lambda row: rings[1][row])
    rows = np.arange(3)
    for stage in ("plain", "bottom"):
        filled = [made.rule(tuning.Way(stage, hull=True), label, rows).hull for label in range(4)]
        assert filled == [True, True, False, False]
        assert not any(made.rule(tuning.Way(stage), label, rows).hull for label in range(4))


@pytest.mark.parametrize("force", [False, True])
def test_the_way_that_was_chosen_is_what_the_run_decides_by(rings, monkeypatch, force):
    way = tuning.Way("gate", "head", force=force, hull=True)
    monkeypatch.setattr(tuning.Tuner, "choose", lambda made, rows: (way, {}))
    found = tuning.tune(split(rings[0]), lambda row: rings[1][row])
    assert (found["force_best"], found["presence"], found["stage"]) == (force, "head", "gate")
    assert [found["rules"][name]["hull"] for name in CLASSES] == [True, True, False, False]
    gated = {name: rule | {"gate": 0.5} for name, rule in found["rules"].items()}
    masks = decision.apply(split(torch.from_numpy(rings[0] / np.float32(255))), found | {"rules": gated})
    assert masks.flatten(2).any(2).tolist() == [[force, False, False, False]] * 3


def test_a_forced_class_is_tuned_as_it_is_decided(rings):
    made = tuning.Tuner(split(rings[0]), lambda row: rings[1][row])
    for label, presence in enumerate([255, 51, 25, 51]):
        assert (made.tables["head", True][label].presence == presence).all(), label
    assert (made.tables["head", False][0].presence == 76).all()
