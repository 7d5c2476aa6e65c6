"""The images that a configuration trains and validates on, with their labels, folds and label vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack

from common import run as runs
from common.errors import UserError
from common.loading import folds as folding
from common.raw import RawData
from common.submission import Sample
from common.vision.find import images_of, match_images
from competitions.inclusive_images import labels as reader
from competitions.inclusive_images.config import TagConfig
from competitions.inclusive_images.label_embedding import LabelEmbedding
from competitions.inclusive_images.labels import LabelIndex, LabelTable
from competitions.inclusive_images.model import TagNet, take_weights


@dataclass(frozen=True)
class Rows:
    """The labelled images of a configuration, and the images to predict."""

    index: LabelIndex
    ids: list[str]
    paths: list[Path]
    labels: csr_matrix  # uint8 [n, m]
    folds: np.ndarray  # [n]; rows of -1 are always trained on
    fitted: csr_matrix  # labels that the label vectors and the prior are fitted to, without a held-out fold's
    test_paths: list[Path]
    sample_name: str

    @property
    def counts(self) -> np.ndarray:
        """The number of images in `fitted` that have each label, int64 [m]."""
        return np.asarray(self.fitted.sum(axis=0, dtype=np.int64)).ravel()


def read(config: TagConfig, raw: RawData, announce: Callable[[str], None]) -> Rows:
    """Read the label files and find the images; announces what is left out, raises UserError without a test image."""
    folder = raw.folder()
    index = reader.read_index(raw)
    train = reader.read_train(raw, index)
    announce(f"{reader.TRAIN}: {train.counts}")
    fitted = train.matrix
    parts = []  # labels, paths and folds of the training images, then those of the tuning images
    if config.rows != "tuning":
        own, paths = _with_files(train, folder / "train_images", raw.lenient, announce)
        alone = config.rows == "train"
        folds = folding.kfold(own.ids, config.folds, config.seed) if alone else np.full(len(own), -1)
        parts.append((own, paths, folds))
    if config.rows != "train":
        tuning = reader.read_tuning(raw, index)
        announce(f"{reader.TUNING}: {tuning.counts}")
        own, paths = _with_files(tuning, folder / "stage_1_test_images", raw.lenient, announce)
        whole = config.rows == "validated"
        folds = np.zeros(len(own), int) if whole else folding.kfold(own.ids, config.folds, config.seed)
        parts.append((own, paths, folds))
    if config.rows == "train" and config.fold.isdecimal():
        fitted = fitted[~np.isin(train.ids, own.ids[folds == int(config.fold)])]
    elif config.rows == "train" and config.fold == "all":
        announce(
            "--fold all: every fold shares one set of label vectors, fitted on all training labels, the held-out ones "
            "too; --fold 0 leaves them out"
        )
    sample_name = f"stage_{config.stage}_sample_submission.csv"
    test_folder = f"stage_{config.stage}_{'test_' if config.stage == '1' else ''}images"
    test_paths = images_of(raw, test_folder, Sample.read(raw, sample_name).ids, sample_name)
    return Rows(
        index,
        ids=[str(image) for own, _, _ in parts for image in own.ids],
        paths=[path for _, paths, _ in parts for path in paths],
        labels=vstack([own.matrix for own, _, _ in parts]).tocsr(),
        folds=np.concatenate([folds for _, _, folds in parts]),
        fitted=fitted,
        test_paths=test_paths,
        sample_name=sample_name,
    )


def embed(config: TagConfig, rows: Rows) -> LabelEmbedding:
    """The label vectors of `rows.fitted`."""
    return LabelEmbedding.fit(
        rows.fitted, config.embedding_dim, config.embedding_kind, smoothing=config.smoothing, seed=config.seed
    )


def start_from(config: TagConfig, rows: Rows, model: TagNet) -> None:
    """Load the weights of the run --start-from into `model`.

    Raises UserError if that run has other labels, or if it or a run that it started from was trained on images that
    are held out here.
    """
    folds = folding.fingerprint(rows.folds, rows.ids)
    name = config.start_from
    while name and config.fold != "none":
        before = runs.load("inclusive_images", name)
        its = before.config(type(config))
        same = folds == before.provenance["folds_fingerprint"] and its.fold == config.fold
        without_tuning = its.rows == "train" or (its.rows == "validated" and its.fold == "0")
        if not same and not (config.rows == "tuning" and without_tuning):
            raise UserError(
                f"--start-from {config.start_from}: run {name} (--rows {its.rows} --fold {its.fold}) was "
                f"trained on images that are held out here: repeat its --rows, --fold, --folds and --seed, or use "
                f"--rows tuning after runs that have not seen the tuning images"
            )
        name = its.start_from
    run = runs.load("inclusive_images", config.start_from)
    run.check_outputs(str(rows.index))
    files = sorted(run.path.glob("fold-*/model.pt"))
    if len(files) != 1:
        raise UserError(
            f"--start-from {config.start_from}: that run has {len(files)} finished folds, expected one: finish it, or "
            f"start from a run of a single --fold"
        )
    take_weights(model, files[0])


def _with_files(
    table: LabelTable, folder: Path, lenient: bool, announce: Callable[[str], None]
) -> tuple[LabelTable, list[Path]]:
    """The rows of `table` whose image exists, and the paths of the images.

    Raises UserError if no image exists, except in a `lenient` prediction, because Kaggle has no training images.
    """
    paths = match_images(folder, table.ids)
    kept = np.array([row for row, path in enumerate(paths) if path is not None])
    if not len(kept) and lenient:
        announce(
            f"{folder}: no image is here, so folds and label vectors are made from all {len(table):,} labelled ones"
        )
        return table, [folder / str(name) for name in table.ids]
    if not len(kept):
        raise UserError(
            f"{folder} holds none of the {len(table):,} labelled images: put them there as IMAGEID.jpg, with "
            f"make data COMP=inclusive_images or from Open Images"
        )
    if missing := len(table) - len(kept):
        announce(f"{folder}: {missing:,} of {len(table):,} labelled images have no file and are left out")
    return table.take(kept), [paths[row] for row in kept]
