"""What a run leaves about itself: its results, and a report that compares its models."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from kdfast.cli.errors import reporting
from kdfast.cli.progress import print_lines
from kdfast.trainer.checkpoints import WholeCheckpoints, last_checkpoint
from kdfast.trainer.report import ReportedModel, write_report

if TYPE_CHECKING:
    from kdfast.cli.tasks import Prepared
    from kdfast.trainer import DistillationTrainer

# Below a run's output, the student that had no teacher.
ALONE = "alone"


def results_of(trainer: DistillationTrainer, *, resumed: bool) -> dict[str, float]:
    """The last that training and evaluation said of themselves.

    Args:
        resumed: whether training went on from a checkpoint. Its mean loss, time and speed are then
            left out: transformers takes them of what came after, as if that had been all.
    """
    results: dict[str, float] = {}
    for entry in trainer.state.log_history:
        results.update(entry)
    return {
        name: value
        for name, value in results.items()
        if name not in ("step", "epoch") and not (resumed and name.startswith("train_"))
    }


def train_alone(
    student: PreTrainedModel, trainer: DistillationTrainer, prepared: Prepared
) -> PreTrainedModel:
    """The same student, data and arguments, towards the labels and no teacher."""
    arguments = copy.copy(trainer.args)
    arguments.output_dir = str(Path(trainer.args.output_dir, ALONE))
    alone = _plain(student, arguments, prepared, trainer.optimizer_cls_and_kwargs)
    print_lines(alone, ALONE)
    alone.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir))
    alone.save_model()
    alone.save_state()
    return alone.model


def _plain(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    prepared: Prepared,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, object]] | None = None,
) -> WholeCheckpoints:
    with reporting():
        trainer = WholeCheckpoints(
            model=model,
            args=arguments,
            train_dataset=prepared.train,
            eval_dataset=prepared.held_out,
            data_collator=prepared.collator,
            compute_metrics=prepared.compute_metrics,
            callbacks=[*prepared.callbacks],
            optimizer_cls_and_kwargs=optimizer,
        )
    # Some models take a divisor for their loss and leave it unused, and Trainer leaves it to them.
    # So the loss is each batch's own mean, and of batches and processes the mean of theirs.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def _score(model: PreTrainedModel, arguments: TrainingArguments, prepared: Prepared) -> float:
    """The task's metric on the held-out part."""
    evaluation = _plain(model, arguments, prepared)
    # The report says it.
    evaluation.remove_callback(PrinterCallback)
    metrics = evaluation.evaluate()
    if prepared.metric == "perplexity":
        return math.exp(metrics["eval_loss"])
    return metrics[f"eval_{prepared.metric}"]


def write_comparison(
    trainer: DistillationTrainer, prepared: Prepared, alone: PreTrainedModel | None
) -> dict[str, float]:
    """`report.md` and `report.png` beside the student; the scores in them."""
    output = Path(trainer.args.output_dir)
    arguments = copy.copy(trainer.args)
    arguments.report_to = []
    models = {"teacher": trainer.teacher, "distilled": trainer.model}
    histories = {"distilled": trainer.state.log_history}
    if alone is not None:
        models["student_alone"] = alone
        histories["student_alone"] = output / ALONE
    scores = {name: _score(model, arguments, prepared) for name, model in models.items()}
    if trainer.is_world_process_zero():
        loader = DataLoader(
            prepared.held_out.select_columns(
                [n for n in prepared.held_out.column_names if n in trainer._signature_columns]
            ),
            batch_size=arguments.per_device_eval_batch_size,
            collate_fn=prepared.collator,
        )
        with reporting("cannot write the report"), torch.no_grad():
            write_report(
                output,
                **{
                    name: ReportedModel(model, scores[name], history=histories.get(name))
                    for name, model in models.items()
                },
                metric=prepared.metric,
                batch=next(iter(loader)),
                greater_is_better=prepared.greater_is_better,
            )
    return {f"{name}_{prepared.metric}": score for name, score in scores.items()}
