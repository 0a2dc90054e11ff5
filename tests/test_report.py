import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
from transformers.trainer_callback import TrainerState

from kdfast import files
from kdfast.trainer import DistillationTrainer, ReportedModel, report, write_report

pytestmark = pytest.mark.usefixtures("one_thread")

PNG = b"\x89PNG\r\n\x1a\n"
BATCH = {
    "input_ids": torch.arange(20).reshape(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
    "labels": torch.tensor([0, 1]),
}


def bert(layers: int, **settings: object) -> BertForSequenceClassification:
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "max_position_embeddings": 16,
    }
    return BertForSequenceClassification(BertConfig(**{**sizes, **settings}))


def history(*terms: str, steps: int = 3) -> list[dict[str, float]]:
    """As `trainer.state.log_history` has it."""
    logs = []
    for step in range(1, steps + 1):
        losses = {term: 1 / (step + place) for place, term in enumerate(("loss", *terms))}
        logs.append({**losses, "grad_norm": 1.0, "learning_rate": 1e-4, "epoch": 1, "step": step})
        logs.append(
            {
                **{f"eval_{term}": 2 * loss for term, loss in losses.items()},
                "eval_runtime": 0.1,
                "epoch": 1,
                "step": step,
            }
        )
    logs.append({"train_loss": 0.4, "train_runtime": 1.0, "step": steps})
    return logs


def models(**histories: object) -> dict[str, ReportedModel]:
    return {
        "teacher": ReportedModel(bert(4), 0.9),
        "student_alone": ReportedModel(bert(1), 0.72, history=histories.get("alone")),
        "distilled": ReportedModel(bert(1), 0.81, history=histories.get("distilled")),
    }


