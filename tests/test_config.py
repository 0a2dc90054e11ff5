"""Configuration files of `kdfast distill`, and stages behind each other."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import DOCUMENTS, SPECIAL, bert_config, flags_of, make_tokenizer
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from kdfast import cli
from kdfast.trainer import (
    AttentionMSE,
    EmbeddingMSE,
    HardLabels,
    HiddenCosine,
    HiddenMSE,
    LogitMSE,
    Logits,
    Objective,
    TruncatedLogits,
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    tokenizer = make_tokenizer(**SPECIAL)
    config = BertConfig(**{**bert_config(tokenizer, 16).to_dict(), "num_hidden_layers": 2})
    BertForMaskedLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    bert_config(tokenizer, 8).save_pretrained(folder / "student")
    (folder / "text.txt").write_text("\n\n".join(DOCUMENTS))
    return folder


@pytest.fixture(autouse=True)
def _dataset_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def settings(assets, tmp_path) -> dict[str, object]:
    return {
        "recipe": "hinton",
        "temperature": 3.0,
        "teacher": str(assets / "teacher"),
        "student": str(assets / "student"),
        "dataset": [str(assets / "text.txt")],
        "output": str(tmp_path / "out"),
        "max_steps": 3,
        "batch_size": 2,
        "seed": 0,
        "device": "cpu",
        "eval_fraction": 0.2,
    }


@pytest.fixture
def distill(tmp_path):
    """Runs `kdfast distill` with a file of settings and flags."""

    def run(settings: dict[str, object] | str, *flags: str) -> int:
        path = tmp_path / "config.yaml"
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        return cli.main(["distill", str(path), *flags])

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


STAGES = {
    "stages": [
        {
            "name": "general",
            "recipe": "tinybert_general",
            "training": {"save_steps": 2, "learning_rate": 1e-3},
        },
        {
            "name": "prediction",
            "recipe": "distilbert",
            "settings": {"alpha_cos": 0.0},
            "temperature": None,
            "training": {"save_steps": 2, "gradient_accumulation_steps": 1},
        },
    ]
}


def staged(settings: dict[str, object]) -> dict[str, object]:
    """Two stages, of which the second's student is as wide as its teacher."""
    rest = {k: v for k, v in settings.items() if k not in ("recipe", "temperature")}
    student = {**bert_config(make_tokenizer(**SPECIAL), 16).to_diff_dict(), "model_type": "bert"}
    return {**rest, "student": student, **STAGES}


@pytest.mark.parametrize(
    "objective",
    [
        [Logits(0.9, 4.0, "jsd", 0.3), HardLabels(0.1)],
        [TruncatedLogits(k=7, tail="support")],
        [AttentionMSE(layers={0: 2, -1: -1}, head_map=[[1.0, 0.0]]), LogitMSE(2.0)],
        [HiddenMSE(projection="shared"), EmbeddingMSE(mask=False), HiddenCosine(layers={-1: -1})],
    ],
)
def test_an_objective_is_plain_data_and_back(objective):
    objective = Objective(objective)
    text = yaml.safe_dump(objective.to_config())
    assert Objective.from_config(yaml.safe_load(text)) == objective


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"Logits": {}}, TypeError, "objective must be a list of terms, got dict"),
        (["Logits"], TypeError, "must hold terms as"),
        ([{"Logit": {}}], ValueError, "there is no term 'Logit': choose from Logits"),
        ([{"Logits": {"temperatur": 2}}], ValueError, "Logits has no setting 'temperatur'"),
        ([{"Logits": {"temperature": 0}}], ValueError, "temperature must be"),
    ],
)
def test_objectives_that_are_none(config, error, message):
    with pytest.raises(error, match=message):
        Objective.from_config(config)


def test_a_file_and_flags_say_the_same(settings, distill, tmp_path):
    assert distill(settings) == 0
    flags = {**settings, "output": str(tmp_path / "flags")}
    assert cli.main(["distill", *flags_of(flags)]) == 0
    assert_same(tmp_path / "out", tmp_path / "flags")


def test_flags_win_over_the_file(settings, distill, tmp_path):
    assert distill(settings, "--max-steps", "1", "--set", "training.weight_decay=0.5") == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    resolved = yaml.safe_load((tmp_path / "out" / "kdfast.yaml").read_text())
    assert resolved["training"]["max_steps"] == 1
    assert resolved["training"]["weight_decay"] == 0.5
    assert resolved["objective"][0]["Logits"]["temperature"] == 3.0


def test_what_yaml_has_other_words_for(settings, distill, tmp_path):
    written = yaml.safe_dump({**settings, "max_steps": 1})
    text = f"{written}training: {{weight_decay: 1e-2, save_strategy: no, logging_strategy: off}}\n"
    assert distill(text, "--set", "training.adam_epsilon=1e-7") == 0
    training = yaml.safe_load((tmp_path / "out" / "kdfast.yaml").read_text())["training"]
    assert training["weight_decay"] == 0.01
    assert training["adam_epsilon"] == 1e-7
    assert training["save_strategy"] == training["logging_strategy"] == "no"


def test_a_run_repeats_from_what_it_wrote(settings, distill, tmp_path):
    changes = {
        "training": {"save_steps": 2, "warmup_steps": 1},
        "optimizer": {"name": "Adadelta", "rho": 0.5},
    }
    assert distill({**settings, **changes}) == 0
    written = tmp_path / "out" / "kdfast.yaml"
    assert (tmp_path / "out" / "checkpoint-2" / "kdfast.yaml").read_text() == written.read_text()
    again = ["distill", str(written), "--output", str(tmp_path / "again")]
    assert cli.main(again) == 0
    assert_same(tmp_path / "out", tmp_path / "again")
    texts = [
        yaml.safe_load((tmp_path / name / "kdfast.yaml").read_text()) for name in ("out", "again")
    ]
    assert texts[0].pop("output") != texts[1].pop("output")
    assert texts[0] == texts[1]
    assert {"kdfast", "torch", "transformers"} <= texts[0]["versions"].keys()


