"""Tiny models, batches for them, and a trainer of both."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, TrainingArguments, default_data_collator

from kdfast.trainer import DistillationTrainer, Objective

VOCAB = 41
LENGTH = 10


def bert(width: int, layers: int, cls: type = BertForMaskedLM, **settings: object) -> nn.Module:
    return cls(
        BertConfig(
            **{
                "vocab_size": VOCAB,
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "max_position_embeddings": LENGTH,
                # Far from 0, so that student and teacher differ in every score.
                "initializer_range": 0.3,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                **settings,
            }
        )
    )


def padded_rows(count: int, *, labels: bool = False) -> list[dict[str, Tensor]]:
    """Sequences of which row i has i tokens of padding behind it."""
    rows = []
    for i in range(count):
        tokens, mask = torch.randint(1, VOCAB, (LENGTH,)), torch.ones(LENGTH, dtype=torch.int64)
        padding = i % (LENGTH // 2)
        mask[LENGTH - padding :] = 0
        rows.append({"input_ids": tokens, "attention_mask": mask})
        if labels:
            rows[-1]["labels"] = tokens.masked_fill(mask == 0, -100)
    return rows


def trainer_of(
    folder: Path,
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    objective: Objective | Sequence[object],
    rows: Sequence[dict[str, Tensor]] = (),
    options: dict[str, object] | None = None,
    **arguments: object,
) -> DistillationTrainer:
    """A trainer on the CPU that keeps quiet; `arguments` are TrainingArguments'."""
    return DistillationTrainer(
        model=student,
        args=TrainingArguments(
            **{
                "output_dir": str(folder / "out"),
                "use_cpu": True,
                "disable_tqdm": True,
                "log_level": "error",
                "save_strategy": "no",
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                **arguments,
            }
        ),
        teacher=teacher,
        objective=objective if isinstance(objective, Objective) else Objective(objective),
        train_dataset=list(rows) or None,
        **{"data_collator": default_data_collator, **(options or {})},
    )


def gradients(trainer: DistillationTrainer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one training step's loss, by the names of the student's parameters."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return gradients_of(trainer.model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Relative to each gradient, or to 1e-2 of the largest: some are nothing but rounding."""
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-2 * largest)
        assert error < tolerance, (name, error)
