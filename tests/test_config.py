"""Configuration files of `kdfast distill`, and stages behind each other."""

import argparse
import errno
import gc
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import DOCUMENTS, SPECIAL, bert_config, flags_of, make_tokenizer
from test_cli_tasks import make_tokenizer as make_berts_tokenizer
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)
from transformers.utils import logging

from kdfast import cli, files
from kdfast.cli import config, run
from kdfast.cli import distill as distill_command
from kdfast.cli.options import Parser
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
    # Classifiers of `classes`, of which `swapped` has them in another order.
    classes = {**config.to_dict(), "id2label": {0: "even", 1: "odd"}}
    for name, changes in {
        "classes": {},
        "swapped": {"id2label": {0: "odd", 1: "even"}},
        "three": {"id2label": {0: "a", 1: "b", 2: "c"}},
        "number": {"id2label": {0: "number"}},
        "few": {"vocab_size": 20},
        "typed": {},
        "foreign": {},
    }.items():
        settings = {**classes, **changes, "label2id": None}
        settings["label2id"] = {label: i for i, label in settings["id2label"].items()}
        BertForSequenceClassification(BertConfig(**settings)).save_pretrained(folder / name)
        kinds = {"foreign": make_tokenizer(280, **SPECIAL), "typed": make_berts_tokenizer()}
        kinds.get(name, tokenizer).save_pretrained(folder / name)
    rows = [
        {"text": text, "pair": text[:12], "label": ("even", "odd")[i % 2], "size": i / 10}
        for i, text in enumerate(DOCUMENTS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
def classified(settings, assets) -> dict[str, object]:
    return {
        **settings,
        "teacher": str(assets / "classes"),
        "dataset": [str(assets / "rows.jsonl")],
        "label_column": "label",
    }


@pytest.fixture
def distill(tmp_path):
    """Runs `kdfast distill` with a file of settings and flags."""

    def run(settings: dict[str, object] | str, *flags: str) -> int:
        path = tmp_path / "config.yaml"
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        return cli.main(["distill", str(path), *flags])

    return run


def merged(tmp_path: Path, text: str, *flags: str) -> list[argparse.Namespace]:
    """The settings of a file and a command line, of which nothing is read."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    parser = Parser()
    distill_command.add_command(commands := parser.add_subparsers())
    assert commands.choices
    flags_alone = Parser(add_help=False)
    distill_command._add_flags(flags_alone)
    given = parser.parse_args(["distill", str(path), *flags])
    return config.stages_of(given, flags_alone)


def resolved(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "kdfast.yaml").read_text())


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


@pytest.mark.parametrize(
    "changes",
    [
        # Defaults of kdfast, and what differs from them and is transformers' own.
        {"recipe": "tinybert_general", "temperature": None},
        {"learning_rate": 5e-5, "training": {"eval_strategy": "no"}},
    ],
)
def test_a_run_whose_settings_are_transformers_defaults_repeats(
    settings, distill, tmp_path, changes
):
    assert distill({**settings, **changes}) == 0
    assert resolved(tmp_path / "out")["training"]["learning_rate"] == 5e-5
    again = [str(tmp_path / "out" / "kdfast.yaml"), "--output", str(tmp_path / "again")]
    assert cli.main(["distill", *again]) == 0
    assert_same(tmp_path / "out", tmp_path / "again")
    one, two = resolved(tmp_path / "out"), resolved(tmp_path / "again")
    assert {**one, "output": None} == {**two, "output": None}
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert ("eval_loss" in results) == ("recipe" in changes)


def test_resumed_behind_its_last_step_a_run_trains_no_more(settings, distill, tmp_path):
    # A constant rate: one step more would show.
    constant = {**settings, "training": {"lr_scheduler_type": "constant", "learning_rate": 0.1}}
    constant |= {"report": True, "student_alone": True}
    assert distill(constant) == 0
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out, whole)
    for name in ("results.json", "model.safetensors", "alone/model.safetensors"):
        (out / name).unlink()
    for folder in (out, out / "alone"):
        # Of a run that was killed between its last checkpoint and its last evaluation.
        state = folder / "checkpoint-3" / "trainer_state.json"
        assert "eval_loss" not in state.read_text()
    assert distill(constant, "--resume") == 0
    assert_same(whole, out)
    assert_same(whole / "alone", out / "alone")
    before, after = (json.loads((f / "results.json").read_text()) for f in (whole, out))
    # Nothing was trained, and the mean loss of no step is not 0.
    assert before["train_loss"] > 0
    assert not any(name.startswith("train_") for name in after)
    # Of other masks.
    assert after["eval_soft_loss"] == pytest.approx(before["eval_soft_loss"], rel=0.3)


def test_a_checkpoint_goes_on_with_what_it_was_made_with(settings, distill, tmp_path, capsys):
    changes = {"optimizer": {"name": "Adadelta", "rho": 0.5}}
    assert distill(settings) == 0
    before = weights(tmp_path / "out")
    assert distill({**settings, **changes, "temperature": 8.0, "seed": 1}, "--resume") == 2
    error = capsys.readouterr().err
    assert "was made with another objective, seed, optimizer: pass another directory" in error
    assert all(torch.equal(v, before[n]) for n, v in weights(tmp_path / "out").items())
    assert distill({**settings, "learning_rate": 0.5, "max_steps": 4}, "--resume") == 0


def test_a_student_with_followers_is_not_replaced(settings, distill, tmp_path, capsys):
    chain = {**settings, "max_steps": 1, "stages": [{"name": n} for n in ("a", "b", "c")]}
    assert distill(chain) == 0
    chain["stages"][0] = {"name": "a", "max_steps": 2}
    for follower in ("b", "c"):
        assert distill(chain, "--resume") == 2
        folder = tmp_path / "out" / follower
        assert f"stage a: {folder} began with the student in" in capsys.readouterr().err
        shutil.rmtree(folder)
    assert distill(chain, "--resume") == 0


def test_a_folder_that_no_run_made_is_left_alone(settings, distill, tmp_path, capsys):
    foreign = tmp_path / "out" / "a" / "model.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    assert distill({**settings, "stages": [{"name": "a"}]}, "--resume") == 2
    assert "is not empty and holds no kdfast.yaml" in capsys.readouterr().err
    assert foreign.read_text() == "mine"


def test_layers_of_the_teacher_are_for_fresh_students(settings, assets, distill, tmp_path, capsys):
    config = bert_config(make_tokenizer(**SPECIAL), 16)
    BertForMaskedLM(config).save_pretrained(tmp_path / "trained")
    trained = {**settings, "student": str(tmp_path / "trained"), "initialise": True}
    assert distill(trained) == 2
    assert "--initialise is for a fresh student" in capsys.readouterr().err

    stages = [{"name": "a", "learning_rate": 0.05}, {"name": "b", "learning_rate": 1e-12}]
    student = {**config.to_diff_dict(), "model_type": "bert"}
    assert distill({**settings, "student": student, "initialise": True, "stages": stages}) == 0
    name = "bert.embeddings.word_embeddings.weight"
    teacher, first, second = (
        weights(folder)[name]
        for folder in (assets / "teacher", tmp_path / "out" / "a", tmp_path / "out" / "b")
    )
    assert not torch.allclose(first, teacher, atol=1e-3)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert resolved(tmp_path / "out" / "a")["initialise"] is True
    assert "initialise" not in resolved(tmp_path / "out" / "b")


def test_a_student_that_is_spelt_out_reads_what_its_teacher_reads(settings, distill, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = {"model_type": "bert", "intermediate_size": 8, **sizes}
    assert distill({**settings, "student": student}) == 0
    made = BertConfig.from_pretrained(tmp_path / "out")
    teacher = BertConfig.from_pretrained(settings["teacher"])
    assert made.vocab_size == teacher.vocab_size == 300
    assert made.max_position_embeddings == teacher.max_position_embeddings
    assert made.hidden_size == 8


@pytest.mark.parametrize(("teacher", "pairs"), [("classes", False), ("typed", True)])
def test_the_recipes_own_lstm_reads_pairs(classified, assets, distill, tmp_path, teacher, pairs):
    chosen = {"recipe": "bilstm", "temperature": None, "student": None, "text_pair_column": "pair"}
    chosen |= {"teacher": str(assets / teacher), "max_steps": 1}
    assert distill({**classified, **chosen}) == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["pairs"], made["embeddings"], made["vocab_size"]) == (pairs, "trained", 300)


def test_an_lstm_begins_with_word_vectors(classified, distill, tmp_path, capsys):
    path = tmp_path / "vectors.txt"
    path.write_text("says 1 2 3\nmake -4 0 0.5\nzebra 0 0 1\n")
    chosen = {"recipe": "bilstm", "temperature": None, "student": None, "vectors": str(path)}
    chosen |= {"max_steps": 2, "report": True, "student_alone": True}
    assert distill({**classified, **chosen}) == 0
    assert f"2 of 300 tokens begin with a vector of {path}" in capsys.readouterr().err
    tokenizer = make_tokenizer(**SPECIAL)
    rows = tokenizer.convert_tokens_to_ids(["\u0120says", "\u0120make"])
    vectors = torch.tensor([[1.0, 2, 3], [-4, 0, 0.5]])
    out = tmp_path / "out"
    for folder in (out, out / "alone"):
        made = json.loads((folder / "config.json").read_text())
        assert (made["embeddings"], made["embedding_size"]) == ("multichannel", 3)
        found = weights(folder)
        assert torch.equal(found["frozen_embeddings.weight"][rows], vectors)
        assert not torch.equal(found["embeddings.weight"][rows], vectors)
    assert cli.main(["distill", str(out / "kdfast.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert_same(out, tmp_path / "again")
    # Another file makes another student.
    path.rename(tmp_path / "other.txt")
    chosen["vectors"] = str(tmp_path / "other.txt")
    assert distill({**classified, **chosen}, "--resume") == 2
    assert "was made with another vectors" in capsys.readouterr().err


def test_word_vectors_that_do_not_fit(classified, distill, tmp_path, capsys):
    path = tmp_path / "vectors.txt"
    path.write_text("says 1 2 3\n")
    lstm = {"model_type": "kdfast-bilstm"}
    for changes, message in (
        ({"vectors": "nope.txt"}, "--vectors nope.txt does not exist"),
        ({"student": classified["student"]}, "is for a BiLSTM, and the student is a bert"),
        ({"student": {**lstm, "embedding_size": 4}}, "vectors of 3 numbers, and the student an"),
        ({"student": classified["teacher"]}, "--vectors is for a fresh student"),
    ):
        chosen = {"recipe": "bilstm", "temperature": None, "student": lstm, "vectors": str(path)}
        assert distill({**classified, **chosen, **changes}) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    path.write_text("says 1 2 3\nmake 1 2\n")
    assert distill({**classified, **chosen}) == 2
    assert "vectors.txt, line 2: expected a word and 3 numbers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_data_set_to_evaluate_on_needs_no_fraction(classified, assets, distill, tmp_path):
    rows = str(assets / "rows.jsonl")
    assert distill({**classified, "eval_dataset": [rows], "eval_fraction": 0, "max_steps": 1}) == 0
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "results.json").read_text())


def test_alone_accumulated_batches_are_one_large_batch(classified, distill, tmp_path):
    for name, batches in {"one": 1, "four": 4}.items():
        sizes = {"batch_size": 8 // batches, "gradient_accumulation": batches}
        no_dropout = BertConfig.from_pretrained(classified["student"])
        no_dropout.hidden_dropout_prob = no_dropout.attention_probs_dropout_prob = 0.0
        no_dropout.save_pretrained(tmp_path / "student")
        student = {"student": str(tmp_path / "student"), "output": str(tmp_path / name)}
        alone = {"report": True, "student_alone": True, "logging_steps": 1}
        assert distill({**classified, **sizes, **student, **alone}) == 0
    one, four = (
        [
            (entry["loss"], entry["grad_norm"])
            for entry in json.loads((tmp_path / name / "alone" / "trainer_state.json").read_text())[
                "log_history"
            ]
            if "loss" in entry
        ]
        for name in ("one", "four")
    )
    assert len(one) == 3
    for expected, found in zip(one, four, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_an_optimiser_whose_package_is_missing_is_one_line(
    settings, distill, tmp_path, monkeypatch, capsys
):
    def missing(*_: object) -> None:
        raise ImportError("You need to install `galore_torch`")

    with monkeypatch.context() as patch:
        patch.setattr(run.DistillationTrainer, "get_optimizer_cls_and_kwargs", missing)
        assert distill(settings) == 2
    assert "kdfast: error: You need to install `galore_torch`\n" in capsys.readouterr().err
    # So that the next attempt finds an output that is empty.
    assert not (tmp_path / "out" / "kdfast.yaml").exists()
    assert distill(settings) == 0


def test_a_disk_that_is_full_at_the_end_is_one_line(settings, distill, monkeypatch, capsys):
    write = files.write

    def full(path: Path, content: bytes) -> None:
        if path.name == "results.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(files, "write", full)
    assert distill({**settings, "max_steps": 1}) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_student_alone_has_had_no_teacher(settings, distill, capsys):
    chain = staged(settings)
    first, second = chain["stages"]
    second = {**second, "report": True, "student_alone": True}
    assert distill({**chain, "stages": [first, second]}) == 2
    assert "with a student that has had a teacher" in capsys.readouterr().err


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
    again = tmp_path / "again"
    written = tmp_path / "out" / "second" / "kdfast.yaml"
    assert cli.main(["distill", str(written), "--output", str(again)]) == 0
    assert_same(tmp_path / "out" / "second", again)
    found = load_file(again / "projections.safetensors")
    assert all(torch.equal(found[name], value) for name, value in second.items())

    # Of another shape they stay where they are.
    stages[1] = {"name": "second", "objective": [{"HiddenMSE": {"projection": "each"}}]}
    assert distill({**rest, "stages": stages, "output": str(tmp_path / "other")}) == 0


@pytest.mark.parametrize("kind", ["masked", "classified"])
def test_from_any_checkpoint_the_student_is_the_same(settings, classified, distill, tmp_path, kind):
    """In an epoch, and at the end of one that is evaluated afterwards."""
    chosen = {"masked": settings, "classified": classified}[kind]
    chosen = {**chosen, "batch_size": 8, "max_steps": 5, "training": {"save_steps": 1}}
    chosen |= {"learning_rate": 1e-2, "gradient_accumulation": 1 if kind == "masked" else 2}
    assert distill(chosen) == 0
    out, again = tmp_path / "out", tmp_path / "again"
    state = json.loads((out / "trainer_state.json").read_text())
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_loss" in entry]
    assert 1 < evaluated[0] < 5
    for step in (1, evaluated[0]):
        again.mkdir()
        shutil.copy(out / "kdfast.yaml", again)
        shutil.copytree(out / f"checkpoint-{step}", again / f"checkpoint-{step}")
        assert distill({**chosen, "output": str(again)}, "--resume") == 0
        assert_same(out, again)
        shutil.rmtree(again)


def test_stages_survive_being_killed(settings, assets, tmp_path):
    """The students of a chain that was killed and resumed are those of one that was not."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(staged({**settings, "max_steps": 20})))
    whole = [*command(tmp_path), str(config), "--output", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, capture_output=True)
    for moment in ("general/checkpoint-8", "prediction/checkpoint-2"):
        process = subprocess.Popen(
            [*command(tmp_path), str(config), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (tmp_path / "out" / moment).exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        stage = tmp_path / "out" / moment
        assert stage.exists()
        assert not (stage.parent / "results.json").exists()
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
        ({"training": {"seed": 7}}, "training.seed has a flag: pass --seed"),
        ({"training": {"resume_from_checkpoint": "x"}}, "has a flag: pass --resume"),
        (
            {"training": {"warmup_steps": "many"}},
            "training.warmup_steps must be a number, got 'many'",
        ),
        (
            {"training": {"max_grad_norm": "abc"}},
            "training.max_grad_norm must be a number, got 'abc'",
        ),
        (
            {"training": {"save_total_limit": 1.5}},
            "save_total_limit must be a whole number or null",
        ),
        (
            {"training": {"torch_compile": "no"}},
            "training.torch_compile must be true or false, got",
        ),
        (
            {"training": {"lr_scheduler_type": 3}},
            "training.lr_scheduler_type must be a word, got 3",
        ),
        (
            {"training": {"lr_scheduler_kwargs": [1]}},
            "lr_scheduler_kwargs must be a word or a mapp",
        ),
        ({"training": {"fsdp": True, "eval_delay": "x"}}, "training.eval_delay must be a number"),
        ({"training": {"max_steps": True}}, "training.max_steps must be a whole number, got True"),
        ({"optimizer": {"rho": 0.9}}, "optimizer needs the name of one of torch.optim"),
        ({"optimizer": {"name": "SGD", "lr": 0.5}}, "optimizer: lr is --learning-rate"),
        ({"optimizer": {"name": "Adadelta", "rhoo": 1}}, "unexpected keyword argument 'rhoo'"),
        ({"label_column": "label"}, "--label-column says nothing to a language model"),
        ({"text_pair_column": "pair"}, "--text-pair-column says nothing to a language model"),
        ({"eval_dataset": ["nope.txt"]}, "--eval-dataset nope.txt does not exist"),
        ({"student": {"model_type": "brt"}}, "there is no model_type 'brt': did you mean"),
        ({"student": {"model_type": "bert", "layerz": 1}}, "a bert has no setting 'layerz'"),
        ({"student": {"model_type": "bert", "vocab_size": 9}}, "the student has vocab_size=9"),
        ({"stages": [{"name": "../escaped"}]}, "must be no path"),
        ({"stages": [{"name": "a", "stages": [{}]}]}, "a stage has no stages of its own"),
        (
            {"stages": [{"name": "a", "output": "x"}, {"name": "b", "output": "./x"}]},
            "stage b: x is the output of stage a too",
        ),
        ({"settings": 3, "stages": [{"settings": {"alpha": 0.3}}]}, "settings must be a mapping"),
        (
            {"recipe": None, "temperature": None, "objective": [{"Logits": 3}]},
            "objective: Logits must have a mapping of settings, got 3",
        ),
        ({"teacher_weights": [1, 2]}, "--teacher-weights: there is one teacher"),
        ({"offload": "disk"}, "--offload disk: there is one teacher"),
        ({"offload": "gpu"}, "--offload: invalid choice: 'gpu'"),
        ({"recipe": "truncated", "k": 301}, "k must be at most the teacher's 300 columns, got 301"),
        ({"text_column": False}, "text_column must be a value, got False"),
        ({"report": "on it"}, "report must be true or false, got 'on it'"),
        # Before the first stage begins.
        (
            {"stages": [{"name": "a"}, {"name": "b", "training": {"warmup": 3}}]},
            "stage b: training.warmup is no argument",
        ),
        ({"stages": [{"name": "a"}, {"name": "b", "block_size": 33}]}, "stage b: --block-size 33"),
        (
            {"stages": [{"name": "a"}, {"name": "b", "report": True, "eval_fraction": 0}]},
            "stage b: --report needs held-out data",
        ),
        (
            {"stages": [{"name": "a"}, {"name": "b", "optimizer": {"name": "SGD", "beta": 1}}]},
            "stage b: optimizer: SGD",
        ),
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
        ("temperature: 2\nalpha: 1\ntemperature: 7", "'temperature' is given twice"),
    ],
)
def test_files_that_are_no_configuration(distill, capsys, text, message):
    assert distill(text) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["distill", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
    assert distill("recipe: hinton", "--set", "training") == 2
    assert "--set training: must be" in capsys.readouterr().err
    assert distill("recipe: hinton", "--set", "training.warmup_steps=[1") == 2
    assert "'[1' is no YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ["classes", "swapped"]}, "has the classes odd, even and the first teacher"),
        ({"teacher": ["classes", "three"]}, "three has 3 classes and the first teacher 2"),
        ({"teacher": ["classes", "few"]}, "few has vocab_size=20"),
        ({"teacher": ["classes", "foreign"]}, "foreign has other tokens than the first teacher"),
        ({"teacher": ["classes", "classes"], "teacher_weights": [1]}, "2 teachers, and 1 weights"),
        ({"teacher": ["number"], "label_column": "size"}, "which is no distribution"),
        ({"recipe": "truncated", "k": 3}, "k must be at most the teacher's 2 columns, got 3"),
        (
            {"recipe": None, "objective": [{"Logits": {"tokens": "all"}}]},
            "of sequence-classification there is no distribution per token",
        ),
        ({"recipe": "tinybert_intermediate", "teacher": ["classes", "classes"]}, "one --teacher"),
        ({"stages": [{"name": "a"}, {"label_column": "x"}]}, "stage stage-2: "),
    ],
)
def test_classifiers_that_do_not_fit(
    classified, assets, distill, tmp_path, capsys, changes, message
):
    changes = {"temperature": None, **changes}
    if "teacher" in changes:
        changes["teacher"] = [str(assets / name) for name in changes["teacher"]]
    if "stages" in changes:
        changes["stages"][1]["name"] = "stage-2"
    assert distill({**classified, **changes}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"objective": [{"HiddenMSE": {"layers": {0: 5}}}]},
            "HiddenMSE: layers names layer 5 of the teacher, which has 2 (0 to 1)",
        ),
        (
            {"objective": [{"AttentionMSE": {"layers": {1: 0}}}]},
            "AttentionMSE: layers names layer 1 of the student, which has 1 (0 to 0)",
        ),
        (
            {"objective": [{"HiddenMSE": {"projection": "none"}}]},
            "projection must not be 'none' between a student of width 8 and a teacher of width 16",
        ),
        ({"objective": [{"HiddenCosine": {}}]}, "must have one width, got (8, 16)"),
        (
            {"objective": [{"AttentionMSE": {"head_map": [[1, 0, 0]]}}]},
            "head_map must be [2, 2], the models' heads, got [1, 3]",
        ),
        (
            {"recipe": "tinybert_intermediate", "training": {"torch_compile": True}},
            "training.torch_compile hides the student's inside",
        ),
        (
            # Of whose attention nothing can be seen.
            {
                "recipe": "tinybert_general",
                "student": {
                    "model_type": "mpnet",
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "hidden_size": 8,
                },
            },
            "MPNetForMaskedLM does not route its attention",
        ),
        ({"recipe": "hinton", "text_column": "body"}, "rows.jsonl has no column 'body'"),
    ],
)
def test_a_later_stages_inside_is_looked_at_before_the_first_trains(
    settings, assets, distill, tmp_path, capsys, stage, message
):
    rest = {k: v for k, v in settings.items() if k not in ("recipe", "temperature")}
    if "text_column" in stage:
        stage = {**stage, "dataset": [str(assets / "rows.jsonl")]}
    stages = [{"name": "first", "recipe": "hinton"}, {"name": "later", **stage}]
    assert distill({**rest, "stages": stages}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("kdfast: error: stage later: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_later_stages_cache_is_looked_at_before_the_first_trains(
    settings, distill, tmp_path, capsys
):
    flags = {"k": 4, "output": str(tmp_path / "kept"), "eval_fraction": 0.2, "device": "cpu"}
    files = {"teacher": settings["teacher"], "dataset": settings["dataset"]}
    assert cli.main(["cache", "build", *flags_of({**files, **flags})]) == 0
    later = {"name": "later", "teacher_cache": flags["output"], "recipe": "truncated", "k": 5}
    rest = {k: v for k, v in settings.items() if k not in ("recipe", "temperature", "teacher")}
    first = {"name": "first", "recipe": "hinton", "teacher": settings["teacher"]}
    capsys.readouterr()
    assert distill({**rest, "stages": [first, later]}) == 2
    assert "stage later: k must be at most the teacher cache's, 4, got 5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_log_file_has_lines_and_a_terminal_bars(settings, distill, tmp_path, monkeypatch, capsys):
    assert distill({**staged(settings), "logging_steps": 1}) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert re.match(
        r"general, step 1 of 3, epoch [\d.]+: loss [\d.e-]+, .*attention_loss ", lines[0]
    )
    evaluated = [line for line in lines if "eval_soft_loss" in line]
    assert [line.partition(",")[0] for line in evaluated] == ["prediction"]
    assert lines[-1] == f"student saved to {tmp_path / 'out' / 'prediction'}"
    assert not set("\r{%") & set(out + err)

    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    watched = {**settings, "output": str(tmp_path / "watched")}
    assert distill(watched) == 0
    out, err = capsys.readouterr()
    assert "100%|" in err
    monkeypatch.undo()
    # Where a run was watched from is no setting of it.
    assert distill(watched, "--resume") == 0
    assert "is finished" in capsys.readouterr().out


def test_a_report_needs_matplotlib_before_work(settings, distill, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert distill({**settings, "report": True}) == 2
    expected = "--report needs matplotlib: pip install 'kdfast[report]'"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_flag_takes_the_place_of_its_rivals(tmp_path):
    text = "objective: [{Logits: {}}]\nteacher: [a, b]\nteacher_weights: [1, 2]\nfp16: true\n"
    (run,) = merged(tmp_path, text, "--recipe", "hinton", "--teacher-cache", "cache", "--bf16")
    assert (run.recipe, run.objective) == ("hinton", None)
    assert (run.teacher, run.teacher_weights, run.teacher_cache) == (None, None, Path("cache"))
    assert (run.bf16, run.fp16) == (True, None)
    (run,) = merged(tmp_path, "bf16: false\nfp16: true")
    assert (run.bf16, run.fp16) == (False, True)
    (run,) = merged(tmp_path, "teacher_cache: cache", "--teacher", "c")
    assert (run.teacher, run.teacher_cache) == ([Path("c")], None)
    # And of a stage those that stand for all.
    stages = f"{text}output: out\nstages: [{{name: a, teacher: c}}, {{name: b, recipe: hinton}}]"
    one, two = merged(tmp_path, stages)
    assert (one.teacher, one.teacher_weights, one.recipe) == ([Path("c")], None, None)
    assert (two.teacher, two.recipe, two.objective) == ([Path("a"), Path("b")], "hinton", None)


def test_what_a_file_switches_on_can_be_switched_off(tmp_path):
    text = "report: true\nstudent_alone: true\ninitialise: [0, 1]\nresume: true\nbf16: true\n"
    (run,) = merged(tmp_path, text)
    assert (run.report, run.initialise, run.bf16) == (True, [0, 1], True)
    off = ("--no-report", "--no-student-alone", "--no-initialise", "--no-resume", "--no-bf16")
    (run,) = merged(tmp_path, text, *off)
    switches = (run.report, run.student_alone, run.initialise, run.resume, run.bf16)
    assert switches == (False,) * 5
    (run,) = merged(tmp_path, "initialise: false\nreport: no\ntext_column: -x")
    assert (run.initialise, run.report, run.text_column) == (False, False, "-x")
    stages = "training:\noutput: out\nstages: [{name: a, training: {warmup_steps: 1}}]"
    (run,) = merged(tmp_path, stages)
    assert run.training == {"warmup_steps": 1}


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


@pytest.fixture
def teachers(settings, tmp_path) -> list[str]:
    """Two of them, of which the second is another."""
    shutil.copytree(settings["teacher"], tmp_path / "second")
    config = BertConfig.from_pretrained(settings["teacher"])
    BertForMaskedLM(config).save_pretrained(tmp_path / "second")
    return [settings["teacher"], str(tmp_path / "second")]


def test_several_teachers_take_turns(settings, distill, teachers, tmp_path, monkeypatch, capsys):
    alive, before = weakref.WeakSet(), []
    load = run.load_model

    def counted(owner: str, *args: object) -> torch.nn.Module:
        if owner == "teacher":
            # Without a collection of garbage: a teacher goes when its turn is over.
            before.append(len(alive))
            # A bar for each would be one in every step.
            assert logging.is_progress_bar_enabled() == (offload != "disk")
        model = load(owner, *args)
        if owner == "teacher":
            alive.add(model)
        return model

    monkeypatch.setattr(run, "load_model", counted)
    # As on a terminal.
    monkeypatch.setattr(distill_command, "silence_libraries", logging.enable_progress_bar)
    ensemble = {**settings, "teacher": teachers, "teacher_weights": [1, 3]}
    for offload in (None, "cpu", "disk"):
        before.clear()
        output = {"offload": offload, "output": str(tmp_path / str(offload))}
        assert distill({**ensemble, **output}) == 0
        assert resolved(tmp_path / str(offload)).get("offload") == offload
        if offload != "disk":
            assert before == [0, 1]
            del output
            gc.collect()
            assert not alive
            continue
        # Twice to look at them, and in every step and evaluation.
        assert len(before) > 2 * 3
        assert set(before) == {0}
        assert not alive
        assert_same(tmp_path / "None", tmp_path / "disk")
    assert_same(tmp_path / "None", tmp_path / "cpu")
    # Where teachers wait makes no other student.
    again = {**ensemble, "output": str(tmp_path / "disk")}
    assert distill(again, "--resume") == 0
    assert "is finished" in capsys.readouterr().out


def test_several_teachers(settings, distill, assets, tmp_path):
    shutil.copytree(assets / "teacher", tmp_path / "second")
    teachers = [settings["teacher"], str(tmp_path / "second")]
    assert distill({**settings, "output": str(tmp_path / "one")}) == 0
    assert distill({**settings, "teacher": teachers, "teacher_weights": [1, 3]}) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "out")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
