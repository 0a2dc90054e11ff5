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
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerState,
)

import kdfast
from kdfast import cli
from kdfast.teacher_cache import TeacherCache
from kdfast.trainer.text import EpochMasks, mask_once

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


def flags_of(settings: dict[str, object]) -> list[str]:
    """None and False drop a flag."""
    argv = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name.replace('_', '-')}")
        if value is not True:
            argv += map(str, value if isinstance(value, list) else [value])
    return argv


@pytest.fixture
def distill(assets, tmp_path):
    """Runs `kdfast distill` in this process; keywords replace flags, None drops one."""

    def run(**changes: object) -> int:
        settings = {
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
        if "teacher_cache" in changes:
            settings["teacher"] = changes.get("teacher")
        return cli.main(["distill", *flags_of(settings)])

    return run


@pytest.fixture
def build(assets, tmp_path):
    """Runs `kdfast cache build` in this process, as `distill` does."""

    def run(**changes: object) -> int:
        settings = {
            "teacher": assets / "causal",
            "dataset": assets / "text.txt",
            "output": tmp_path / "teacher",
            "k": 12,
            "device": "cpu",
            **changes,
        }
        return cli.main(["cache", "build", *flags_of(settings)])

    return run


@pytest.fixture(scope="module")
def caches(assets, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    for name, settings in {
        "causal": {"k": 300, "temperature": 2.0, "eval_fraction": 0.2},
        "masked": {"k": 12, "teacher": assets / "masked", "mlm_probability": 0.3},
        "sampled": {"sampled": True, "draws": 6, "bits": 8},
    }.items():
        settings = {
            "teacher": assets / "causal",
            "dataset": assets / "text.txt",
            "output": folder / name,
            "device": "cpu",
            **settings,
        }
        assert cli.main(["cache", "build", *flags_of(settings)]) == 0
    return folder


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


def sees_the_next_token(model: PreTrainedModel) -> bool:
    one, other = (torch.tensor([[5, 6, 7, last]]) for last in (8, 9))
    with torch.no_grad():
        return not torch.equal(*(model.eval()(ids).logits[:, :-1] for ids in (one, other)))


def test_a_fresh_bert_under_a_causal_teacher_looks_back_alone(distill, assets, tmp_path):
    assert distill(student=assets / "masked-config", max_steps=1) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(student).__name__ == "BertLMHeadModel"
    assert student.config.is_decoder
    assert not sees_the_next_token(student)
    # Its predecessor's predictions had seen what they predict.
    student.config.is_decoder = False
    assert sees_the_next_token(BertLMHeadModel(student.config))


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_trained_bert_that_looks_both_ways_predicts_no_next_token(
    distill, assets, tmp_path, capfd, owner
):
    changes = {"student": "masked"} if owner == "student" else {"teacher": "masked"}
    changes = {name: assets / value for name, value in changes.items()}
    assert distill(task="causal-lm", **changes) == 2
    message = f"the {owner} is a bert that sees the tokens which it is to predict"
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


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
        ({"teacher": "{assets}/classifier"}, "the objective needs labels: pass --label-column"),
        (
            {
                "teacher": "{assets}/headless",
                "student": "{assets}/masked-config",
                "task": "masked-lm",
            },
            "has no weights for cls.",
        ),
        ({"teacher": "{assets}/weightless"}, "weightless holds no weights"),
        ({"teacher": "{assets}/scrambled"}, "cannot load the teacher's tokenizer from"),
        ({"teacher": "{assets}/unmaskable"}, "masked-lm needs a tokenizer with a mask token"),
        ({"dataset": "{assets}/text.csv"}, "has no column 'text', it has body, number"),
        ({"dataset": "{assets}/text.csv", "text_column": "number"}, "holds int64, not text"),
        ({"dataset": "{assets}/blank.txt"}, "cannot read the dataset: "),
        ({"dataset": "{assets}/causal/model.safetensors"}, "must end in one of .txt, .json"),
        ({"dataset": "{assets}/short.txt"}, "do not fill one block of 32 tokens"),
        ({"output": "{assets}/text.txt"}, "text.txt is not a directory"),
        ({"output": "{assets}/text.txt/out"}, "/text.txt/out cannot be made in"),
        ({"output": "/proc/out"}, "--output /proc/out cannot be made in /"),
        ({"output": "{assets}/causal"}, "is not empty: pass another directory"),
        ({"resume": True}, "--resume: there is no checkpoint in"),
        ({"block_size": 33}, "--block-size 33 is longer than the 32 tokens"),
        ({"block_size": 1}, "--block-size: must be a whole number at least 2, got '1'"),
        ({"temperature": 0}, "temperature must be finite and above 0, got 0.0"),
        ({"alpha": 1.5}, "alpha must be at least 0 and at most 1, got 1.5"),
        ({"alpha": "half"}, "argument --alpha: invalid float value: 'half'"),
        ({"batch_size": 0}, "--batch-size: must be a whole number at least 1, got '0'"),
        ({"task": "seq2seq"}, "argument --task: invalid choice: 'seq2seq'"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
        ({"resolution": 3}, "unrecognized arguments: --resolution"),
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


def test_training_from_a_whole_cache_is_training_from_the_teacher(
    distill, assets, caches, tmp_path, capfd
):
    settings = {"logging_steps": 1, "epochs": 1, "max_steps": None}
    live = {"temperature": 2.0, "eval_fraction": 0.2}
    assert distill(**settings, **live, output=tmp_path / "live") == 0
    assert distill(**settings, teacher_cache=caches / "causal") == 0
    assert f"student saved to {tmp_path / 'out'}" in capfd.readouterr().out
    terms = ("soft_loss", "hard_loss", "eval_soft_loss", "eval_hard_loss")
    expected, result = (
        [
            [entry[term] for term in terms if term in entry]
            for entry in log_history(tmp_path / name)
            if "soft_loss" in entry or "eval_soft_loss" in entry
        ]
        for name in ("live", "out")
    )
    assert len(result) > 5
    # All 300 tokens are cached: what differs is float16.
    for expected_terms, terms in zip(expected, result, strict=True):
        assert terms == pytest.approx(expected_terms, rel=1e-3, abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(assets / "causal").get_vocab()


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_cache": "causal", "recipe": "truncated", "k": 10, "tail": "none", "alpha": 0.9},
        {"teacher_cache": "masked", "student": "masked-config"},
        {"teacher_cache": "masked", "student": "masked-config", "recipe": "truncated"},
        {"teacher_cache": "sampled", "eval_fraction": 0.05, "text_column": "text"},
    ],
)
def test_every_kind_of_cache_trains(distill, assets, caches, tmp_path, changes):
    changes = {**changes, "teacher_cache": caches / changes["teacher_cache"]}
    if "student" in changes:
        changes["student"] = assets / changes["student"]
    assert distill(**changes, logging_steps=1, save_steps=1) == 0
    losses = [entry["soft_loss"] for entry in log_history(tmp_path / "out") if "loss" in entry]
    assert len(losses) == 2
    assert distill(**changes, logging_steps=1, max_steps=3, resume=True) == 0


def test_a_cache_holds_training_and_held_out_blocks(caches):
    cache = TeacherCache(caches / "causal")
    data = cache.manifest["data"]
    assert data == {
        "task": "causal-lm",
        "text_column": "text",
        "block_size": LENGTH,
        "mlm_probability": None,
        "eval_fraction": 0.2,
        "seed": 42,
    }
    assert cache.tokens == LENGTH * len(cache)
    assert (caches / "causal" / "tokenizer" / "tokenizer.json").is_file()
    masked = TeacherCache(caches / "masked").manifest["data"]
    assert (masked["task"], masked["mlm_probability"]) == ("masked-lm", 0.3)


@pytest.mark.parametrize(
    ("kind", "student"), [("causal", "causal.json"), ("masked", "masked-config")]
)
def test_a_cache_without_held_out_blocks(build, distill, assets, tmp_path, capfd, kind, student):
    (tmp_path / "text.txt").write_text("\n\n".join([*DOCUMENTS[:9], *"abcdefghijklmnop"]))
    # Of these documents two are held out, and both are a letter.
    settings = {"dataset": tmp_path / "text.txt", "eval_fraction": 0.08}
    assert build(**settings, teacher=assets / kind, seed=1) == 0
    assert "the 2 held-out documents do not fill one block" in capfd.readouterr().err
    settings["student"] = assets / student
    assert distill(**settings, teacher_cache=tmp_path / "teacher") == 0
    assert not any("eval_loss" in entry for entry in log_history(tmp_path / "out"))


def assert_masked_as_bert(ids, inputs, labels, tokenizer):
    """Of 200 blocks of 50, whose first tokens are special, a fifth is chosen."""
    chosen = labels != -100
    # Neither the first block's mask nor the first token's is everybody's.
    assert not torch.equal(chosen[0], chosen[1])
    assert not chosen[:, 0].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    # 9800 tokens: three standard deviations are 0.012 of all, and 0.03 of those that are chosen.
    assert chosen[:, 1:].double().mean() == pytest.approx(0.2, abs=0.012)
    became_mask = (inputs == tokenizer.mask_token_id)[chosen].double().mean()
    stayed = (inputs == ids)[chosen].double().mean()
    assert became_mask == pytest.approx(0.8, abs=0.03)
    assert stayed == pytest.approx(0.1, abs=0.03)


def test_masks_depend_on_the_seed_and_the_block():
    tokenizer = make_tokenizer(**SPECIAL)
    ids = torch.randint(10, 300, (200, 50)).tolist()
    special = [[1] + [0] * 49] * 200
    blocks = datasets.Dataset.from_dict({"input_ids": ids, "special_tokens_mask": special})
    masked = mask_once(blocks, tokenizer, 0.2, 1)
    assert masked.column_names == ["input_ids", "labels"]
    assert masked[:] == mask_once(blocks, tokenizer, 0.2, 1)[:]
    assert masked[:] != mask_once(blocks, tokenizer, 0.2, 2)[:]
    rest = mask_once(blocks.select(range(150, 200)), tokenizer, 0.2, 1, start=150)
    assert masked[150:] == rest[:]
    inputs, labels = (torch.tensor(masked[name][:]) for name in ("input_ids", "labels"))
    assert_masked_as_bert(torch.tensor(ids), inputs, labels, tokenizer)


def test_masks_depend_on_the_seed_the_epoch_and_the_block():
    tokenizer = make_tokenizer(**SPECIAL)
    ids = torch.randint(len(SPECIAL), len(tokenizer), (200, 50))
    ids[:, 0] = tokenizer.eos_token_id
    rows = [{"input_ids": row.tolist()} for row in ids]
    masks = EpochMasks(tokenizer, 0.2, 1)
    batch = masks(rows)
    # Whatever is drawn in between, and whatever stands beside a block.
    torch.manual_seed(5)
    alone = masks(rows[7:9])
    for name, value in batch.items():
        assert value.dtype == torch.int64
        assert torch.equal(alone[name], value[7:9])
    labels = batch["labels"]
    assert_masked_as_bert(ids, batch["input_ids"], labels, tokenizer)

    # Resumed in the middle of an epoch, it is that one.
    for epoch, whole in ((2.0, 2), (2.6, 2), (3.0, 3)):
        masks.on_epoch_begin(None, TrainerState(epoch=epoch), None)
        assert masks.epoch == whole
        assert not torch.equal(masks(rows)["labels"], labels)
    masks.on_epoch_begin(None, TrainerState(epoch=0), None)
    assert torch.equal(masks(rows)["labels"], labels)
    assert not torch.equal(EpochMasks(tokenizer, 0.2, 2)(rows)["labels"], labels)


def test_a_terminal_sees_how_far_a_build_is(build, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert build(batch_size=4, eval_fraction=0) == 0
    lines = capsys.readouterr().err.split("\r")
    counts = [line.strip() for line in lines if line.rstrip().endswith("sequences")]
    total = counts[-1].split()[0]
    assert counts[0] == f"4 of {total} sequences"
    assert counts[-1] == f"{total} of {total} sequences"


def test_cache_info_and_verify(caches, capfd):
    assert cli.main(["cache", "info", str(caches / "sampled")]) == 0
    rows = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines())
    cache = TeacherCache(caches / "sampled")
    assert rows["entries"] == "6 sampled at temperature 1.0 of 300, at temperature 1.0"
    assert rows["size"] == f"{cache.nbytes} bytes, {cache.bytes_per_token:.1f} per token"
    assert rows["bits"] == "8"
    assert rows["block_size"] == str(LENGTH)
    assert cli.main(["cache", "verify", str(caches / "sampled")]) == 0
    verified = f"all {cache.nbytes} bytes of {caches / 'sampled'} are what was written\n"
    assert capfd.readouterr().out == verified


def test_a_build_that_was_interrupted_goes_on(build, tmp_path, monkeypatch, capfd):
    from kdfast.teacher_cache import build as module

    assert build(output=tmp_path / "whole", samples_per_shard=8) == 0
    build_shard = module._build_shard

    def interrupted(directory, manifest, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        build_shard(directory, manifest, number, *rest)

    monkeypatch.setattr(module, "_build_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(samples_per_shard=8)
    assert cli.main(["cache", "verify", str(tmp_path / "teacher")]) == 2
    assert "the build was not finished" in capfd.readouterr().err
    monkeypatch.undo()
    assert build(samples_per_shard=8) == 0
    names = [path.name for path in (tmp_path / "whole").iterdir() if path.is_file()]
    assert len(names) > 3
    for name in names:
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "teacher"))
        assert whole.read_bytes() == resumed.read_bytes()
    assert build(samples_per_shard=8, k=11) == 2
    assert "k is 12 there and 11 here" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": None}, "pass either --k K, for the largest entries, or --sampled"),
        ({"sampled": True}, "pass either --k K, for the largest entries, or --sampled"),
        ({"draws": 3}, "--draws goes with --sampled alone"),
        ({"proposal_temperature": 2.0}, "--proposal-temperature goes with --sampled alone"),
        ({"k": 301}, "k must be at most the 300 columns that exist, got 301"),
        ({"bits": 4}, "argument --bits: invalid choice: 4"),
        ({"temperature": 0}, "--temperature: must be a number above 0"),
        ({"teacher": None}, "required: --teacher"),
        ({"teacher": "{assets}/weightless"}, "weightless holds no weights"),
        ({"teacher": "{assets}/unmaskable"}, "masked-lm needs a tokenizer with a mask token"),
        ({"dataset": "/no/such.txt"}, "--dataset /no/such.txt does not exist"),
        ({"output": "{assets}"}, "is in the way: the directory of a new cache is empty"),
        ({"output": "{assets}/text.txt"}, "cannot write {assets}/text.txt: File exists"),
        ({"block_size": 33}, "--block-size 33 is longer than the 32 tokens"),
    ],
)
def test_build_errors_are_one_line_and_status_2(build, assets, tmp_path, capfd, changes, message):
    changes = {
        name: value.format(assets=assets) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    assert build(**changes) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("kdfast: error: ")
    assert message.format(assets=assets) in output.err
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": "{assets}/causal"},
            "argument --teacher-cache: not allowed with argument --teacher",
        ),
        ({"teacher_cache": None}, "arguments are required: --teacher or --teacher-cache"),
        ({"teacher_cache": "{assets}"}, "manifest.json is missing"),
        ({"temperature": 3}, "--temperature 3.0: the teacher cache in"),
        ({"eval_fraction": 0.1}, "--eval-fraction 0.1: the teacher cache in"),
        ({"block_size": 16}, "--block-size 16: the teacher cache in"),
        ({"task": "masked-lm"}, "--task masked-lm: the teacher cache in"),
        ({"text_column": "body"}, "--text-column body: the teacher cache in"),
        ({"mlm_probability": 0.15}, "--mlm-probability 0.15: the teacher cache in"),
        ({"student": "{assets}/other"}, "tokenizer (280 tokens) and the teacher's (300) differ"),
        ({"dataset": ["{assets}/text.txt"] * 2}, "it was built from other files"),
        ({"dataset": "{assets}/other.txt"}, "shard-00000.parquet, row 0: the teacher saw other"),
        ({"recipe": "truncated", "k": 301}, "k must be at most the teacher cache's, 300, got 301"),
        ({"k": 3}, "--k is no setting of the recipe hinton"),
    ],
)
def test_a_cache_that_does_not_fit_is_one_line_and_status_2(
    distill, assets, caches, tmp_path, capfd, changes, message
):
    # As many tokens as the cached text, in another order.
    text = (assets / "text.txt").read_text()
    swapped = text.replace(" make ", " @ ").replace(" says ", " make ").replace(" @ ", " says ")
    (assets / "other.txt").write_text(swapped)

    def filled(value: object) -> object:
        if isinstance(value, list):
            return [filled(part) for part in value]
        return value.format(assets=assets) if isinstance(value, str) else value

    changes = {name: filled(value) for name, value in changes.items()}
    assert distill(**{"teacher_cache": caches / "causal", **changes}) == 2
    output = capfd.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("kdfast: error: ")
    assert message in output.err


def test_no_command_is_an_error(capfd):
    assert cli.main([]) == 2
    assert cli.main(["cache"]) == 2
    assert capfd.readouterr().err.startswith("kdfast: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bfloat16_without_a_gpu(distill, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("kdfast.cli.run.is_torch_bf16_gpu_available", lambda: False)
    assert distill(bf16=True, device=None) == 2
    assert capfd.readouterr().err.endswith(
        "--bf16: torch sees no GPU that has it: pass --device cpu as well\n"
    )
    assert not (tmp_path / "out").exists()
    assert distill(bf16=True, max_steps=1) == 0


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
