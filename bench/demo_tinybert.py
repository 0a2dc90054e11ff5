"""TinyBERT's stages on real text, in minutes and without a download: the second of `make demo`.

The task is to tell which of 24 modules of Python's library a function is from, by the first lines
of its body. A BERT is pre-trained on the library's functions and fine-tuned on the task. Its
student is then distilled as a user would, by `kdfast distill` and a file with three stages: general
distillation on the text, the teacher's inside on the task, and its predictions. The same student
without a teacher takes as many steps on the same text: masked language modelling where the other
one was distilled in general, labels where it was distilled on the task.

What comes out is a report of all three. The exit status is 1 if distillation did not help.

Two of the papers' ingredients are left out: augmentation (`kdfast augment` asks the masked language
model about every word of every copy), and a corpus beyond the task's own kind of text.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from demo_text import collect_functions, train_wordpiece
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kdfast.trainer import ReportedModel, write_report
from kdfast.trainer.text import load_documents, pack

OUTPUT = Path("runs/demo-tinybert")
SEED = 0

# A stage's folder is called by its recipe.
STAGES = OUTPUT / "student"
GENERAL_STAGE = "tinybert_general"
INTERMEDIATE_STAGE = "tinybert_intermediate"
PREDICTION_STAGE = "tinybert_prediction"

# All of them are in every installation of Python. Packages count as one, with all they hold.
MODULES = (
    "_pydecimal",
    "argparse",
    "asyncio",
    "collections",
    "email",
    "http",
    "imaplib",
    "importlib",
    "inspect",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "optparse",
    "pathlib",
    "pickle",
    "pydoc",
    "tarfile",
    "typing",
    "unittest",
    "urllib",
    "xml",
    "xmlrpc",
    "zipfile",
)
# More would tell too much, and take longer.
LINES = 4
HELD_OUT = 1000

VOCAB = 4096
LENGTH = 48
# With three or four layers, and as many seconds, it learns less.
TEACHER = {"hidden_size": 192, "num_hidden_layers": 2, "intermediate_size": 384}
# With BERT's initial weights of 0.02 a student this narrow learns slowly from labels alone.
STUDENT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "initializer_range": 0.05,
}
HEADS = 4


@dataclass(frozen=True)
class Training:
    """How long and how fast."""

    steps: int
    batch_size: int
    learning_rate: float


PRETRAINING = Training(200, 32, 1e-3)
FINE_TUNING = Training(1000, 32, 1e-3)
GENERAL = Training(100, 32, 3e-3)
INTERMEDIATE = Training(400, 16, 3e-3)
PREDICTION = Training(400, 16, 2e-3)
# The student without a teacher takes the steps of both stages on the task.
LABELS_ALONE = Training(INTERMEDIATE.steps + PREDICTION.steps, 16, 2e-3)


def main() -> int:
    started = time.perf_counter()
    # `kdfast distill` writes into no directory that holds something.
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)

    files = write_files()
    texts = [json.loads(line)["text"] for line in files["library"].open(encoding="utf-8")]
    tokenizer = train_wordpiece(texts, VOCAB, LENGTH)
    tokenizer.save_pretrained(OUTPUT / "tokenizer")
    blocks = pack(load_documents([files["library"]]), tokenizer, LENGTH, masked=True)
    train, held_out = (read_task(files[name], tokenizer) for name in ("train", "held_out"))
    print(
        f"{len(blocks) * LENGTH:,} tokens of text; {len(train):,} functions of "
        f"{len(MODULES)} modules to learn from, {len(held_out):,} held out"
    )

    general_teacher = pretrain("teacher-general", TEACHER, PRETRAINING, blocks, tokenizer)
    teacher = fine_tune("teacher", general_teacher, FINE_TUNING, train, held_out, tokenizer)
    distilled = distil(files, general_teacher, teacher)
    general_student = pretrain("alone-general", STUDENT, GENERAL, blocks, tokenizer)
    alone = fine_tune("alone", general_student, LABELS_ALONE, train, held_out, tokenizer)

    models = {"teacher": teacher, "student_alone": alone, "distilled": distilled}
    report, scores = compare(models, histories(alone), held_out, tokenizer)
    print("\n" + report.read_text(encoding="utf-8"))
    print(budgets() + "\n")
    print(f"{report}\n{time.perf_counter() - started:.0f} s in all")
    if scores["distilled"] <= scores["student_alone"]:
        print(
            "demo: the distilled student is not better on held-out functions: accuracy "
            f"{scores['distilled']:.3f} against {scores['student_alone']:.3f} alone",
            file=sys.stderr,
        )
        return 1
    return 0


def write_files() -> dict[str, Path]:
    """The library's functions as text, and the task's, of which no held-out one is in the text."""
    functions = collect_functions()
    random.Random(SEED).shuffle(functions)
    # Functions of other bodies may begin alike.
    of_task = {
        "\n".join(function.body[:LINES]): function
        for function in functions
        if function.package in MODULES
    }
    rows = [{"text": text, "module": function.package} for text, function in of_task.items()]
    held_out = {id(function) for function in [*of_task.values()][:HELD_OUT]}
    beginnings = {row["text"] for row in rows[:HELD_OUT]}
    library = [
        {"text": "\n".join(function.body)}
        for function in functions
        if id(function) not in held_out and "\n".join(function.body[:LINES]) not in beginnings
    ]
    files = {}
    for name, content in (
        ("library", library),
        ("train", rows[HELD_OUT:]),
        ("held_out", rows[:HELD_OUT]),
    ):
        files[name] = OUTPUT / f"{name}.jsonl"
        with files[name].open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)
    return files


def read_task(path: Path, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    def encode(row: dict[str, str]) -> dict[str, object]:
        return {**tokenizer(row["text"], truncation=True), "labels": MODULES.index(row["module"])}

    return Dataset.from_json(str(path)).map(encode, remove_columns=["text", "module"])


def config_of(size: dict[str, float]) -> BertConfig:
    return BertConfig(
        **size,
        vocab_size=VOCAB,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        id2label=dict(enumerate(MODULES)),
        label2id={name: number for number, name in enumerate(MODULES)},
    )


def pretrain(
    name: str,
    size: dict[str, float],
    training: Training,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A fresh model, by masked language modelling."""
    set_seed(SEED)
    model = BertForMaskedLM(config_of(size))
    collator = DataCollatorForLanguageModeling(tokenizer)
    return fit(name, model, training, tokenizer, collator, train_dataset=blocks)