def cells(text: str) -> dict[str, list[str]]:
    """The rows of the tables by their first cells."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_what_the_table_says(tmp_path):
    entries = models()
    path = write_report(tmp_path / "new" / "folder", **entries, metric="accuracy", batch=BATCH)
    assert path == tmp_path / "new" / "folder" / "report.md"
    rows = cells(path.read_text())
    weights = {
        name: sum(weight.numel() for weight in entry.model.parameters())
        for name, entry in entries.items()
    }
    assert rows["teacher"][0] == f"{weights['teacher'] / 1e3:.4g} k"
    assert rows["distilled"][0] == f"{weights['distilled'] / 1e3:.4g} k"
    shares = [rows[name][3] for name in ("teacher", "student alone", "distilled")]
    assert shares == ["100.0 %", "80.0 %", "90.0 %"]
    assert [rows[name][2] for name in ("teacher", "student alone", "distilled")] == [
        "0.9",
        "0.72",
        "0.81",
    ]
    assert rows["distilled"][5] == f"{weights['teacher'] / weights['distilled']:.2f}×"
    assert rows["teacher"][5:] == ["1.00×", "1.00×"]
    # Four layers against one: float32 weights and a header of a few kB.
    for name, entry in entries.items():
        size = float(rows[name.replace("_", " ")][1].removesuffix(" MB")) * 1e6
        assert 4 * weights[name] < size < 4 * weights[name] + 20_000, entry


def test_a_lower_score_may_be_the_better_one(tmp_path):
    entries = {
        "teacher": ReportedModel(bert(1), 20.0),
        "distilled": ReportedModel(bert(1), 25.0),
        "student_alone": ReportedModel(bert(1), 40.0),
    }
    text = write_report(
        tmp_path, **entries, metric="perplexity", greater_is_better=False, batch=BATCH
    ).read_text()
    rows = cells(text)
    assert rows["distilled"][3] == "80.0 %"
    assert rows["student alone"][3] == "50.0 %"
    assert "teacher / model in perplexity, of which a lower one is better" in text
    assert "model / teacher" not in text


@pytest.mark.parametrize("scores", [(0.0, 0.5), (-0.2, 0.5), (0.5, -0.1)])
def test_no_share_is_retained_of_scores_that_are_not_positive(tmp_path, scores):
    teacher, distilled = (ReportedModel(bert(1), score) for score in scores)
    path = write_report(
        tmp_path, teacher=teacher, distilled=distilled, metric="Matthews", batch=BATCH
    )
    assert cells(path.read_text())["distilled"][3] == "–"


def test_without_the_student_alone(tmp_path):
    entries = models()
    del entries["student_alone"]
    rows = cells(write_report(tmp_path, **entries, metric="F1", batch=BATCH).read_text())
    assert "student alone" not in rows
    assert "distilled" in rows


def test_claims_are_labelled_as_claims(tmp_path):
    text = write_report(tmp_path, **models(), metric="accuracy", batch=BATCH).read_text()
    rows = cells(text)
    assert rows["TinyBERT with 4 layers, claimed by Jiao et al. 2020"][:3] == [
        "7.5×",
        "9.4×",
        "96 %",
    ]
    assert rows["DistilBERT, claimed by Sanh et al. 2019"][:3] == [
        "1.7× (40 % smaller)",
        "1.6× (60 % faster)",
        "97 %",
    ]
    assert "none of them was measured here" in " ".join(text.split())
    measured = rows["distilled, measured here"]
    assert measured[:2] == rows["distilled"][5:]
    assert measured[2] == rows["distilled"][3]


class Sleeper(nn.Module):
    """Takes a known time, and writes down when it was called."""

    def __init__(self, seconds: float, calls: list[nn.Module]) -> None:
        super().__init__()
        self.calls = calls
        self.weight = nn.Parameter(torch.zeros(10))
        self.seconds = seconds
        self.modes = set()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.calls.append(self)
        self.modes.add((self.training, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return self.weight


def test_passes_take_turns_and_their_medians_are_compared(tmp_path):
    calls = []
    teacher, student = Sleeper(0.03, calls), Sleeper(0.01, calls)
    student.train()
    path = write_report(
        tmp_path,
        teacher=ReportedModel(teacher, 1.0),
        distilled=ReportedModel(student, 1.0),
        metric="accuracy",
        batch=BATCH,
        repeats=5,
    )
    text = path.read_text()
    rows = cells(text)
    assert calls == [teacher, student] * (report.WARM_UP_PASSES + 5)
    assert teacher.modes == student.modes == {(False, False)}
    assert student.training
    medians = {}
    for name in ("teacher", "distilled"):
        median, low, high = map(float, re.findall(r"[\d.]+", rows[name][4]))
        assert low <= median <= high
        medians[name] = median
    # A busy machine sleeps longer, and never shorter.
    assert 30 <= medians["teacher"] < 300
    assert 10 <= medians["distilled"] < 100
    ratio = float(rows["distilled"][6].removesuffix("×"))
    assert ratio == pytest.approx(medians["teacher"] / medians["distilled"], rel=0.02)
    stated = "median of 5 (in brackets the quartiles) over input_ids of 2 × 10, the models in turns"
    assert stated in text
    assert f"torch {torch.__version__}" in text


def test_a_modules_own_modes_come_back(tmp_path):
    entries = models()
    model = entries["distilled"].model.train()
    model.bert.embeddings.eval()
    write_report(tmp_path, **entries, metric="accuracy", batch=BATCH)
    assert model.training
    assert model.bert.encoder.training
    assert not model.bert.embeddings.training


def test_the_weights_of_a_checkpoint_are_weighed_and_nothing_else(tmp_path):
    for name, size in {
        "model-00001-of-00002.safetensors": 3_000_000,
        "model-00002-of-00002.safetensors": 1_500_000,
        "pytorch_model.bin": 7_000_000,
        "optimizer.pt": 9_000_000,
        "projections.safetensors": 2_000_000,
    }.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    entries = models()
    entries["teacher"] = ReportedModel(bert(1), 0.9, checkpoint=tmp_path)
    rows = cells(write_report(tmp_path, **entries, metric="accuracy", batch=BATCH).read_text())
    assert rows["teacher"][1] == "4.5 MB"


def test_models_that_are_not_transformers_are_weighed_too(tmp_path):
    model = nn.Embedding(1000, 100)
    model.forward = lambda input: nn.functional.embedding(input, model.weight)
    entry = ReportedModel(model, 1.0)
    batch = {"input": torch.tensor([[1, 2]])}
    path = write_report(tmp_path, teacher=entry, distilled=entry, metric="F1", batch=batch)
    size = float(cells(path.read_text())["teacher"][1].removesuffix(" MB"))
    assert 0.4 < size < 0.41
    assert "over input of 1 × 2" in path.read_text()


def drawn(monkeypatch) -> list:
    """The figures that reports draw."""
    figures, curves = [], report._curves

    def keep(module, *args):
        class Kept(module.Figure):
            def __init__(self, *args: object, **kwargs: object) -> None:
                super().__init__(*args, **kwargs)
                figures.append(self)

        return curves(type("module", (), {"Figure": Kept}), *args)

    monkeypatch.setattr(report, "_curves", keep)
    return figures


def test_a_panel_per_term_with_training_and_evaluation(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    distilled = history("hard_loss", "soft_loss", "attention_loss")
    entries = models(alone=history(), distilled=distilled)
    path = write_report(tmp_path, **entries, metric="accuracy", batch=BATCH)
    assert "![Losses by training step, one panel per term](report.png)" in path.read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    assert sorted(os.listdir(tmp_path)) == ["report.md", "report.png"]

    (figure,) = figures
    panels = [axis for axis in figure.axes if axis.axison]
    titles = [axis.get_title(loc="left") for axis in panels]
    assert titles == ["loss", "attention_loss", "hard_loss", "soft_loss"]
    # Of both runs; the other terms are the distilled student's alone.
    assert [len(axis.lines) for axis in panels] == [4, 2, 2, 2]
    train, evaluation = panels[3].lines
    assert train.get_xydata().tolist() == [
        [entry["step"], entry["soft_loss"]] for entry in distilled if "soft_loss" in entry
    ]
    assert evaluation.get_xydata().tolist() == [
        [entry["step"], entry["eval_soft_loss"]] for entry in distilled if "eval_soft_loss" in entry
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "student alone, training",
        "student alone, evaluation",
        "distilled, training",
        "distilled, evaluation",
    ]


def test_a_history_from_a_run(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    rows = [{"input_ids": BATCH["input_ids"][i % 2], "labels": i % 2} for i in range(8)]
    trainer = DistillationTrainer(
        bert(1),
        TrainingArguments(
            str(tmp_path / "run"),
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            eval_strategy="epoch",
            num_train_epochs=2,
        ),
        teacher=bert(2),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    run = tmp_path / "run"
    entries = models()
    entries["distilled"] = ReportedModel(trainer.model, 0.8, checkpoint=run, history=run)
    write_report(run, **entries, metric="accuracy", batch=BATCH)
    titles = [axis.get_title(loc="left") for axis in figures[0].axes if axis.axison]
    assert titles == ["loss", "hard_loss", "soft_loss"]
    assert all(len(axis.lines) == 2 for axis in figures[0].axes if axis.axison)
    # The same of the file by its name.
    entries["distilled"] = ReportedModel(trainer.model, 0.8, history=run / "trainer_state.json")
    write_report(tmp_path / "again", **entries, metric="accuracy", batch=BATCH)
    assert len(figures) == 2


def test_numbers_that_are_none_leave_gaps(tmp_path):
    logs = [{"loss": 1.0, "step": 1}, {"loss": math.nan, "step": 2}, {"loss": 0.5, "step": 3}]
    state = TrainerState(log_history=logs)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    write_report(tmp_path, **models(alone=tmp_path), metric="accuracy", batch=BATCH)
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_without_curves_matplotlib_is_not_needed(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch; from torch import nn\n"
        "from kdfast.trainer import ReportedModel, write_report\n"
        "entry = ReportedModel(nn.Linear(2, 2), 1.0)\n"
        "given = dict(teacher=entry, metric='F1', batch={'input': torch.ones(1, 2)})\n"
        f"print(write_report({str(tmp_path)!r}, distilled=entry, **given).name)\n"
        "entry = ReportedModel(nn.Linear(2, 2), 1.0, history=[{'loss': 1.0, 'step': 1}])\n"
        "try:\n"
        f"    write_report({str(tmp_path / 'other')!r}, distilled=entry, **given)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, message = ran.stdout.splitlines()
    assert name == "report.md"
    assert message.startswith("the report's curves need matplotlib: pip install matplotlib")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("failing", ["report.png", "report.md"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    entries = models(distilled=history("soft_loss"))
    write_report(tmp_path, **entries, metric="accuracy", batch=BATCH)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    open_file = open

    def full(path, *args):
        file = open_file(path, *args)
        if Path(path).name.startswith(failing):
            file.write(b"half of it")

            class Full:
                def write(self, _: bytes) -> None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                def __enter__(self):
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

            return Full()
        return file

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_report(tmp_path, **entries, metric="F1", batch=BATCH)
    assert caught.value.filename == str(tmp_path / failing)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["report.md"] == before["report.md"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": 0.9}, TypeError, "teacher must be a ReportedModel, got float"),
        (
            {"distilled": ReportedModel("model", 0.9)},
            TypeError,
            r"distilled\.model must be a module, got str",
        ),
        (
            {"student_alone": ReportedModel(nn.Linear(1, 1), "0.9")},
            TypeError,
            r"student_alone\.score must be a number, got str",
        ),
        (
            {"distilled": ReportedModel(nn.Linear(1, 1), math.nan)},
            ValueError,
            r"distilled\.score must be finite, got nan",
        ),
        ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        (
            {"batch": {"labels": torch.ones(1), "pixels": torch.ones(1)}},
            ValueError,
            r"none of the inputs of the teacher: got \['labels', 'pixels'\]",
        ),
        (
            {"distilled": ReportedModel(bert(1).to("meta"), 0.5)},
            ValueError,
            "on one device to be timed, got teacher on cpu, student alone on cpu, distilled on met",
        ),
        (
            {"distilled": ReportedModel(bert(1), 0.5, checkpoint="nowhere")},
            ValueError,
            r"distilled\.checkpoint: nowhere holds no model\*\.safetensors",
        ),
        (
            {"student_alone": ReportedModel(bert(1), 0.5, history="nowhere")},
            ValueError,
            r"student_alone\.history: nowhere does not exist",
        ),
        (
            {"student_alone": ReportedModel(bert(1), 0.5, history=[1])},
            TypeError,
            r"student_alone\.history must hold what trainer\.state\.log_history holds",
        ),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, changes, error, message):
    arguments = {**models(), "metric": "accuracy", "batch": BATCH, **changes}
    with pytest.raises(error, match=message):
        write_report(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"log": []})])
def test_a_damaged_trainer_state_is_named(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainer_state\.json is no trainer state"):
        write_report(tmp_path, **models(alone=tmp_path), metric="accuracy", batch=BATCH)
