"""The whole competition on its demo data: rows, samples, network, losses, submission and refused settings."""

import dataclasses
import shutil

import cv2
import numpy as np
import pytest
import torch

from common import checkpoint, competition, submission
from common import run as runs
from common.config import add_prediction_flags, checked, with_flags
from common.defaults import completed
from common.errors import UserError
from common.flags import Parser
from common.loading import orders
from common.loading.loader import Loader
from common.losses import batch_value, kind
from common.preflight import check_before, try_out
from common.raw import RawData
from common.report import Report
from common.vision import store
from competitions.inclusive_images import decision, demo, model, plots, rows, task
from competitions.inclusive_images.config import RECIPES, TagConfig

SMOKE = dataclasses.replace(RECIPES["smoke"], clusters=0)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> RawData:
    folder = tmp_path_factory.mktemp("demo")
    demo.write_demo(folder)
    return RawData(folder, "inclusive_images", is_demo=True)


def built(raw: RawData, **changes):
    return completed(task.build(checked(dataclasses.replace(SMOKE, **changes)), raw, print), raw)


def checked_before(built_task) -> None:
    check_before(built_task, competition.load("inclusive_images"))
    try_out(built_task, SMOKE)


def test_sample_is_seeded_and_its_labels_come_together(raw, tmp_path):
    demo.write_demo(tmp_path)
    for name in ("train_human_labels.csv", "tuning_labels.csv", "stage_1_sample_submission.csv"):
        assert (tmp_path / name).read_bytes() == (raw.path / name).read_bytes()
    files = rows.read(SMOKE, raw, lambda message: None)
    column = {name: place for place, name in enumerate(files.index.names)}
    table = files.labels.toarray()

    def lift(first: str, second: str) -> float:
        a, b = table[:, column[first]], table[:, column[second]]
        return (a & b).mean() / (a.mean() * b.mean())

    assert lift("boat", "water") > 1.5 > 1 > lift("boat", "moon")
    assert 2 < table.sum(1).mean() < 8 and table[:, column["rainbow"]].sum() == 0


@pytest.mark.parametrize(
    "which, n, held", [("train", 240, 48), ("validated", 280, 40), ("both", 280, 8), ("tuning", 40, 8)]
)
def test_rows_of_every_choice(raw, which, n, held):
    found = rows.read(dataclasses.replace(SMOKE, rows=which), raw, lambda message: None)
    assert (len(found.ids), int((found.folds == 0).sum())) == (n, held)
    always = found.folds == -1
    assert always.sum() == (240 if which in ("validated", "both") else 0)
    if which == "train":
        assert found.fitted.shape[0] == 192, "the label vectors do not see the fold that is held out"


def test_samples_and_their_targets(raw):
    built_task = built(raw)
    image, targets = built_task.data.valid[3]
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
    files = rows.read(SMOKE, raw, lambda message: None)
    embedding = rows.embed(SMOKE, files)
    assert targets["labels"].tolist() == files.labels[3].toarray()[0].tolist()
    assert torch.allclose(targets["embedding"], torch.from_numpy(embedding.vectors[files.labels[3].indices].sum(0)))
    assert float(targets["count"]) == files.labels[3].nnz
    assert built_task.data.test[0][1].numel() == 0


def test_augmented_batches_vary_and_do_not_depend_on_workers(raw):
    built_task = built(raw, augment="heavy")
    order = orders.sequential(np.arange(24))

    def epoch(workers: int, number: int) -> torch.Tensor:
        with Loader(built_task.data.train, order, 12, seed=0, workers=workers) as loader:
            return torch.cat([batch.inputs for batch in loader.epoch(number)])

    first, second = epoch(0, 0), epoch(0, 1)
    assert torch.equal(first, epoch(2, 0))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True)), "every image differs in every epoch"
    changed = torch.stack([first[row] != built_task.data.valid[row][0] for row in range(24)])
    assert changed.float().mean() > 0.5


