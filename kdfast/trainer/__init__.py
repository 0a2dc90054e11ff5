"""Distillation on `transformers.Trainer`: objectives, recipes and the trainer that runs them."""

from kdfast.trainer.objective import HardLabels, Logits, Objective, TruncatedLogits
from kdfast.trainer.recipes import RECIPES, Recipe, hinton, truncated
from kdfast.trainer.trainer import DistillationTrainer
from kdfast.trainer.vocabulary import check_same_vocabulary

__all__ = [
    "RECIPES",
    "DistillationTrainer",
    "HardLabels",
    "Logits",
    "Objective",
    "Recipe",
    "TruncatedLogits",
    "check_same_vocabulary",
    "hinton",
    "truncated",
]
