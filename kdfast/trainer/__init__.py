"""Distillation on `transformers.Trainer`: objectives, recipes and the trainer that runs them."""

from kdfast.trainer.objective import HardLabels, Logits, Objective
from kdfast.trainer.recipes import RECIPES, Recipe, hinton
from kdfast.trainer.trainer import DistillationTrainer
from kdfast.trainer.vocabulary import check_same_vocabulary

__all__ = [
    "RECIPES",
    "DistillationTrainer",
    "HardLabels",
    "Logits",
    "Objective",
    "Recipe",
    "check_same_vocabulary",
    "hinton",
]