@pytest.mark.parametrize(("mix", "least", "most"), [("mixup", 4, 20), ("cutmix", 4, 20), ("both", 14, 24)])
def test_blended_pairs_share_their_labels_and_their_vectors(raw, mix, least, most):
    built_task = built(raw, mix=mix, augment="none")
    order = orders.sequential(np.arange(24))
    with Loader(built_task.data.train, order, 24, seed=0, mix=built_task.data.mix) as loader:
        batch = next(loader.epoch(0))
    plain = [built_task.data.valid[row] for row in range(24)]
    blended = 0
    for row, (image, targets) in enumerate(plain):
        partner = plain[row ^ 1][1]
        own, other = targets["labels"].float(), partner["labels"].float()
        got, different = batch.targets["labels"][row], own != other
        part = float(((got - other) / (own - other))[different].mean()) if different.any() else 1.0
        assert torch.allclose(got, part * own + (1 - part) * other, atol=1e-5)
        vector = part * targets["embedding"] + (1 - part) * partner["embedding"]
        assert torch.allclose(batch.targets["embedding"][row], vector, atol=1e-4)
        blended += not torch.equal(batch.inputs[row], image)
    assert least <= blended <= most, "about half of the pairs, or four fifths"


@pytest.mark.parametrize("augment", ["none", "light"])
def test_crops_of_larger_images_have_the_size_and_more_detail(raw, augment):
    """A crop of an image of the final size must be enlarged, which blurs it: its neighbouring pixels differ less."""

    def sharpness(images: torch.Tensor) -> float:
        return images.float().diff(dim=-1).abs().mean().item()

    built_task, plain = built(raw, augment=augment, detail=2.0), built(raw, augment=augment)
    found = {}
    for name, own in (("detail", built_task), ("plain", plain)):
        with Loader(own.data.train, orders.sequential(np.arange(40)), 40, seed=0) as loader:
            found[name] = next(loader.epoch(0)).inputs
    assert found["detail"].shape == found["plain"].shape == (40, 3, 64, 64)
    valid = torch.stack([built_task.data.valid[row][0] for row in range(40)])
    assert built_task.data.test[0][0].shape == (3, 64, 64)
    if augment == "none":
        assert torch.equal(found["detail"], valid), "without augmentation both are resized alike"
    else:
        assert sharpness(found["detail"]) > 1.02 * sharpness(found["plain"])