def fine_tune(
    name: str,
    pretrained: Path,
    training: Training,
    train: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A pre-trained model, by the labels of the task."""
    set_seed(SEED)
    model = BertForSequenceClassification.from_pretrained(pretrained)
    collator = DataCollatorWithPadding(tokenizer)
    return fit(
        name, model, training, tokenizer, collator, train_dataset=train, eval_dataset=held_out
    )


def fit(
    name: str,
    model: PreTrainedModel,
    training: Training,
    tokenizer: PreTrainedTokenizerFast,
    collator: object,
    **datasets: Dataset,
) -> Path:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{name}: {parameters:,} parameters, {training.steps} steps", flush=True)
    arguments = TrainingArguments(
        output_dir=str(OUTPUT / name),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.steps // 10,
        weight_decay=0.01,
        seed=SEED,
        logging_steps=training.steps // 10,
        save_strategy="no",
        log_level="error",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        processing_class=tokenizer,
        **datasets,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return OUTPUT / name


def distil(files: dict[str, Path], general_teacher: Path, teacher: Path) -> Path:
    """Three stages behind each other, by the command that a user has."""

    def stage(recipe: str, training: Training, **settings: object) -> dict[str, object]:
        return {
            "recipe": recipe,
            "max_steps": training.steps,
            "batch_size": training.batch_size,
            "learning_rate": training.learning_rate,
            "logging_steps": training.steps // 10,
            **settings,
        }

    task = {
        "teacher": str(teacher),
        "dataset": [str(files["train"])],
        "eval_dataset": [str(files["held_out"])],
        "label_column": "module",
    }
    chain = {
        "student": {
            "model_type": "bert",
            **STUDENT,
            "num_attention_heads": HEADS,
            "vocab_size": VOCAB,
            "max_position_embeddings": LENGTH,
        },
        "output": str(STAGES),
        "block_size": LENGTH,
        "seed": SEED,
        "device": "cpu",
        "training": {
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": [],
        },
        "stages": [
            stage(
                GENERAL_STAGE,
                GENERAL,
                teacher=str(general_teacher),
                dataset=[str(files["library"])],
            ),
            stage(INTERMEDIATE_STAGE, INTERMEDIATE, **task),
            stage(PREDICTION_STAGE, PREDICTION, **task),
        ],
    }
    path = OUTPUT / "tinybert.yaml"
    path.write_text(yaml.safe_dump(chain, sort_keys=False), encoding="utf-8")
    command = ("-m", "kdfast.cli", "distill", str(path))
    print(f"\nkdfast distill {path}", flush=True)
    subprocess.run([sys.executable, *command], check=True)
    return STAGES / PREDICTION_STAGE


def histories(alone: Path) -> dict[str, list[dict[str, float]]]:
    """What both students were trained by, stage behind stage.

    The loss of the one without a teacher is cross entropy on the task, the other one's hard loss.
    """
    distilled, before = [], 0
    for stage, training in (
        (GENERAL_STAGE, GENERAL),
        (INTERMEDIATE_STAGE, INTERMEDIATE),
        (PREDICTION_STAGE, PREDICTION),
    ):
        for entry in log_of(STAGES / stage):
            terms = {name: value for name, value in entry.items() if name.endswith("_loss")}
            distilled.append({**terms, "step": before + entry["step"]})
        before += training.steps
    labelled = [
        {"hard_loss": entry["loss"], "step": GENERAL.steps + entry["step"]}
        for entry in log_of(alone)
        if "loss" in entry
    ]
    return {"distilled": distilled, "student_alone": labelled}


def budgets() -> str:
    """What each of the three was trained by: steps × batch."""

    def of(*trainings: tuple[str, Training]) -> str:
        return ", ".join(f"{t.steps}×{t.batch_size} {what}" for what, t in trainings)

    return "\n".join(
        (
            "steps × batch",
            f"  teacher         {of(('masked words', PRETRAINING), ('labels', FINE_TUNING))}",
            f"  student alone   {of(('masked words', GENERAL), ('labels', LABELS_ALONE))}",
            "  distilled       "
            + of(
                ("the teacher's inside on text", GENERAL),
                ("on the task", INTERMEDIATE),
                ("its predictions", PREDICTION),
            ),
            "A step towards the teacher runs the teacher too.",
        )
    )


def log_of(directory: Path) -> list[dict[str, float]]:
    return json.loads((directory / "trainer_state.json").read_text())["log_history"]


@torch.inference_mode()
def accuracy(model: PreTrainedModel, loader: DataLoader) -> float:
    model.eval()
    right = 0
    for batch in loader:
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return right / len(loader.dataset)


def compare(
    paths: dict[str, Path],
    curves: dict[str, list[dict[str, float]]],
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[Path, dict[str, float]]:
    """The report of all three models, and their accuracy on the held-out functions."""
    loader = DataLoader(held_out, batch_size=50, collate_fn=DataCollatorWithPadding(tokenizer))
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(path)
        for name, path in paths.items()
    }
    scores = {name: accuracy(model, loader) for name, model in models.items()}
    report = write_report(
        OUTPUT,
        **{
            name: ReportedModel(model, scores[name], paths[name], curves.get(name))
            for name, model in models.items()
        },
        metric="accuracy",
        batch=next(iter(loader)),
        title=f"TinyBERT in three stages: which of {len(MODULES)} modules a function is from",
    )
    return report, scores


if __name__ == "__main__":
    sys.exit(main())
