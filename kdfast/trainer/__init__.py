"""Distillation on `transformers.Trainer`: objectives, recipes and the trainer that runs them."""

from kdfast.trainer.augmentation import BiLSTMAugmentation, TinyBERTAugmentation, WordVectors
from kdfast.trainer.ensemble import Ensemble
from kdfast.trainer.features import AttentionMSE, EmbeddingMSE, HiddenCosine, HiddenMSE
from kdfast.trainer.initialise import initialise_from_teacher, spread_layers
from kdfast.trainer.lstm import BiLSTMConfig, BiLSTMForSequenceClassification, token_vectors
from kdfast.trainer.objective import HardLabels, LogitMSE, Logits, Objective, TruncatedLogits
from kdfast.trainer.recipes import (
    RECIPES,
    Recipe,
    bilstm,
    distilbert,
    hinton,
    tinybert_general,
    tinybert_intermediate,
    tinybert_prediction,
    truncated,
)
from kdfast.trainer.report import ReportedModel, write_report
from kdfast.trainer.trainer import DistillationTrainer
from kdfast.trainer.vocabulary import check_same_vocabulary

__all__ = [
    "RECIPES",
    "AttentionMSE",
    "BiLSTMAugmentation",
    "BiLSTMConfig",
    "BiLSTMForSequenceClassification",
    "DistillationTrainer",
    "EmbeddingMSE",
    "Ensemble",
    "HardLabels",
    "HiddenCosine",
    "HiddenMSE",
    "LogitMSE",
    "Logits",
    "Objective",
    "Recipe",
    "ReportedModel",
    "TinyBERTAugmentation",
    "TruncatedLogits",
    "WordVectors",
    "bilstm",
    "check_same_vocabulary",
    "distilbert",
    "hinton",
    "initialise_from_teacher",
    "spread_layers",
    "tinybert_general",
    "tinybert_intermediate",
    "tinybert_prediction",
    "token_vectors",
    "truncated",
    "write_report",
]