def test_a_finished_run_is_not_done_again(settings, distill, tmp_path, capsys):
    assert distill(settings) == 0
    results = tmp_path / "out" / "results.json"
    assert json.loads(results.read_text())["eval_loss"] > 0
    before = results.stat().st_mtime_ns
    assert distill(settings, "--resume") == 0
    assert "is finished" in capsys.readouterr().out
    assert results.stat().st_mtime_ns == before
    assert distill({**settings, "max_steps": 4}, "--resume") == 0
    assert results.stat().st_mtime_ns != before


def test_stages_hand_their_student_on(settings, distill, tmp_path):
    assert distill(staged(settings)) == 0
    general, prediction = (tmp_path / "out" / name for name in ("general", "prediction"))
    resolved = yaml.safe_load((prediction / "kdfast.yaml").read_text())
    assert resolved["student"] == str(general)
    assert json.loads((general / "results.json").read_text())["eval_attention_loss"] > 0
    assert json.loads((prediction / "results.json").read_text())["eval_soft_loss"] > 0
    assert AutoModelForMaskedLM.from_pretrained(prediction).config.hidden_size == 16


def test_projections_go_on_into_the_next_stage(settings, distill, tmp_path):
    stages = [
        {"name": "first", "recipe": "tinybert_general"},
        {"name": "second", "recipe": "tinybert_intermediate", "training": {"learning_rate": 1e-9}},
    ]
    rest = {k: v for k, v in settings.items() if k not in ("recipe", "temperature")}
    assert distill({**rest, "stages": stages}) == 0
    first, second = (
        load_file(tmp_path / "out" / name / "projections.safetensors")
        for name in ("first", "second")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("moments", [(0.3,), (0.6, 0.6)])
def test_stages_survive_being_killed(settings, assets, tmp_path, moments):
    """The students of a chain that was killed and resumed are those of one that was not."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(staged({**settings, "max_steps": 8})))
    start = time.monotonic()
    whole = [*command(tmp_path), str(config), "--output", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, capture_output=True)
    length = time.monotonic() - start
    for share in moments:
        process = subprocess.Popen(
            [*command(tmp_path), str(config), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(length * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command(tmp_path), str(config), "--resume"], check=True, capture_output=True)
    for stage in ("general", "prediction"):
        assert_same(tmp_path / "whole" / stage, tmp_path / "out" / stage)


def command(tmp_path: Path) -> list[str]:
    return [
        "env",
        f"HF_DATASETS_CACHE={tmp_path / 'cache'}",
        "OMP_NUM_THREADS=1",
        sys.executable,
        "-m",
        "kdfast.cli",
        "distill",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tempreature": 2}, "there is no setting 'tempreature': did you mean temperature?"),
        ({"epochs": "many"}, "--epochs: must be a number above 0, got 'many'"),
        ({"training": [1]}, "training must be a mapping"),
        ({"training": {"epochs": 1}}, "training.epochs is no argument of TrainingArguments"),
        ({"settings": {"alpha_mlm": 1}}, "settings.alpha_mlm is no setting of the recipe hinton"),
        ({"optimizer": {"name": "Adam2"}}, "optimizer: torch.optim has no 'Adam2'"),
        ({"stages": {}}, "stages must be a list of mappings"),
        ({"objective": [{"Logits": {}}]}, "recipe and objective exclude each other"),
        (
            {"recipe": None, "temperature": None, "objective": [{"Logit": {}}]},
            "there is no term 'Logit'",
        ),
        ({"teacher": None}, "required: --teacher or --teacher-cache"),
        ({"student": {"hidden_size": 8}}, "student must have a model_type"),
        ({"student": None}, "required: --student: the recipe prescribes none"),
        ({"student_alone": True}, "--student-alone is for --report"),
        ({"stages": [{"recipe": "hinton"}, {"recipe": "hinton"}]}, "two stages are called"),
        ({"dataset": {"file": 1}}, "dataset must be a value, got a mapping"),
        ({"initialise": [7]}, "cannot initialise the student"),
    ],
)
def test_errors_are_one_line_and_status_2(settings, distill, tmp_path, capsys, changes, message):
    assert distill({**settings, **changes}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: [", "config.yaml is no YAML"),
        ("- recipe", "must hold a mapping"),
    ],
)
def test_files_that_are_no_configuration(distill, capsys, text, message):
    assert distill(text) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["distill", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
    assert distill("recipe: hinton", "--set", "training") == 2
    assert "--set training: must be" in capsys.readouterr().err


def test_a_report_compares_three_models(settings, distill, tmp_path):
    pytest.importorskip("matplotlib")
    assert distill({**settings, "report": True, "student_alone": True}) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| teacher" in text
    assert "| student alone" in text
    assert "perplexity" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("teacher", "distilled", "student_alone"):
        assert results[f"{name}_perplexity"] > 1
    assert (tmp_path / "out" / "alone" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "report.png").is_file()


def test_several_teachers(settings, distill, assets, tmp_path):
    shutil.copytree(assets / "teacher", tmp_path / "second")
    teachers = [settings["teacher"], str(tmp_path / "second")]
    assert distill({**settings, "output": str(tmp_path / "one")}) == 0
    assert distill({**settings, "teacher": teachers, "teacher_weights": [1, 3]}) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "out")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
