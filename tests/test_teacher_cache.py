"""The teacher cache: what comes out of it, its size, interruptions, and damage of every kind."""

import gc
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import kdfast
from kdfast.ops.truncated_softmax import TruncatedSoftmax
from kdfast.teacher_cache import (
    OtherRowsError,
    TeacherCache,
    TeacherCacheError,
    build_cache,
    format,
    read,
)
from kdfast.teacher_cache.format import Layout

VOCAB = 997
SHARD = 8
K = 12

# Half a unit in the last place of float16, relative; and of log-probs between −8 and −16.
HALF_ULP = 2**-11
# The relative change of loss and gradient by what a cache rounds; docs/teacher-cache.md has what
# was measured.
LOSS_TOLERANCE = {16: 3e-4, 8: 1e-3}
GRADIENT_TOLERANCE = {16: 1e-3, 8: 1e-2}


def make_teacher(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    # Logits of a model that has learned something: their spread is 2, not 0.1.
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


def make_samples(count: int = 29, seed: int = 0) -> list[dict[str, list[int]]]:
    random = np.random.default_rng(seed)
    return [
        {"input_ids": random.integers(VOCAB, size=random.integers(1, 40)).tolist()}
        for _ in range(count)
    ]


def make_tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    vocabulary = {token: i for i, token in enumerate(("<unk>", *tokens))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def teacher() -> GPT2LMHeadModel:
    return make_teacher()


@pytest.fixture(scope="module")
def samples() -> list[dict[str, list[int]]]:
    return make_samples()


@pytest.fixture(scope="module")
def expected(teacher, samples) -> list[TruncatedSoftmax]:
    """Each sample alone through the teacher."""
    teacher.eval()
    with torch.no_grad():
        return [
            kdfast.truncated_softmax(teacher(torch.tensor([row["input_ids"]])).logits[0], K)
            for row in samples
        ]


@pytest.fixture(scope="module")
def built(teacher, samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "cache"
    build_cache(
        teacher,
        samples,
        folder,
        k=K,
        samples_per_shard=SHARD,
        tokenizer=make_tokenizer("a", "b"),
    )
    return folder


@pytest.fixture
def cache(built) -> TeacherCache:
    return TeacherCache(built)


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


def assert_close(top: TruncatedSoftmax, expected: TruncatedSoftmax) -> None:
    """Equal up to float16, and up to the batch that the teacher saw: ids with equal log-probs."""
    assert top.indices.dtype == torch.int64
    assert top.log_probs.dtype == torch.float32
    torch.testing.assert_close(top.log_probs, expected.log_probs, rtol=HALF_ULP, atol=1e-5)
    assert (top.indices == expected.indices).double().mean() > 0.99


def edit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What comes out.


def test_samples_are_the_teachers_own(cache, samples, expected):
    assert len(cache) == len(samples)
    assert cache.tokens == sum(len(row["input_ids"]) for row in samples)
    assert (cache.k, cache.sampled, cache.temperature, cache.vocab_size) == (K, False, 1.0, VOCAB)
    for i, top in enumerate(expected):
        assert_close(cache[i], top)
    assert_close(cache[-1], expected[-1])
    with pytest.raises(IndexError, match=f"sample {len(samples)} of a teacher cache of"):
        cache[len(samples)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["list", "table"])
def test_padding_is_not_cached(teacher, samples, expected, tmp_path, side, kind):
    padded = []
    for row in samples[:12]:
        ids = row["input_ids"]
        fill = [7] * (40 - len(ids))
        fake, real = [0] * len(fill), [1] * len(ids)
        ids, mask = (fill + ids, fake + real) if side == "left" else (ids + fill, real + fake)
        padded.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    rows = padded if kind == "list" else datasets.Dataset.from_list(padded)
    cache = build_cache(teacher, rows, tmp_path / "cache", k=K, samples_per_shard=SHARD)
    for i in range(12):
        assert_close(cache[i], expected[i])
    positions = torch.tensor([row["attention_mask"] for row in padded]).bool()
    top = cache.rows(torch.arange(12), positions)
    assert top.log_probs.shape == top.indices.shape == (12, 40, K)
    for i in range(12):
        assert torch.equal(top.indices[i, positions[i]], cache[i].indices)
        assert torch.equal(top.log_probs[i, positions[i]], cache[i].log_probs)
    assert (top.indices[~positions] == -1).all()
    assert (top.log_probs[~positions] == -math.inf).all()
    # What is not padded is the same sample.
    assert cache.attach(samples[:12])[3] == {**samples[3], "teacher_sample": 3}


def test_a_sample_that_is_all_padding_has_no_tokens(teacher, samples, tmp_path):
    masks = [0, 1, 0, 0]
    rows = [
        {**row, "attention_mask": [mask] * len(row["input_ids"])}
        for row, mask in zip(samples, masks, strict=False)
    ]
    cache = build_cache(teacher, rows, tmp_path / "cache", k=K, batch_size=2)
    assert [len(cache[i].indices) for i in range(4)] == [0, len(samples[1]["input_ids"]), 0, 0]
    empty = cache.rows([0, 2], torch.zeros(2, 5, dtype=torch.bool))
    assert (empty.indices == -1).all()


@pytest.mark.parametrize("kind", ["list", "table"])
def test_other_inputs_of_the_teacher_reach_it(tmp_path, kind):
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 20)

        def forward(self, input_ids, boxes, scale):
            logits = self.table(input_ids) + self.table(boxes).sum(2)
            return (logits * scale[:, None, None],)

    teacher = Typed()
    rows = [
        {"input_ids": [1, 2, 3], "boxes": [[0, 4], [5, 1], [2, 2]], "scale": 3.0, "labels": [0]},
        {"input_ids": [6], "boxes": [[7, 8]], "scale": -1.0, "labels": [0]},
    ]
    for row in rows:
        row["text"] = "no number"
    dataset = rows if kind == "list" else datasets.Dataset.from_list(rows)
    with pytest.raises(
        ValueError, match="batch_size must be 1 for a teacher whose forward takes no"
    ):
        build_cache(teacher, dataset, tmp_path / "cache", k=3)
    cache = build_cache(teacher, dataset, tmp_path / "cache", k=3, batch_size=1)
    for i, row in enumerate(rows):
        names = ("input_ids", "boxes", "scale")
        (logits,) = teacher(*(torch.tensor([row[name]]) for name in names))
        assert_close(cache[i], kdfast.truncated_softmax(logits[0].detach(), 3))


def test_temperature_and_padding_columns(teacher, samples, tmp_path):
    cache = build_cache(
        teacher, samples[:3], tmp_path / "cache", k=K, temperature=2.5, vocab_size=900
    )
    assert (cache.temperature, cache.vocab_size) == (2.5, 900)
    with torch.no_grad():
        logits = teacher(torch.tensor([samples[2]["input_ids"]])).logits[0]
    expected = kdfast.truncated_softmax(logits, K, temperature=2.5, vocab_size=900)
    assert_close(cache[2], expected)


def test_the_teacher_is_left_in_its_mode(samples, tmp_path):
    teacher = make_teacher().train()
    teacher.transformer.h[0].eval()
    build_cache(teacher, samples[:2], tmp_path / "cache", k=1)
    assert teacher.training
    assert not teacher.transformer.h[0].attn.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_sampled_entries_have_the_operations_weights(teacher, samples, tmp_path):
    settings = {"draws": 16, "proposal_temperature": 1.5, "samples_per_shard": 4}
    # Two shards with the same samples: the draws are the shard's own.
    rows = samples[:4] * 2
    first = build_cache(teacher, rows, tmp_path / "first", **settings, seed=3)
    again = build_cache(teacher, rows, tmp_path / "again", **settings, seed=3)
    other = build_cache(teacher, rows, tmp_path / "other", **settings, seed=4)
    assert first.sampled
    assert first.k == 16
    assert files_in(tmp_path / "first") == files_in(tmp_path / "again")
    assert not torch.equal(first[0].indices, first[4].indices)
    assert not torch.equal(first[0].indices, other[0].indices)
    assert not torch.equal(again[1].indices[:1], again[0].indices[:1])

    for i in range(4):
        with torch.no_grad():
            logits = teacher(torch.tensor([samples[i]["input_ids"]])).logits[0].double()
        log_probs, indices = first[i]
        exists = indices >= 0
        assert (log_probs[~exists] == -math.inf).all()
        assert exists.sum(-1).min() >= 1
        # A weight is a count of draws times p / proposal: whole numbers come back.
        column = indices.clamp_min(0)
        ratio = logits.log_softmax(-1).gather(-1, column)
        ratio -= (logits / 1.5).log_softmax(-1).gather(-1, column)
        counts = torch.where(exists, 16 * (log_probs - ratio).exp(), 0.0)
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=0.1)
        assert (counts.sum(-1).round() == 16).all()


# Precision and size.


def table_teacher(vocab_size: int) -> nn.Module:
    """64 rows of logits with a few large ones, as a language model has them."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(64, vocab_size)
            with torch.no_grad():
                self.rows.weight.mul_(2)
                self.rows.weight[:, torch.randperm(vocab_size)[:64]] += 6 * torch.rand(64, 64)

        def forward(self, input_ids):
            return (self.rows(input_ids),)

    return Table()


@pytest.mark.parametrize(
    ("vocab_size", "entries", "bits", "most"),
    [
        # Ids in 17 or 18 bits, log-probs in 16 or 9, and a footer that 384 tokens share.
        (50257, {"k": 64}, 16, 64 * 4.3),
        (50257, {"k": 64}, 8, 64 * 3.5),
        (50257, {"draws": 12}, 8, 54),
        (131072, {"k": 64}, 16, 64 * 4.5),
        (131072, {"draws": 12}, 16, 64),
    ],
)
def test_bytes_per_token(tmp_path, vocab_size, entries, bits, most):
    rows = [{"input_ids": torch.randint(64, (128,))} for _ in range(3)]
    teacher = table_teacher(vocab_size)
    cache = build_cache(teacher, rows, tmp_path / "cache", **entries, bits=bits, batch_size=1)
    assert cache.bytes_per_token <= most
    assert cache.bytes_per_token <= 6 * cache.k
    shards = list((tmp_path / "cache").glob("shard-*.parquet"))
    assert cache.nbytes == sum(path.stat().st_size for path in shards)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none", "support"])
def test_rounding_changes_the_loss_by_little(bits, tail):
    teacher = table_teacher(8000).rows.weight.detach()
    exact = kdfast.truncated_softmax(teacher, 64)
    layout = Layout(64, 8000, bits)
    columns = layout.encode(exact.log_probs.numpy(), exact.indices.numpy())
    stored = TruncatedSoftmax(*map(torch.from_numpy, layout.decode(columns)))
    assert torch.equal(stored.indices, exact.indices)
    error = (stored.log_probs - exact.log_probs).abs()
    if bits == 16:
        assert (error <= HALF_ULP * exact.log_probs.abs()).all()
    else:
        spread = exact.log_probs.amax(-1) - exact.log_probs.amin(-1)
        assert (error <= 0.5 / 254 * spread[:, None] * 1.01 + 2e-3).all()
        assert (error[:, 0] <= HALF_ULP * exact.log_probs[:, 0].abs()).all()

    student = (teacher + torch.randn_like(teacher)).requires_grad_()
    losses = [kdfast.topk_kd_loss(student, top, tail=tail) for top in (exact, stored)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    change = abs(losses[1] - losses[0]) / losses[0]
    gradient_change = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert change < LOSS_TOLERANCE[bits]
    assert 0 < gradient_change < GRADIENT_TOLERANCE[bits]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("vocab_size", [65535, 65536, 2**20])
def test_every_kind_of_entry_comes_back(bits, vocab_size):
    inf = math.inf
    log_probs = np.array(
        [
            [-0.5, -1.0, -inf],  # two entries, and one that does not exist
            [-inf, -inf, -inf],  # none has a probability
            [0.0, -inf, -inf],  # a logit of −inf that is listed
            [0.75, -2.0, -2.0],  # a sampled weight above 1
            [-1e-3, -60.0, -1e6],  # a range that is not worth a step each
            [-3.0, -3.0, -3.0],  # no range
        ],
        np.float32,
    )
    largest_id = vocab_size - 1
    indices = np.array(
        [[largest_id, 0, -1], [-1, -1, -1], [5, 4, 3], [1, 2, 3], [0, 1, largest_id], [9, 8, 7]]
    )
    layout = Layout(3, vocab_size, bits)
    columns = layout.encode(log_probs, indices)
    assert columns["indices"].dtype == (np.uint16 if vocab_size <= 65535 else np.uint32)
    result, ids = layout.decode(columns)
    assert np.array_equal(ids, indices)
    # As far as float16, and as a range of 64, go.
    log_probs[4, 2] = -65504 if bits == 16 else -64.0
    np.testing.assert_allclose(result, log_probs, rtol=1e-3 if bits == 16 else 5e-3, atol=1e-3)
    assert (result[5] == -3.0).all()


def test_any_arrow_tool_reads_a_shard(built, cache, expected, tmp_path):
    files = sorted(map(str, built.glob("shard-*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))["train"]
    assert len(rows) == len(cache)
    for i in (0, SHARD, len(cache) - 1):
        assert torch.equal(torch.tensor(rows[i]["indices"]).reshape(-1, K), cache[i].indices)
        log_probs = torch.tensor(rows[i]["log_probs"]).reshape(-1, K)
        torch.testing.assert_close(log_probs, cache[i].log_probs)
    assert pq.read_schema(files[0]).field("indices").type == pa.list_(pa.uint16())


# Reading.


def test_opening_reads_no_shard_and_a_sample_its_row_group(built, monkeypatch):
    read_groups = []

    class Spy(pq.ParquetFile):
        def read_row_group(self, index, **options):
            read_groups.append(index)
            return super().read_row_group(index, **options)

    opened = []

    def open_shard(path, **options):
        opened.append(path.name)
        return Spy(path, **options)

    monkeypatch.setattr(read.pq, "ParquetFile", open_shard)
    cache = TeacherCache(built)
    assert opened == []
    for sample in (SHARD, SHARD + 1, SHARD):
        cache[sample]
    assert opened == ["shard-00001.parquet"]
    assert read_groups == [0]


def test_memory_is_bounded(teacher, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(format, "ROW_GROUP_ENTRIES", 30 * K)
    monkeypatch.setattr(read, "SHARDS_KEPT", 2)
    monkeypatch.setattr(read, "ROW_GROUPS_KEPT", 3)
    cache = build_cache(teacher, samples, tmp_path / "cache", k=K, samples_per_shard=SHARD)
    metadata = pq.read_metadata(tmp_path / "cache" / "shard-00000.parquet")
    assert metadata.num_row_groups > 2
    whole = [cache[i] for i in range(len(cache))]
    for i in torch.randperm(len(cache)).tolist():
        assert torch.equal(cache[i].log_probs, whole[i].log_probs)
    assert len(cache._readers._shards._kept) == 2
    assert len(cache._readers._groups._kept) == 3


class Attached(torch.utils.data.Dataset):
    def __init__(self, cache: TeacherCache, rows: datasets.Dataset):
        self.cache, self.rows = cache, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {**self.rows[i], "top": self.cache[self.rows[i]["teacher_sample"]]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffling_loader_gets_the_right_rows(teacher, samples, expected, tmp_path, workers):
    rows = datasets.Dataset.from_list(samples)
    cache = build_cache(teacher, rows, tmp_path / "cache", k=K, samples_per_shard=SHARD)
    rows = cache.attach(rows)
    assert rows["teacher_sample"][:3] == [0, 1, 2]
    # A shard that is open in this process already.
    cache[0]
    loader = DataLoader(
        Attached(cache, rows.shuffle(seed=1)),
        batch_size=4,
        shuffle=True,
        num_workers=workers,
        collate_fn=list,
    )
    seen = set()
    for row in (row for batch in loader for row in batch):
        (number,) = [
            i for i, sample in enumerate(samples) if sample["input_ids"] == row["input_ids"]
        ]
        assert_close(row["top"], expected[number])
        seen.add(number)
    assert seen == set(range(len(samples)))


def test_a_pickled_cache_is_open_elsewhere(cache):
    top = cache[3]
    content = pickle.dumps(cache)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content)[3].log_probs, top.log_probs)


def test_threads_share_a_cache(teacher, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(format, "ROW_GROUP_ENTRIES", 30 * K)
    monkeypatch.setattr(read, "ROW_GROUPS_KEPT", 2)
    monkeypatch.setattr(read, "SHARDS_KEPT", 1)
    cache = build_cache(teacher, samples, tmp_path / "cache", k=K, samples_per_shard=SHARD)
    whole = [cache[i].indices for i in range(len(cache))]
    order = np.random.default_rng(0).integers(len(cache), size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, top in zip(order, pool.map(cache.__getitem__, order), strict=True):
            assert torch.equal(top.indices, whole[i])


def test_rows_refuse_a_mask_that_does_not_fit(cache, samples):
    length = len(samples[0]["input_ids"])
    mask = torch.ones(1, length, dtype=torch.bool)
    assert cache.rows([0], mask).indices.shape == (1, length, K)
    too_long = torch.ones(1, length + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"sample 0 has {length} tokens in the teacher cache and"):
        cache.rows([0], too_long)
    with pytest.raises(ValueError, match=r"positions must be \[2, S\], a row per sample"):
        cache.rows(torch.tensor([0, 1]), mask)
    with pytest.raises(TypeError, match=r"positions must be bool, got torch.int64"):
        cache.rows([0], mask.long())


# What belongs together.


def test_attach_takes_the_rows_it_was_built_from(built, cache, samples):
    tail = datasets.Dataset.from_list(samples[10:])
    assert cache.attach(tail, 10)["teacher_sample"][:] == list(range(10, len(samples)))
    swapped = [*samples[:9], samples[10], samples[9]]
    with pytest.raises(TeacherCacheError, match=r"shard-00001.parquet, row 1: the teacher saw"):
        cache.attach(swapped)
    other = [dict(row) for row in samples[10:]]
    other[-1] = {"input_ids": [*other[-1]["input_ids"][:-1], 0]}
    with pytest.raises(TeacherCacheError, match=f"row {len(other) - 1} of the dataset has"):
        cache.attach(datasets.Dataset.from_list(other), 10)
    with pytest.raises(ValueError, match="dataset must have at most 3 rows"):
        cache.attach(samples[:4], len(samples) - 3)
    with pytest.raises(ValueError, match="rows with input_ids"):
        cache.attach([{"text": "a"}])
    with pytest.raises(TypeError, match="a sequence of mappings, got generator"):
        cache.attach(row for row in samples)


def test_attach_sees_what_a_transform_makes(cache, samples):
    rows = datasets.Dataset.from_list(samples[:3]).with_transform(
        lambda batch: {"input_ids": [[1] * len(ids) for ids in batch["input_ids"]]}
    )
    with pytest.raises(TeacherCacheError, match=r"shard-00000.parquet, row 0: the teacher saw"):
        cache.attach(rows)


def test_the_tokenizer_is_checked_and_saved(built, cache, teacher, samples, tmp_path):
    cache.check_tokenizer(make_tokenizer("a", "b"))
    cache.check_tokenizer(PreTrainedTokenizerFast.from_pretrained(built / "tokenizer"))
    with pytest.raises(TeacherCacheError, match=r"manifest.json is of another tokenizer: it had 3"):
        cache.check_tokenizer(make_tokenizer("b", "a"))
    without = build_cache(teacher, samples[:1], tmp_path / "cache", k=1)
    with pytest.raises(TeacherCacheError, match=r"manifest.json names no tokenizer"):
        without.check_tokenizer(make_tokenizer("a", "b"))


OTHER = {
    "teacher": {"teacher": make_teacher(1)},
    "dataset": {"dataset": make_samples(seed=1)},
    "order": {"dataset": make_samples()[::-1]},
    "fewer": {"dataset": make_samples()[:-1]},
    "tokenizer": {"tokenizer": make_tokenizer("b", "a")},
    "no tokenizer": {"tokenizer": None},
    "k": {"k": K + 1},
    "draws": {"k": None, "draws": K},
    "temperature": {"temperature": 2.0},
    "bits": {"bits": 8},
    "vocab_size": {"vocab_size": VOCAB - 1},
    "seed": {"seed": 1},
    "samples_per_shard": {"samples_per_shard": SHARD + 1},
    "data": {"data": {"masks": (1, 2)}},
    "teacher_fingerprint": {"teacher_fingerprint": "mine"},
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", OTHER)
def test_a_cache_of_something_else_is_not_gone_on_with(copy, teacher, samples, finished, change):
    if not finished:
        manifest = json.loads((copy / "manifest.json").read_text())
        edit_manifest(copy, shards=manifest["shards"][:1])
        for name in ("shard-00001.parquet", "shard-00002.parquet", "shard-00003.parquet"):
            (copy / name).unlink()
    before = files_in(copy)
    settings = {
        "teacher": teacher,
        "dataset": samples,
        "k": K,
        "samples_per_shard": SHARD,
        "tokenizer": make_tokenizer("a", "b"),
        **OTHER[change],
    }
    name = {
        "order": "dataset",
        "fewer": "dataset",
        "no tokenizer": "tokenizer",
        "teacher_fingerprint": "teacher",
    }.get(change, change)
    message = rf"manifest.json is of another cache: .*{name} is .* there and .* here"
    with pytest.raises(TeacherCacheError, match=message):
        build_cache(output=copy, **settings)
    assert files_in(copy) == before


def test_a_finished_cache_is_returned_as_it_is(copy, teacher, samples, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    # Rows that are equal make an equal dataset, of whatever type.
    rows = datasets.Dataset.from_list(samples)
    tokenizer = make_tokenizer("a", "b")
    done = []
    cache = build_cache(
        teacher,
        rows,
        copy,
        k=K,
        samples_per_shard=SHARD,
        tokenizer=tokenizer,
        progress=lambda *counts: done.append(counts),
    )
    assert done == [(len(samples), len(samples))]
    assert len(cache) == len(samples)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


# Damage.


def open_all(folder: Path) -> None:
    cache = TeacherCache(folder)
    for i in range(len(cache)):
        cache[i]


def test_a_changed_byte_anywhere_is_found(built, copy):
    path = copy / "shard-00001.parquet"
    size = path.stat().st_size
    TeacherCache(copy).verify()
    seen_by_readers = 0
    for offset in range(0, size, max(1, size // 40)):
        edit(path, offset)
        with pytest.raises(TeacherCacheError, match=r"shard-00001.parquet is damaged: its SHA-256"):
            TeacherCache(copy).verify()
        # Pages have checksums of their own; a footer's every byte need not matter.
        with suppress(TeacherCacheError):
            open_all(copy)
            seen_by_readers -= 1
        seen_by_readers += 1
        edit(path, offset)
    assert seen_by_readers >= 20
    assert files_in(copy) == files_in(built)


def test_a_changed_footer_is_an_error_of_the_cache(copy, samples):
    path = copy / "shard-00001.parquet"
    footer = int.from_bytes(path.read_bytes()[-8:-4], "little") + 8
    size, messages = path.stat().st_size, []
    for offset in range(size - footer, size, 5):
        edit(path, offset)
        # Whatever Arrow makes of it, nothing else comes out.
        try:
            open_all(copy)
            TeacherCache(copy).attach(samples)
        except TeacherCacheError as error:
            messages.append(str(error))
        edit(path, offset)
    assert len(messages) > 20
    assert all(path.name in message for message in messages)


@pytest.mark.parametrize("where", ["data", "footer"])
def test_a_changed_byte_is_an_error_when_it_is_read(copy, where):
    path = copy / "shard-00001.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(1)
    edit(path, chunk.data_page_offset + 60 if where == "data" else path.stat().st_size - 1)
    cache = TeacherCache(copy)
    cache[0]
    with pytest.raises(TeacherCacheError, match=r"shard-00001.parquet is damaged or cannot be"):
        cache[SHARD]


def test_a_truncated_or_missing_shard(copy):
    path = copy / "shard-00002.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        TeacherCacheError, match=r"shard-00002.parquet is damaged: it has \d+ bytes"
    ):
        TeacherCache(copy)
    path.unlink()
    with pytest.raises(TeacherCacheError, match=r"shard-00002.parquet is missing"):
        TeacherCache(copy)


def test_a_foreign_shard(copy, teacher, samples, tmp_path):
    build_cache(teacher, samples, tmp_path / "other", k=K, samples_per_shard=SHARD, seed=1)
    for foreign in (tmp_path / "other" / "shard-00001.parquet", copy / "shard-00000.parquet"):
        shutil.copy(foreign, copy / "shard-00001.parquet")
        # Even where the manifest was made to fit.
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["shards"][1]["bytes"] = foreign.stat().st_size
        edit_manifest(copy, shards=manifest["shards"])
        cache = TeacherCache(copy)
        with pytest.raises(TeacherCacheError, match=r"shard-00001.parquet is of another cache, or"):
            cache[SHARD]
        with pytest.raises(TeacherCacheError, match=r"shard-00001.parquet is damaged: its SHA-256"):
            cache.verify()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format_version": 2}, "has format version 2, and this kdfast reads 1"),
        ({"format": "a recipe"}, "is not the manifest of a kdfast teacher cache"),
        ({"k": 3}, "is damaged: its settings are not those of its id"),
        ({"shards": []}, "lists 0 of 4 shards: the build was not finished"),
        ({"shards": 3}, "is damaged: its shards are no list of entries with file, samples"),
        ({"shards": [{}]}, "is damaged: its shards are no list of entries with file, samples"),
    ],
)
def test_a_manifest_that_says_something_else(copy, damage, message):
    edit_manifest(copy, **damage)
    with pytest.raises(TeacherCacheError, match=rf"manifest.json {message}"):
        TeacherCache(copy)


def test_a_manifest_that_says_nothing(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["bits"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TeacherCacheError, match=r"manifest.json is damaged: it has no bits"):
        TeacherCache(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(TeacherCacheError, match=r"manifest.json is damaged: it is no JSON"):
        TeacherCache(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(TeacherCacheError, match=r"holds no teacher cache: .*manifest.json is miss"):
        TeacherCache(copy)


# Building.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"k": None},
            ValueError,
            "exactly one of k and draws must be given, got k=None and draws=N",
        ),
        (
            {"draws": 3},
            ValueError,
            "exactly one of k and draws must be given, got k=12 and draws=3",
        ),
        ({"k": 0}, ValueError, "k must be"),
        ({"k": VOCAB + 1}, ValueError, f"k must be at most the {VOCAB} columns that exist"),
        ({"bits": 4}, ValueError, "bits must be"),
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"k": None, "draws": 2, "proposal_temperature": 0}, ValueError, "proposal_temperature mu"),
        (
            {"vocab_size": VOCAB + 1},
            ValueError,
            f"vocab_size must be .* at most the teacher's {VOCAB}",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"samples_per_shard": 0}, ValueError, "samples_per_shard must be"),
        ({"dataset": []}, ValueError, "dataset must have rows, got none"),
        ({"dataset": [{"ids": [1]}]}, ValueError, "dataset must have rows with input_ids"),
        ({"dataset": iter([])}, TypeError, "got list_iterator"),
        ({"dataset": [{"input_ids": []}]}, ValueError, "dataset must have tokens"),
        ({"teacher": nn.Flatten(0)}, TypeError, "input_ids"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(
    teacher, samples, tmp_path, changes, error, message
):
    settings = {"teacher": teacher, "dataset": samples, "k": K, **changes}
    with pytest.raises(error, match=message):
        build_cache(output=tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()


def test_a_teacher_with_a_class_per_sequence_is_refused(samples, tmp_path):
    class Classifier(nn.Module):
        def forward(self, input_ids):
            return (torch.zeros(len(input_ids), 3),)

    with pytest.raises(ValueError, match=r"teacher must return logits \[1, \d+, vocabulary\], got"):
        build_cache(Classifier(), samples, tmp_path / "cache", k=1)


def test_nan_is_not_cached(samples, tmp_path):
    teacher = make_teacher()
    (row,) = [row["input_ids"] for row in samples[9:10]]
    with torch.no_grad():
        teacher.transformer.wte.weight[row[0]] = math.nan
        teacher.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32))
    rows = [
        {"input_ids": [i for i in sample["input_ids"] if i != row[0]] or [1]} for sample in samples
    ]
    rows[9] = {"input_ids": row}
    with pytest.raises(TeacherCacheError, match="the teacher's outputs are NaN in sample 9 of the"):
        build_cache(teacher, rows, tmp_path / "cache", k=1, samples_per_shard=SHARD)
    with pytest.raises(TeacherCacheError, match=r"lists 1 of 4 shards: the build was not finished"):
        TeacherCache(tmp_path / "cache")


def test_nothing_of_others_is_overwritten(teacher, samples, tmp_path, copy):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TeacherCacheError, match=r"is in the way: the directory of a new cache is"):
        build_cache(teacher, samples, tmp_path, k=1)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "copy"}

    manifest = json.loads((copy / "manifest.json").read_text())
    edit_manifest(copy, shards=manifest["shards"][:2])
    before = files_in(copy)
    settings = {"k": K, "samples_per_shard": SHARD, "tokenizer": make_tokenizer("a", "b")}
    with pytest.raises(TeacherCacheError, match=r"shard-00002.parquet is in the way"):
        build_cache(teacher, samples, copy, **settings)
    assert files_in(copy) == before


def test_an_unfinished_cache_with_a_damaged_shard_is_not_gone_on_with(copy, teacher, samples):
    manifest = json.loads((copy / "manifest.json").read_text())
    edit_manifest(copy, shards=manifest["shards"][:-1])
    (copy / "shard-00003.parquet").unlink()
    edit(copy / "shard-00001.parquet", 200)
    settings = {"k": K, "samples_per_shard": SHARD, "tokenizer": make_tokenizer("a", "b")}
    with pytest.raises(TeacherCacheError, match=r"shard-00001.parquet is damaged: its SHA-256"):
        build_cache(teacher, samples, copy, **settings)


# The larger one fails in the middle of a shard, the smaller one when its file is flushed.
@pytest.mark.parametrize("k", [1, 200])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_no_shard(teacher, samples, tmp_path, monkeypatch, k):
    monkeypatch.setattr(format, "ROW_GROUP_ENTRIES", 1000)
    settings = {"k": k, "samples_per_shard": SHARD}
    build_cache(teacher, samples, tmp_path / "whole", **settings)
    output = tmp_path / "cache"

    def fill(done: int, _: int) -> None:
        # The device that is always full, in the place of the second shard's temporary.
        if done == SHARD:
            (output / "shard-00001.parquet.tmp").symlink_to("/dev/full")

    message = r"cannot write .*shard-00001.parquet.tmp: No space left on device"
    with pytest.raises(TeacherCacheError, match=message):
        build_cache(teacher, samples, output, **settings, progress=fill)
    gc.collect()
    assert [path.name for path in output.glob("*.parquet")] == ["shard-00000.parquet"]
    with pytest.raises(TeacherCacheError, match="lists 1 of 4 shards"):
        TeacherCache(output)
    (output / "shard-00001.parquet.tmp").unlink()
    build_cache(teacher, samples, output, **settings)
    assert files_in(output) == files_in(tmp_path / "whole")


def test_a_directory_that_cannot_be_written(teacher, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TeacherCacheError, match=r"cannot write .*file/cache: Not a directory"):
        build_cache(teacher, samples, tmp_path / "file" / "cache", k=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="no directory is closed to this user")
def test_a_directory_without_permission(teacher, samples, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(TeacherCacheError, match=r"cannot write .*manifest.json.tmp: Permission"):
        build_cache(teacher, samples, locked, k=1)


def test_errors_of_the_dataset_are_its_own(teacher, samples, tmp_path):
    class Broken(list):
        def __getitem__(self, i):
            if i == 20 and (tmp_path / "cache").exists():
                raise OSError("no such archive")
            return super().__getitem__(i)

    with pytest.raises(OSError, match="no such archive"):
        build_cache(teacher, Broken(samples), tmp_path / "cache", k=1)


def test_data_comes_back_as_json(teacher, samples, tmp_path):
    for _ in range(2):
        cache = build_cache(teacher, samples, tmp_path / "cache", k=1, data={"masks": (1, 2)})
    assert cache.manifest["data"] == {"masks": [1, 2]}


def test_two_builds_in_one_directory(teacher, samples, tmp_path):
    output = tmp_path / "cache"

    def build_again(*_: int) -> None:
        with pytest.raises(TeacherCacheError, match="cache is being written by another build"):
            build_cache(teacher, samples, output, k=K)

    build_cache(teacher, samples, output, k=K, progress=build_again)


# Interruptions. The script imports once and forks a process per attempt: a signal may hit anything
# but imports.

KILLER = """
import json, os, random, signal, sys, time
import torch
# A pool of threads would not survive the forks.
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_teacher_cache as cases
from kdfast.teacher_cache import build_cache

folder = sys.argv[2]
teacher, samples = cases.make_teacher(), cases.make_samples(count=40)
tokenizer = cases.make_tokenizer("a", "b")


def build(output, samples_per_shard, stop_at):
    calls = 0

    def watched(function):
        def call(*arguments, **options):
            # Before and after everything that reaches the disk for good.
            nonlocal calls
            for step in range(2):
                if calls == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                if step == 0:
                    result = function(*arguments, **options)
            return result
        return call

    os.fsync, os.replace = watched(os.fsync), watched(os.replace)
    build_cache(
        teacher,
        samples,
        output,
        draws=8,
        samples_per_shard=samples_per_shard,
        batch_size=2,
        seed=5,
        tokenizer=tokenizer,
    )


def forked(output, samples_per_shard, stop_at=None, delay=None):
    # Returns the exit status, negative for a signal.
    child = os.fork()
    if child == 0:
        build(output, samples_per_shard, stop_at)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# At every step of a build with two shards: once each, and then to the end.
assert forked(f"{folder}/steps/whole", 20) == 0
steps = []
while status := forked(f"{folder}/steps/{len(steps)}", 20, stop_at=len(steps)):
    assert forked(f"{folder}/steps/{len(steps)}", 20) == 0
    steps.append(status)

# At random moments of builds with eight, each again and again until it gets through.
start = time.perf_counter()
assert forked(f"{folder}/moments/whole", 5) == 0
duration = time.perf_counter() - start
chance, moments, builds = random.Random(0), [], 0
while len(moments) < 20:
    output = f"{folder}/moments/{builds}"
    while status := forked(output, 5, delay=chance.uniform(0, duration * 0.6)):
        moments.append(status)
    builds += 1
print(json.dumps([steps, moments]))
"""


def test_killed_builds_end_with_the_same_bytes(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    steps, moments = json.loads(result.stdout.splitlines()[-1])
    # 12 for each shard, 6 for the first manifest, the rest for the tokenizer.
    assert len(steps) >= 36
    assert len(moments) >= 20
    assert {*steps, *moments} == {-signal.SIGKILL}
    for mode in ("steps", "moments"):
        whole = files_in(tmp_path / mode / "whole")
        assert len(TeacherCache(tmp_path / mode / "whole")) == 40
        assert not any("tmp" in name for name in whole)
        folders = list((tmp_path / mode).iterdir())
        assert len(folders) > 1
        for folder in folders:
            assert files_in(folder) == whole
            TeacherCache(folder).verify()


def test_kdfast_alone_imports_no_arrow():
    script = "import sys, kdfast; sys.exit('pyarrow' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# What the teacher cannot read.


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], [3, VOCAB]], f"sample 1 of the dataset has token {VOCAB}, and the teacher has"),
        ([[1, -2, 3]], "sample 0 of the dataset has token -2"),
        (
            [[1], [1] * 65],
            r"samples 0 to 1 of the dataset, of which 1 is the longest with 65 tokens \(.*: 64\)",
        ),
    ],
)
def test_samples_that_the_teacher_cannot_read(teacher, tmp_path, rows, message):
    rows = [{"input_ids": row} for row in rows]
    with pytest.raises(ValueError, match=message):
        build_cache(teacher, rows, tmp_path / "cache", k=2)


def test_other_errors_of_the_teacher_are_its_own(tmp_path):
    class Failing(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None):
            raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match=r"^of another kind$"):
        build_cache(Failing(make_teacher().config), make_samples(), tmp_path / "cache", k=2)


def test_an_encoder_decoder_is_no_teacher_of_a_cache(samples, tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))
    with pytest.raises(ValueError, match="no encoder-decoder, got T5ForConditionalGeneration"):
        build_cache(model, samples, tmp_path / "cache", k=2)


def test_rows_are_compared_with_what_the_teacher_saw(cache, samples):
    number = next(i for i, row in enumerate(samples) if len(row["input_ids"]) > 3)
    tokens = torch.tensor([samples[number]["input_ids"]])
    positions = torch.ones_like(tokens, dtype=torch.bool)
    expected = cache.rows([number], positions)
    assert torch.equal(cache.rows([number], positions, tokens).indices, expected.indices)
    with pytest.raises(
        OtherRowsError, match=f"other tokens than the teacher saw of sample {number}"
    ):
        cache.rows([number], positions, tokens.flip(1))
    with pytest.raises(ValueError, match="input_ids must be"):
        cache.rows([number], positions, tokens[:, 1:])
