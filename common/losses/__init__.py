"""Losses that declare how their value over a batch is computed; see common.losses.protocol."""

from common.losses.classification import BCE, CosineProximity, CrossEntropy, Focal, PositivesVersusNegatives, SoftFBeta
from common.losses.combine import Heads, Weighted
from common.losses.protocol import batch_value, kind, whole_batch
from common.losses.regression import MAE, MSE, RMSE, SMAPE, ClippedMAE, LogSMAPE
from common.losses.segmentation import BCEDice, Dice, Jaccard, LovaszHinge, LovaszSoftmax, Tversky

__all__ = [
    "BCE",
    "MAE",
    "MSE",
    "RMSE",
    "SMAPE",
    "BCEDice",
    "ClippedMAE",
    "CosineProximity",
    "CrossEntropy",
    "Dice",
    "Focal",
    "Heads",
    "Jaccard",
    "LogSMAPE",
    "LovaszHinge",
    "LovaszSoftmax",
    "PositivesVersusNegatives",
    "SoftFBeta",
    "Tversky",
    "Weighted",
    "kind",
    "whole_batch",
    "batch_value",
]