def test_images_are_resized_once_up_to_a_limit(raw, monkeypatch, capsys):
    expected = built(raw).data.valid[0][0]
    monkeypatch.setattr(store, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(built(raw).data.valid[0][0], expected)
    monkeypatch.undo()
    capsys.readouterr()
    assert torch.equal(built(raw, cache_gb=0.0).data.valid[0][0], expected)
    assert "decoded at every use" not in capsys.readouterr().out, "that was asked for"
    assert torch.equal(built(raw, cache_gb=1e-4).data.valid[0][0], expected)
    said = capsys.readouterr().out
    assert "240 images are decoded at every use" in said and "40 images are decoded at every use" in said
    built(raw)
    assert "decoded at every use" not in capsys.readouterr().out


def test_an_unreadable_test_image_is_named_before_the_training_and_may_be_replaced(raw, tmp_path):
    shutil.copytree(raw.path, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    other = RawData(tmp_path / "data", "inclusive_images")
    whole = built(other)
    checked_before(whole)
    image = other.path / "stage_1_test_images" / f"{whole.data.test_ids[3]}.jpg"
    contents = image.read_bytes()
    image.write_bytes(contents[:100])
    for _ in range(2):  # first while the cache file is made, then with the file there
        broken = built(other)
        with pytest.raises(UserError, match=f"1 of 40 test images cannot be read .*{image.name} is truncated"):
            checked_before(broken)
    black = np.zeros((64, 64, 3), np.uint8)
    cv2.imwrite(str(image), black)
    mended = built(other)
    checked_before(mended)
    assert whole.fingerprint == broken.fingerprint == mended.fingerprint, "what was trained goes on"
    next((other.path / "train_images").iterdir()).write_bytes(contents)
    assert built(other).fingerprint != whole.fingerprint


@pytest.mark.parametrize("loss", ["bce", "focal", "f2", "bce+f2", "pvn"])
@pytest.mark.parametrize("embedding_loss", ["cosine", "mse"])
def test_every_loss_is_per_sample_and_finite(raw, loss, embedding_loss):
    built_task = built(raw, loss=loss, embedding_loss=embedding_loss)
    with Loader(built_task.data.valid, orders.sequential(np.arange(8)), 8, seed=0) as loader:
        batch = next(loader.epoch(0))
    network = built_task.network.model().train()
    value = batch_value(built_task.network.loss, network(batch.inputs), batch.targets)
    value.backward()
    assert kind(built_task.network.loss) == "per_sample" and torch.isfinite(value)
    heads = [network.heads[name].weight.grad.abs().sum() for name in model.HEADS]
    assert all(torch.isfinite(slope) and slope > 0 for slope in heads), "both heads and the count get gradients"


def test_the_loss_called_f2_is_the_soft_f2_of_every_image(raw):
    logits = torch.randn(6, 23, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(6, 23, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    loss = built(raw, loss="f2", embedding=0.0, count=0.0).network.loss
    found = logits.sigmoid()
    hits, slack = (found * labels).sum(1), 0.1
    wanted = 1 - (5 * hits + slack) / (4 * labels.sum(1) + found.sum(1) + slack)
    value = batch_value(loss, {"labels": logits}, {"labels": labels})
    assert float(value) == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_what_was_trained_against_negatives_is_predicted_against_them(raw):
    logits = torch.randn(4, 23, generator=torch.Generator().manual_seed(0))
    against = decision.against_negatives(logits)
    assert torch.equal(built(raw, loss="pvn").postprocess.predict({"labels": logits}), against)
    assert torch.equal(built(raw, loss="bce").postprocess.predict({"labels": logits}), logits.sigmoid())
    alone = built(raw, loss="pvn", classifier=0.0, embedding=1.0)
    assert torch.equal(alone.postprocess.predict({"labels": logits}), logits.sigmoid()), "no classifier was trained so"


def test_training_drops_the_set_part_of_the_features_and_evaluation_none(raw):
    network, seen = built(raw, dropout=0.75).network.model(), []
    network.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    network.heads["labels"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network.train()(images)
    pooled, kept = seen
    assert float((kept == 0)[pooled != 0].float().mean()) == pytest.approx(0.75, abs=0.05)
    assert torch.allclose(kept[kept != 0], 4 * pooled[kept != 0])
    seen.clear()
    network.eval()(images)
    assert torch.equal(*seen)


def training_labels(raw: RawData) -> np.ndarray:
    """Labels uint8 [n, 23] of the rows outside fold 0."""
    files = rows.read(SMOKE, raw, lambda message: None)
    return files.labels.toarray()[files.folds != 0]


def test_the_classifier_starts_from_the_share_of_the_images_that_have_a_label(raw):
    wanted = training_labels(raw).mean(0).clip(1e-5, 1 - 1e-5)
    found = built(raw).network.model().heads["labels"].bias.detach().sigmoid().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_an_image_without_a_likely_label_gets_the_most_frequent_ones(raw):
    counts = training_labels(raw).sum(0, dtype=int)
    tuned = {"rule": vars(decision.Rule("threshold", 0.5, 0, 5))}
    (found,) = built(raw).postprocess.apply(torch.zeros(1, 23), tuned)["labels"].numpy()
    assert sorted(counts[found > 0]) == sorted(counts)[-3:]


def test_heads_are_those_with_a_weight_and_stripping_keeps_the_logits(raw, tmp_path):
    both, alone = built(raw).network.model().eval(), built(raw, embedding=0.0, count=0.0).network.model().eval()
    assert set(both.heads) == set(model.HEADS) and set(alone.heads) == {"labels"}
    checkpoint.save(tmp_path / "model.pt", {"model": both.state_dict()})
    model.take_weights(alone, tmp_path / "model.pt")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(alone(images)["labels"], both(images)["labels"])
    with pytest.raises(UserError, match="holds another network"):
        model.take_weights(built(raw, backbone="resnet18", embedding=0.0).network.model(), tmp_path / "model.pt")
    checkpoint.save(tmp_path / "alone.pt", {"model": alone.state_dict()})
    with pytest.raises(UserError, match="first difference: heads.embedding"):
        model.take_weights(both, tmp_path / "alone.pt")


def test_a_last_batch_of_one_image_trains_whatever_the_backbone_normalises(raw):
    for changes in ({"backbone": "resnest14d"}, {"backbone": "skresnet18"}, {"size": (32, 32)}):
        network = built(raw, **changes).network.model().train()
        size = changes.get("size", (64, 64))
        network(torch.zeros(1, 3, *size, dtype=torch.uint8))["labels"].sum().backward()


def test_the_backbone_may_start_from_a_file(raw, tmp_path):
    first = built(raw).network.model()
    checkpoint.save(tmp_path / "model.pt", {"model": first.state_dict()})
    task_from_file = built(raw, encoder_weights=str(tmp_path / "model.pt"), seed=1)
    network = task_from_file.network.model()
    assert not torch.equal(network.backbone.conv1[0].weight, first.backbone.conv1[0].weight)
    task_from_file.network.pretrain(network)
    assert torch.equal(network.backbone.conv1[0].weight, first.backbone.conv1[0].weight)
    said = built(raw).network.pretrain(network)
    assert said == "resnet10t starts from scratch", "the competition forbade published weights"
    assert torch.equal(network.backbone.conv1[0].weight, first.backbone.conv1[0].weight)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "ghostnet_050", "resnet18"])
def test_heads_fit_what_the_backbone_hands_over(raw, backbone):
    """MobileNets and others have a hidden layer between `num_features` and the heads."""
    network = built(raw, backbone=backbone).network.model().train()
    outputs = network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert outputs["labels"].shape == (2, 23) and outputs["embedding"].shape == (2, 16)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s"])
def test_transformers_are_made_for_the_size_of_the_images(raw, backbone):
    built_task = built(raw, backbone=backbone, size=(64, 96))
    checked_before(built_task)
    outputs = built_task.network.model().train()(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert outputs["labels"].shape == (2, 23) and outputs["embedding"].shape == (2, 16)


@pytest.mark.parametrize(
    ("backbone", "size", "usual"), [("inception_v3", (64, 64), "299,299"), ("nest_tiny", (64, 96), "224,224")]
)
def test_a_backbone_that_does_not_take_the_size_is_refused_before_the_run(raw, backbone, size, usual):
    words = f"--backbone {backbone} does not take images of --size {size[0]},{size[1]} .*--size {usual}"
    with pytest.raises(UserError, match=words):
        checked_before(built(raw, backbone=backbone, size=size))


def test_the_count_head_leaves_no_trace_in_the_predictions(raw):
    """Predictions have the same shape with and without the count head, so that such runs can be averaged."""
    for count in (0.0, 0.01):
        built_task = built(raw, count=count)
        outputs = built_task.network.model().eval()(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        assert built_task.postprocess.predict(outputs).shape == (2, 23)


def test_embedding_alone_scores_the_labels(raw):
    built_task = built(raw, classifier=0.0, embedding=1.0, count=0.0)
    network = built_task.network.model().eval()
    outputs = network(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    predictions = built_task.postprocess.predict(outputs)
    assert predictions.shape == (2, 23) and "labels" not in network.train()(
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    )
    embedding = rows.embed(SMOKE, rows.read(SMOKE, raw, lambda message: None))
    for output, found in zip(outputs["embedding"].detach().double(), predictions.detach(), strict=True):
        for label, (vector, length) in enumerate(zip(embedding.vectors, embedding.lengths, strict=True)):
            length = max(np.linalg.norm(vector), length)  # 0 for a label without a vector
            near = float(output @ torch.from_numpy(vector).double()) / float(output.norm()) / length if length else 0.0
            assert float(found[label]) == pytest.approx(1 / (1 + np.exp(-8 * near)), abs=1e-5)
    assert int(built_task.postprocess.apply(predictions, {})["labels"].sum()) == 10


def test_only_the_heads_learn(raw):
    network = built(raw, trains="heads", start_from="before", augment="none").network.model().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))["labels"].square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"heads.labels.weight", "heads.labels.bias"}, "not even running statistics"


def test_starting_from_a_run_that_saw_the_held_out_rows_is_refused(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    config = dataclasses.replace(SMOKE, embedding=0.0, count=0.0)
    built_task = task.build(config, raw, print)
    from common.loading.folds import fingerprint

    provenance = {
        "recipe": "smoke",
        "competition": "inclusive_images",
        "demo": True,
        "data_fingerprint": "",
        "folds_fingerprint": fingerprint(built_task.data.folds, built_task.data.ids),
        "outputs": built_task.network.outputs,
        "data": "first",
    }
    run = runs.open_run("inclusive_images", "first", config, provenance)
    (run.path / "fold-0").mkdir()
    trained = built_task.network.model()
    checkpoint.save(run.path / "fold-0" / "model.pt", {"model": trained.state_dict()})

    def start(**changes):
        later = dataclasses.replace(config, **{"start_from": "first"} | changes)
        found = rows.read(later, raw, lambda message: None)
        network = task.build(later, raw, print).network.model()
        rows.start_from(later, found, network)
        return network

    assert torch.equal(start().heads["labels"].weight, trained.heads["labels"].weight)
    start(rows="tuning", trains="heads")
    with pytest.raises(UserError, match="trained on images that are held out here"):
        start(fold="1")
    with pytest.raises(UserError, match="trained on images that are held out here"):
        start(seed=1)
    other = tmp_path / "other"
    shutil.copytree(raw.path, other, ignore=shutil.ignore_patterns("cache"))
    header, *codes = (other / "classes-trainable.csv").read_text().splitlines()
    (other / "classes-trainable.csv").write_text("\n".join([header, *sorted(codes)]) + "\n")
    with pytest.raises(UserError, match="run first was trained to predict 23 codes .* but the data have 23 codes"):
        later = dataclasses.replace(config, start_from="first")
        rows.start_from(later, rows.read(later, RawData(other, "inclusive_images"), lambda message: None), trained)
    # One run was trained on the tuning images, another one started from it: `tuned` must not start from either.
    for name, changes in (
        ("everything", {"rows": "validated", "fold": "none"}),
        ("after", {"start_from": "everything", "fold": "none"}),
    ):
        run = runs.open_run("inclusive_images", name, dataclasses.replace(config, **changes), provenance)
        (run.path / "fold-none").mkdir()
        checkpoint.save(run.path / "fold-none" / "model.pt", {"model": trained.state_dict()})
        with pytest.raises(UserError, match=f"--start-from {name}: run everything"):
            start(rows="tuning", trains="heads", start_from=name)
    start(fold="none", start_from="after")
    with pytest.raises(UserError, match="no such run"):
        rows.start_from(dataclasses.replace(config, start_from="other"), rows.read(config, raw, print), trained)


def test_weighted_sampling_equals_the_slow_loop(raw):
    built_task = built(raw, sampling="weighted")
    files = rows.read(SMOKE, raw, lambda message: None)
    table = files.labels.toarray()
    counts = table.sum(0, dtype=int)
    of_label = [min(max(np.log(0.5 * counts.sum() / count), 1), 10) if count else 0 for count in counts]
    wanted = [max(of_label[label] for label in np.flatnonzero(row)) for row in table]
    assert np.allclose(orders.by_rarity(files.labels), wanted)
    train = np.flatnonzero(built_task.data.folds != 0)
    order = built_task.data.order(train)
    drawn = np.concatenate([order(0, epoch).index for epoch in range(600)])
    assert set(drawn) <= set(train)
    rates = np.bincount(drawn, minlength=len(table))[train] / len(drawn)
    assert np.corrcoef(rates, np.array(wanted)[train])[0, 1] > 0.7


def test_submission_is_checked(raw, tmp_path):
    built_task = built(raw)
    scores = torch.rand(40, 23, generator=torch.Generator().manual_seed(0))
    form, sample = built_task.submission, built_task.sample
    lines = list(form.rows(built_task.data.test_ids, built_task.postprocess.apply(scores, {})))
    path = submission.write(tmp_path / "a.csv", sample, lines, form.valid, {})
    first = path.read_text().splitlines()
    assert first[0] == "image_id,labels" and len(first) == 41
    assert form.valid([""]) == "no label, which scores 0"
    assert "not in classes-trainable.csv" in form.valid(["/m/0s000 /m/odd"])
    assert "twice" in form.valid(["/m/0s000 /m/0s000"])
    bad = [(image, "/m/odd") for image, _ in lines]
    with pytest.raises(UserError, match="/m/odd"):
        submission.write(tmp_path / "b.csv", sample, bad, form.valid, {})
    assert not (tmp_path / "b.csv").exists()


def test_submissions_of_both_stages_are_compared_with_their_own_sample(raw, tmp_path):
    from common.kaggle import submit as choose

    data = tmp_path / "data"
    shutil.copytree(raw.path, data, ignore=shutil.ignore_patterns("cache"))
    images = sorted(path.stem for path in (data / "train_images").iterdir())[:3]
    (data / "stage_2_sample_submission.csv").write_text("image_id,labels\n" + "".join(f"{i},x\n" for i in images))
    (data / "stage_2_images").mkdir()
    for image in images:
        shutil.copy(data / "train_images" / f"{image}.jpg", data / "stage_2_images")
    for stage, n in (("1", 40), ("2", 3)):
        built_task = built(RawData(data, "inclusive_images"), stage=stage)
        assert len(built_task.data.test) == n
        lines = [f"{image},/m/0s000\n" for image in built_task.data.test_ids]
        (tmp_path / "sent.csv").write_text("image_id,labels\n" + "".join(lines))
        candidate = choose.Candidate(tmp_path / "sent.csv", {})
        assert choose.check(candidate, "inclusive_images", competition.load("inclusive_images"), str(data)) == n


def test_a_trained_network_predicts_either_stage():
    parser = Parser()
    add_prediction_flags(parser, TagConfig)
    assert with_flags(SMOKE, parser.parse_args(["--stage", "2"])).stage == "2"


def test_a_sample_submission_without_its_header_is_refused(raw, tmp_path):
    """Its first image was taken for the header, and so was neither predicted nor missed."""
    shutil.copytree(raw.path, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    sample = tmp_path / "data" / "stage_1_sample_submission.csv"
    sample.write_text(sample.read_text().partition("\n")[2])
    with pytest.raises(UserError, match="line 1: .* is a row, expected the names of the columns first"):
        rows.read(SMOKE, RawData(tmp_path / "data", "inclusive_images"), str)


def test_images_without_a_file_are_left_out_or_refused(raw, tmp_path):
    shutil.copytree(raw.path, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    other = RawData(tmp_path / "data", "inclusive_images")
    said = []
    next((other.path / "train_images").iterdir()).unlink()
    assert len(rows.read(SMOKE, other, said.append).ids) == 239 and "1 of 240 labelled images" in said[-1]
    next((other.path / "stage_1_test_images").iterdir()).unlink()
    removed = 0
    while not removed:
        try:
            rows.read(SMOKE, other, said.append)
            next((other.path / "stage_1_test_images").iterdir()).unlink()
        except UserError as error:
            removed, words = 1, str(error)
    assert "stage_1_sample_submission.csv names" in words and "stage_1_test_images (1 of 40 images)" in words
    shutil.rmtree(other.path / "train_images")
    with pytest.raises(UserError, match="holds none of the 240"):
        rows.read(SMOKE, other, said.append)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"size": (8, 8)}, "--size 8,8"),
        ({"classifier": 0.0, "embedding": 0.0}, "nothing that predicts"),
        ({"embedding": -1.0}, "--embedding -1.0"),
        ({"embedding_dim": 0}, "--embedding-dim 0"),
        ({"trains": "heads"}, "--start-from RUN"),
        ({"rows": "validated", "fold": "2"}, "--fold 2"),
    ],
)
def test_settings_that_make_no_sense(raw, changes, words):
    with pytest.raises(UserError, match=words):
        built(raw, **changes)


def test_unknown_backbone_names_the_nearest(raw):
    with pytest.raises(UserError, match="resnet18"):
        checked_before(built(raw, backbone="resnet81"))


def test_plots(raw, tmp_path):
    files = rows.read(SMOKE, raw, lambda message: None)
    embedding = rows.embed(SMOKE, files)
    run = runs.Run(tmp_path, {"command": "train"})
    held = np.flatnonzero(files.folds == 0)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "oof.npy", rng.random((len(held), 23)).astype(np.float16))
    (tmp_path / "oof_ids.txt").write_text("".join(f"{files.ids[row]}\n" for row in held))
    tuned = {"rule": {"kind": "expected", "level": 1.0}, "score": 0.3}
    result = {"score": 0.3, "monitor": "f2", "metrics": {"f2": 0.31}, "tuned": tuned, "training_seconds": 1.0}
    run.write_result(result)
    page = Report(tmp_path, "test")
    plots.report(run, page, files, embedding, built(raw).postprocess.apply)
    page = page.write().read_text()
    assert (
        page.count("<img") == 3
        and "0.3100 with the rule" in page
        and "0.3000 with rules" in page
        and "boat" not in page.split("<img")[0]
    )
    assert f"{len(held)} of these images" in page
    for name in ("similarity", "map", "curves"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def page_of(task, folder) -> str:
    page = Report(folder, "test")
    task.report(runs.Run(folder, {}), page)
    return page.write().read_text()


def test_runs_without_label_vectors_have_their_plots_too(raw, tmp_path, monkeypatch):
    built_task = built(raw, embedding=0.0)
    assert page_of(built_task, tmp_path).count("<img") == 2

    def alike(*_, **__) -> None:
        raise UserError("all images have the same labels")

    monkeypatch.setattr(rows.LabelEmbedding, "fit", alike)
    assert "<img" not in page_of(built_task, tmp_path), "a run is not lost for want of plots"
    assert "no plots of the label vectors: all images have" in (tmp_path / "log.txt").read_text()


def test_frequency_bands_partition_the_labels_that_occur():
    bands = plots.frequency_bands(np.array([0, 5, 9, 1, 1, 40, 3, 0, 2]))
    assert sorted(np.concatenate(list(bands.values())).tolist()) == [1, 2, 3, 4, 5, 6, 8]
    assert list(bands)[0] == "1: 9 to 40"
