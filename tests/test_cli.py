import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import kdfast
from kdfast import cli

DOCUMENTS = [
    f"Document {i} says that {i} and {i} make {2 * i}, and little else." for i in range(40)
]
SPECIAL = {"eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"}
LENGTH = 32


def make_tokenizer(vocab_size: int = 300, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def gpt2_config(tokenizer: PreTrainedTokenizerFast, width: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LENGTH,
        n_embd=width,
        n_layer=1,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def bert_config(tokenizer: PreTrainedTokenizerFast, width: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    tokenizer = make_tokenizer(**SPECIAL)
    for name, model, config in (
        ("causal", GPT2LMHeadModel, gpt2_config),
        ("masked", BertForMaskedLM, bert_config),
        ("classifier", BertForSequenceClassification, bert_config),
        ("headless", BertModel, bert_config),
    ):
        model(config(tokenizer, 16)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    GPT2LMHeadModel(gpt2_config(tokenizer, 8)).save_pretrained(folder / "student")

    gpt2_config(tokenizer, 8).to_json_file(folder / "causal.json")
    bert_config(tokenizer, 8).save_pretrained(folder / "masked-config")
    narrow = gpt2_config(tokenizer, 8)
    narrow.vocab_size = 200
    narrow.to_json_file(folder / "narrow.json")
    other = make_tokenizer(280, **SPECIAL)
    GPT2LMHeadModel(gpt2_config(other, 8)).save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    unmaskable = make_tokenizer(eos_token="<eos>", pad_token="<pad>")
    BertForMaskedLM(bert_config(unmaskable, 8)).save_pretrained(folder / "unmaskable")
    unmaskable.save_pretrained(folder / "unmaskable")
    GPT2LMHeadModel(gpt2_config(tokenizer, 8)).save_pretrained(folder / "no-tokenizer")
    gpt2_config(tokenizer, 8).save_pretrained(folder / "weightless")
    tokenizer.save_pretrained(folder / "weightless")
    shutil.copytree(folder / "causal", folder / "scrambled")
    (folder / "scrambled" / "tokenizer.json").write_text("{")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "empty").mkdir()

    (folder / "text.txt").write_text("\n\n".join(DOCUMENTS))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    rows = datasets.Dataset.from_dict({"body": DOCUMENTS, "number": list(range(len(DOCUMENTS)))})
    rows.to_csv(folder / "text.csv")
    rows.to_parquet(folder / "text.parquet")
    (folder / "blank.txt").write_text("\n\n \n\n")
    (folder / "short.txt").write_text("too short")
    return folder


@pytest.fixture(autouse=True)
def _dataset_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def distill(assets, tmp_path):
    """Runs `kdfast distill` in this process; keywords replace flags, None drops one."""

    def run(**changes: object) -> int:
        flags = {
            "recipe": "hinton",
            "teacher": assets / "causal",
            "student": assets / "causal.json",
            "dataset": assets / "text.txt",
            "output": tmp_path / "out",
            "max_steps": 2,
            "batch_size": 2,
            "device": "cpu",
            **changes,
        }
        argv = ["distill"]
        for name, value in flags.items():
            if value is None or value is False:
                continue
            argv.append(f"--{name.replace('_', '-')}")
            if value is not True:
                argv += map(str, value if isinstance(value, list) else [value])
        return cli.main(argv)

    return run


def log_history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_causal_student_from_a_config(distill, assets, tmp_path, capfd):
    assert distill(logging_steps=1, eval_fraction=0.2, epochs=1, max_steps=None) == 0
    assert f"student saved to {tmp_path / 'out'}" in capfd.readouterr().out
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert student.config.n_embd == 8
    assert AutoModel.from_pretrained(tmp_path / "out").config.model_type == "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(assets / "causal").get_vocab()
    keys = [entry.keys() for entry in log_history(tmp_path / "out")]
    for terms in ("loss", "soft_loss", "hard_loss"), ("eval_soft_loss", "eval_hard_loss"):
        assert any(set(terms) <= entry for entry in keys)


def test_masked_student_from_a_config_directory(distill, assets, tmp_path):
    assert distill(teacher=assets / "masked", student=assets / "masked-config") == 0
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert student.config.hidden_size == 8


def test_student_checkpoint_is_where_training_starts(distill, assets, tmp_path):
    start = AutoModelForCausalLM.from_pretrained(assets / "student")
    assert distill(student=assets / "student", learning_rate=1e-6) == 0
    end = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in start.state_dict().items():
        torch.testing.assert_close(end.state_dict()[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_student(distill, assets, tmp_path, suffix):
    column = "text" if suffix == "jsonl" else "body"
    for name, changes in (
        ("expected", {}),
        ("result", {"dataset": assets / f"text.{suffix}", "text_column": column}),
    ):
        assert distill(output=tmp_path / name, **changes) == 0
    expected, result = (
        AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("expected", "result")
    )
    assert all(torch.equal(expected[name], result[name]) for name in expected)


def test_several_files_make_one_dataset(distill, assets):
    files = [assets / "text.txt", assets / "text.jsonl"]
    assert distill(dataset=files, gradient_accumulation=2, eval_fraction=0) == 0


def test_resume_goes_on_from_the_last_checkpoint(distill, tmp_path, capfd):
    assert distill(save_steps=1, logging_steps=1) == 0
    assert distill(max_steps=3, save_steps=1, logging_steps=1) == 2
    assert "is not empty: pass --resume to go on from its last checkpoint" in capfd.readouterr().err
    assert distill(max_steps=3, save_steps=1, logging_steps=1, resume=True) == 0
    assert distill(output=tmp_path / "whole", max_steps=3, save_steps=1, logging_steps=1) == 0
    for name in ("out", "whole"):
        steps = [entry["step"] for entry in log_history(tmp_path / name) if "loss" in entry]
        assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "hintn"}, "unknown recipe 'hintn': choose from hinton"),
        ({"recipe": None}, "required: --recipe"),
        ({"teacher": "/no/such/path"}, "--teacher /no/such/path does not exist"),
        ({"teacher": "{assets}/causal.json"}, "causal.json is not a directory"),
        ({"student": "/no/such/path"}, "--student /no/such/path does not exist"),
        ({"dataset": "/no/such.txt"}, "--dataset /no/such.txt does not exist"),
        ({"dataset": "{assets}"}, "is not a file"),
        ({"student": "{assets}/empty"}, "holds no config.json"),
        ({"student": "{assets}/broken"}, "cannot load the student's config from"),
        ({"student": "{assets}/narrow.json"}, "the student has vocab_size=200"),
        ({"student": "{assets}/other"}, "tokenizer (280 tokens) and the teacher's (300) differ"),
        ({"teacher": "{assets}/no-tokenizer"}, "no-tokenizer holds no tokenizer"),
        ({"teacher": "{assets}/classifier"}, "BertForSequenceClassification) is neither a causal"),
        ({"teacher": "{assets}/headless", "task": "masked-lm"}, "has no weights for cls."),
        ({"teacher": "{assets}/weightless"}, "weightless holds no weights"),
        ({"teacher": "{assets}/scrambled"}, "cannot load the teacher's tokenizer from"),
        ({"teacher": "{assets}/unmaskable"}, "masked-lm needs a tokenizer with a mask token"),
        ({"dataset": "{assets}/text.csv"}, "has no column 'text', it has body, number"),
        ({"dataset": "{assets}/text.csv", "text_column": "number"}, "holds int64, not text"),
        ({"dataset": "{assets}/blank.txt"}, "cannot read the dataset: "),
        ({"dataset": "{assets}/causal/model.safetensors"}, "must end in one of .txt, .json"),
        ({"dataset": "{assets}/short.txt"}, "do not fill one block of 32 tokens"),
        ({"output": "{assets}/text.txt"}, "text.txt is not a directory"),
        ({"output": "{assets}/causal"}, "is not empty: pass another directory"),
        ({"resume": True}, "--resume: there is no checkpoint in"),
        ({"block_size": 33}, "--block-size 33 is longer than the 32 tokens"),
        ({"block_size": 1}, "--block-size: must be a whole number at least 2, got '1'"),
        ({"temperature": 0}, "temperature must be finite and above 0, got 0.0"),
        ({"alpha": 1.5}, "alpha must be at least 0 and at most 1, got 1.5"),
        ({"alpha": "half"}, "argument --alpha: invalid float value: 'half'"),
        ({"batch_size": 0}, "--batch-size: must be a whole number at least 1, got '0'"),
        ({"task": "seq2seq"}, "argument --task: invalid choice: 'seq2seq'"),
        ({"bf16": True, "fp16": True}, "not allowed with argument"),
        ({"resolution": 3}, "unrecognized arguments: --resolution 3"),
    ],
)
def test_errors_are_one_line_and_status_2(distill, assets, tmp_path, capfd, changes, message):
    changes = {
        name: value.format(assets=assets) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    assert distill(**changes) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("kdfast: error: ")
    assert message in output.err
    assert not (tmp_path / "out").exists()


def test_no_command_is_an_error(capfd):
    assert cli.main([]) == 2
    assert capfd.readouterr().err.startswith("kdfast: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(distill, capfd):
    assert distill(device="cuda") == 2
    assert "--device cuda: torch sees no CUDA device" in capfd.readouterr().err


def test_env_names_versions_and_backends(capsys):
    assert cli.main(["env"]) == 0
    versions, backends = (
        dict(line.split(maxsplit=1) for line in part.strip().splitlines())
        for part in capsys.readouterr().out.split("backends\n")
    )
    assert versions["kdfast"] == kdfast.__version__
    assert versions["torch"] == torch.__version__
    assert {"python", "triton", "transformers", "device", "threads"} <= versions.keys()
    assert backends.keys() == {"cuda", "triton", "cpp", "torch"}
    for backend, answer in backends.items():
        available = backend in kdfast.available_backends()
        assert answer.startswith("yes" if available else "no: ")


NO_TRAINER = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "datasets", "accelerate", "pyarrow")))
from kdfast.cli import main
assert main(["env"]) == 0
sys.exit(main(sys.argv[1:]))
"""


def test_without_transformers_env_works_and_distill_says_so(tmp_path):
    argv = ["distill", "--recipe=hinton", "--teacher=.", "--student=.", "--dataset=.", "--output=o"]
    result = subprocess.run(
        [sys.executable, "-c", NO_TRAINER, *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "backends" in result.stdout
    assert result.stderr == (
        "kdfast: error: kdfast distill needs transformers: pip install 'kdfast[trainer]'\n"
    )


def test_the_command_in_a_process_of_its_own(assets, tmp_path):
    argv = ["distill", "--recipe=hinton", "--teacher=/no/such/path", f"--output={tmp_path}/out"]
    argv += [f"--student={assets}/causal.json", f"--dataset={assets}/text.txt"]
    result = subprocess.run(
        [sys.executable, "-m", "kdfast.cli", *argv],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == "kdfast: error: --teacher /no/such/path does not exist\n"
