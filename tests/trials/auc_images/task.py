import albumentations as A
import numpy as np

from common import tables
from common.loading.folds import stratified
from common.losses import BCE
from common.metrics import roc_auc
from common.submission import Sample
from common.task import Data, Network, Postprocess, Task
from common.vision.backbones import Classifier
from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from common.vision.weights import start_backbone


def build(config, raw, log):
    table = tables.read(raw, "train.csv", {"id": str, "label": tables.number(0, 1)}, id="id")
    targets, ids = table[["label"]].to_numpy(np.float32), table["id"].tolist()
    train = ImageStore.of(raw, "train", ids, "train.csv", size=config.size)
    test = ImageStore.of(raw, "test", Sample.read(raw).ids, "sample_submission.csv", size=config.size)
    folds = stratified(ids, targets[:, 0], config.folds, config.seed)
    augmented = ImageDataset(train, targets, transform=A.HorizontalFlip())
    network = Network(
        lambda: Classifier(config.backbone, config.size, 1),
        loss=BCE(),
        pretrain=lambda model: start_backbone(model.backbone, config.backbone, config.encoder_weights),
    )
    data = Data(augmented, ids, folds, ImageDataset(test), valid=ImageDataset(train, targets))
    return Task(data, (roc_auc(),), network, postprocess=Postprocess(predict=lambda outputs: outputs.sigmoid()))
