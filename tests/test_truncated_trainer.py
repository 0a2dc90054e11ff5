"""Truncated teachers in the trainer: at hand, and out of a cache."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from distributed import finish, start_two
from test_head import NothingAsLarge, assert_same_step, model_of, one_step
from test_trainer import LENGTH, VOCAB, bert, encoder_decoder, gpt2, token_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
)

from kdfast import TruncatedSoftmax, sampled_softmax, topk_kd_loss, truncated_softmax
from kdfast.teacher_cache import TeacherCache, TeacherCacheError, build_cache
from kdfast.trainer import (
    RECIPES,
    DistillationTrainer,
    HardLabels,
    Logits,
    Objective,
    TruncatedLogits,
    hinton,
    truncated,
)

K = 6
MASK = 1
# A cache's log-probs are float16.
HALF = 2e-3


def tokenizer_of(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<mask>": MASK} | {f"w{i}": i for i in range(2, vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
    )


def ragged_rows(count: int) -> list[dict[str, list[int]]]:
    """Sequences of many lengths, as a tokenizer makes them."""
    lengths = [LENGTH - i % 5 for i in range(count)]
    return [
        {"input_ids": torch.randint(2, VOCAB, (length,)).tolist(), "attention_mask": [1] * length}
        for length in lengths
    ]


def masked_rows(count: int) -> list[dict[str, Tensor]]:
    """Rows of which every third token was masked once and for all, and is a label."""
    rows = []
    for _ in range(count):
        tokens = torch.randint(2, VOCAB, (LENGTH,))
        masked = torch.arange(LENGTH) % 3 == 0
        rows.append(
            {
                "input_ids": tokens.masked_fill(masked, MASK),
                "labels": tokens.masked_fill(~masked, -100),
            }
        )
    return rows


def still_bert(width: int) -> BertForMaskedLM:
    return bert(BertForMaskedLM, width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def make_trainer(tmp_path):
    def make(
        student: nn.Module | None = None,
        teacher: nn.Module | TeacherCache | None = None,
        rows: object = None,
        objective: Objective | None = None,
        options: dict[str, object] | None = None,
        **arguments: object,
    ) -> DistillationTrainer:
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            **arguments,
        }
        name = "teacher_cache" if isinstance(teacher, TeacherCache) else "teacher"
        return DistillationTrainer(
            model=gpt2(8) if student is None else student,
            args=TrainingArguments(**arguments),
            train_dataset=rows,
            objective=objective,
            **{
                name: gpt2(16) if teacher is None else teacher,
                "data_collator": default_data_collator,
                **(options or {}),
            },
        )

    return make


@pytest.fixture
def make_cache(tmp_path):
    def make(teacher: nn.Module, rows: object, **settings: object) -> TeacherCache:
        settings = {"k": K, "samples_per_shard": 5} | settings
        folder = tmp_path / f"cache{len(list(tmp_path.glob('cache*')))}"
        return build_cache(teacher, rows, folder, **settings)

    return make


@pytest.fixture
def no_logits(monkeypatch):
    """Make the path that takes logits fail."""

    def forbid():
        def topk_kd_loss(*_, **__):
            raise AssertionError("the step took logits")

        monkeypatch.setattr("kdfast.trainer.objective.topk_kd_loss", topk_kd_loss)

    return forbid


def bucketed(k: int = K, **settings: object) -> Objective:
    return Objective([TruncatedLogits(0.7, k, **settings), HardLabels(0.3)])


def curve(trainer: DistillationTrainer, checkpoint: str | None = None) -> list[float]:
    trainer.train(resume_from_checkpoint=checkpoint)
    return [
        entry[key]
        for entry in trainer.state.log_history
        if "loss" in entry
        for key in ("loss", "soft_loss", "hard_loss", "grad_norm")
    ]


# The objective and the recipe.


def barraza(
    logits: Tensor, teacher_logits: Tensor, positions: Tensor, weights: Tensor, k: int
) -> Tensor:
    """`get_masked_lm_output` of the source, term by term, on the k largest of the teacher.

    A sequence's predictions are at its `positions` `[B, P]`, padded with 0 where `weights` are 0.
    The source adds 1e-5 to the denominator, for batches without predictions.
    """
    total = 0.0
    for sequence, (places, real) in enumerate(zip(positions, weights, strict=True)):
        for position, weight in zip(places, real, strict=True):
            p = teacher_logits[sequence, position].softmax(-1)
            top_k_probs, top_k_indices = p.topk(k)
            log_probs_student = logits[sequence, position].log_softmax(-1)
            total = total - weight * (top_k_probs * log_probs_student[top_k_indices]).sum()
    return total / weights.sum()


def test_truncated_is_the_published_formula():
    logits = torch.randn(3, 7, VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(3, 7, VOCAB, dtype=torch.float64)
    # Two predictions, one, and none; the padding's position is 0.
    positions = torch.tensor([[2, 5], [6, 0], [0, 0]])
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).double()
    labels = torch.full((3, 7), -100)
    labels[0, 2] = labels[0, 5] = labels[1, 6] = 3

    loss, terms = truncated().objective(logits, teacher, labels)
    expected = barraza(logits, teacher, positions, weights, 10)
    # Of which the student knows nothing: Σ p · log p.
    log_p = teacher[labels == 3].log_softmax(-1).topk(10).values
    constant = (log_p.exp() * log_p).sum(-1).mean()
    torch.testing.assert_close(loss, expected + constant, rtol=1e-12, atol=0)
    assert terms["soft_loss"] == loss
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad(value, logits) for value in (loss, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    assert expected_gradient.abs().max() > 1e-2


def test_truncated_with_the_rest_in_a_bucket():
    student = torch.randn(5, VOCAB, dtype=torch.float64)
    teacher = 2 * torch.randn(5, VOCAB, dtype=torch.float64)
    labels = torch.randint(VOCAB, (5,))
    recipe = RECIPES["truncated"](k=4, tail="bucket", temperature=2.0, alpha=0.8)
    expected = []
    for z, v, label in zip(student, teacher, labels, strict=True):
        p, q = (v / 2).softmax(-1), (z / 2).softmax(-1)
        p, top = p.topk(4)
        q = q[top]
        soft = (p * (p / q).log()).sum()
        soft += (1 - p.sum()) * ((1 - p.sum()) / (1 - q.sum())).log()
        expected.append(0.8 * 4 * soft - 0.2 * z.log_softmax(-1)[label])
    loss, _ = recipe.objective(student, teacher, labels)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"tail": "rest"}, "tail must be one of"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"weight": -1.0}, "weight must be"),
        ({"beta": 2.0}, "beta must be"),
        ({"divergence": "tvd"}, "divergence must be one of .* with tail='bucket'"),
        ({"tail": "none", "divergence": "jsd"}, "with tail='none', got 'jsd'"),
        ({"draws": 3}, "tail must be 'none' with draws, got 'bucket'"),
        ({"draws": 0, "tail": "none"}, "draws must be at least 1"),
        ({"proposal_temperature": 1.0}, "proposal_temperature needs draws"),
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        TruncatedLogits(**settings)


def test_an_objective_has_one_soft_term():
    with pytest.raises(ValueError, match="one of Logits and TruncatedLogits, got both"):
        Objective([Logits(), TruncatedLogits()])


def test_the_sampled_teacher_is_that_of_sampled_softmax():
    student, teacher = torch.randn(4, VOCAB), 2 * torch.randn(4, VOCAB + 3)
    soft = TruncatedLogits(tail="none", temperature=2.0, draws=5, proposal_temperature=3.0)
    torch.manual_seed(1)
    loss, _ = Objective([soft])(student, teacher, vocab_size=VOCAB)
    torch.manual_seed(1)
    sample = sampled_softmax(teacher[:, :VOCAB], 5, temperature=2.0, proposal_temperature=3.0)
    expected = 4 * topk_kd_loss(student, sample, tail="none", temperature=2.0, scale_t2=False)
    torch.testing.assert_close(loss, expected)
    # Without one of its own the proposal is the teacher, and all weights are shares of the draws.
    shares = TruncatedLogits(tail="none", temperature=2.0, draws=5).truncate(teacher).log_probs
    torch.testing.assert_close(shares.exp().sum(-1), torch.ones(4))


def test_widths_that_differ_need_a_vocabulary():
    with pytest.raises(ValueError, match="pass vocab_size"):
        Objective([TruncatedLogits(k=3)])(torch.randn(4, VOCAB), torch.randn(4, VOCAB + 1))


# A teacher at hand.


@pytest.mark.parametrize(
    ("student", "teacher"), [("gpt2", "gemma2"), ("gemma2", "llama"), ("bert", "distilbert")]
)
@pytest.mark.parametrize(
    "soft",
    [
        TruncatedLogits(2.0, K, temperature=2.0),
        TruncatedLogits(2.0, K, "none"),
        TruncatedLogits(2.0, K, "support", divergence="jsd"),
    ],
)
def test_every_gradient_is_that_of_the_logits(
    make_trainer, no_logits, monkeypatch, student, teacher, soft
):
    # The teacher's logits of 5 tokens, and so the last chunk is a rest.
    monkeypatch.setenv("KDFAST_CHUNK_BYTES", str(5 * 4 * (VOCAB + 5)))
    student, teacher = model_of(student, 8), model_of(teacher, 16, VOCAB + 5)
    batch, objective = default_data_collator(token_rows(4)), Objective([soft, HardLabels(0.5)])
    options = {"shift_labels": True}
    trainer = make_trainer(
        copy.deepcopy(student),
        teacher,
        objective=objective,
        options={**options, "fuse_head": False},
    )
    expected = one_step(trainer, batch)
    assert set(expected[0]) == {"loss", "soft_loss", "hard_loss"}
    no_logits()
    assert_same_step(
        one_step(make_trainer(student, teacher, objective=objective, options=options), batch),
        expected,
    )


def test_a_live_teachers_loss_is_literal(make_trainer):
    trainer = make_trainer(objective=truncated(K, "bucket", 2.0, 0.7).objective)
    batch = default_data_collator(token_rows(4))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    with torch.no_grad():
        z, v = (
            model(input_ids=batch["input_ids"]).logits[:, :-1].double()
            for model in (trainer.model, trainer.teacher)
        )
    p, q = (v / 2).softmax(-1), (z / 2).softmax(-1)
    p, top = p.topk(K)
    q = q.gather(-1, top)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    labels = batch["labels"][:, 1:]
    hard = nn.functional.cross_entropy(z.mT, labels, reduction="none")
    token = 0.7 * 4 * (p * (p / q).log()).sum(-1) + 0.3 * hard
    assert loss.item() == pytest.approx(token[labels != -100].mean().item(), rel=1e-5)


def test_a_sampled_teacher_without_logits(make_trainer, no_logits):
    # Every position counts: both paths draw the same random numbers.
    student, teacher = still_bert(8), still_bert(16)
    batch = default_data_collator(token_rows(4, ignored=False))
    objective = Objective([TruncatedLogits(tail="none", draws=5), HardLabels()])
    expected = one_step(
        make_trainer(
            copy.deepcopy(student), teacher, objective=objective, options={"fuse_head": False}
        ),
        batch,
    )
    no_logits()
    assert_same_step(one_step(make_trainer(student, teacher, objective=objective), batch), expected)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_no_step_allocates_logits_of_a_live_teacher(make_trainer, monkeypatch, family):
    vocab_size, rows = 499, token_rows(4, ignored=False)
    monkeypatch.setenv("KDFAST_CHUNK_BYTES", str(8 * 4 * vocab_size))
    student, teacher = (model_of(family, width, vocab_size) for width in (8, 16))
    trainer = make_trainer(student, teacher, objective=bucketed())
    trainer.model.train()
    with NothingAsLarge(len(rows) * LENGTH * vocab_size):
        trainer.compute_loss(trainer.model, default_data_collator(rows)).backward()


@pytest.mark.parametrize("fuse_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(make_trainer, dtype, fuse_head):
    student, teacher = model_of("gemma2", 8), model_of("cohere", 16)
    batch, options = default_data_collator(token_rows(4)), {"fuse_head": fuse_head}
    exact, _ = one_step(make_trainer(student, teacher, objective=bucketed()), batch)
    half = make_trainer(
        copy.deepcopy(student).to(dtype),
        copy.deepcopy(teacher).to(dtype),
        objective=bucketed(),
        options=options,
    )
    losses, gradients = one_step(half, batch)
    torch.testing.assert_close(losses["loss"], exact["loss"], rtol=0.05, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if dtype == torch.bfloat16:
        mixed = make_trainer(student, teacher, objective=bucketed(), options=options, bf16=True)
        with mixed.compute_loss_context_manager():
            losses, _ = one_step(mixed, batch)
        torch.testing.assert_close(losses["loss"], exact["loss"], rtol=0.05, atol=0)


# A teacher out of a cache.


@pytest.mark.parametrize("fuse_head", [True, False])
@pytest.mark.parametrize("family", ["causal", "masked"])
def test_a_cache_trains_as_its_teacher(
    make_trainer, make_cache, no_logits, monkeypatch, family, fuse_head
):
    if family == "causal":
        student, teacher, rows = gpt2(8), gpt2(16), token_rows(64)
    else:
        student, teacher, rows = still_bert(8), still_bert(16), masked_rows(64)
    cache = make_cache(teacher, rows)
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2, "options": {}}
    expected = curve(make_trainer(copy.deepcopy(student), teacher, rows, bucketed(), **settings))
    assert len(expected) == 32
    assert expected[-4] < 0.9 * expected[0]
    monkeypatch.setattr(type(teacher), "forward", student_alone(type(teacher).forward))
    if fuse_head:
        no_logits()
    trainer = make_trainer(
        student,
        cache,
        rows,
        bucketed(),
        **settings | {"options": {"fuse_head": fuse_head}},
        # Prefetched by workers, in another order than the dataset's.
        dataloader_num_workers=2,
    )
    assert trainer.teacher is None
    assert curve(trainer) == pytest.approx(expected, rel=HALF)


def student_alone(forward: Callable) -> Callable:
    """A forward that fails for a teacher, which no training from a cache may run."""

    def checked(self: nn.Module, *args: object, **kwargs: object):
        assert self.config.hidden_size == 8
        return forward(self, *args, **kwargs)

    # Trainer reads its signature.
    checked.__wrapped__ = forward
    return checked


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["padding", "causal", "seq2seq"])
def test_every_batch_has_the_rows_of_its_samples(make_trainer, make_cache, kind, side, workers):
    teacher, rows = gpt2(16), ragged_rows(18)
    tokenizer = tokenizer_of()
    tokenizer.padding_side = side
    collator = {
        "padding": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=16),
        "causal": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
    }[kind]
    if kind == "seq2seq":
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
    dataset = Dataset.from_list([{**row, "text": "dropped"} for row in rows])
    trainer = make_trainer(
        teacher=make_cache(teacher, rows),
        rows=dataset,
        objective=bucketed(),
        options={"data_collator": collator},
        dataloader_num_workers=workers,
    )
    seen = []
    for batch in trainer.get_train_dataloader():
        assert "teacher_sample" not in batch
        top = TruncatedSoftmax(batch["teacher_log_probs"], batch["teacher_indices"])
        for i, positions in enumerate(batch["attention_mask"].bool()):
            tokens = batch["input_ids"][i, positions]
            seen.append(tokens.tolist())
            with torch.no_grad():
                expected = truncated_softmax(teacher.eval()(tokens[None]).logits[0], K)
            # Rounding to float16 can swap neighbours, but not their probabilities.
            torch.testing.assert_close(
                top.log_probs[i, positions], expected.log_probs, rtol=HALF, atol=HALF
            )
            assert (top.indices[i, positions] == expected.indices).float().mean() > 0.95
            assert (top.indices[i, ~positions] == -1).all()
            assert (top.log_probs[i, ~positions] == -torch.inf).all()
    assert sorted(seen) == sorted(row["input_ids"] for row in rows)
    assert seen != [row["input_ids"] for row in rows]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tail", ["bucket", "support"])
def test_padding_does_not_change_the_loss(make_trainer, make_cache, side, tail):
    rows, tokenizer = ragged_rows(3), tokenizer_of()
    tokenizer.padding_side = side
    # Nobody knows what the teacher says where the padding stands, not even of a label behind it.
    padding = -100 if side == "right" else 5
    trainer = make_trainer(
        model_of("llama", 8),
        make_cache(gpt2(16), rows),
        [{**row, "labels": row["input_ids"]} for row in rows],
        bucketed(tail=tail),
        {"data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=padding)},
    )
    model, collate = trainer.model.eval(), trainer.data_collator

    def loss(rows: list[dict]) -> Tensor:
        # Positions count from the first real token on, on whichever side the padding stands.
        batch = collate(rows)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1))

    rows = list(trainer.train_dataset)
    together, alone = loss(rows), sum(loss([row]) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_the_divisor_counts_what_has_a_teacher(make_trainer, make_cache):
    rows, tokenizer = ragged_rows(3), tokenizer_of()
    tokenizer.padding_side = "left"
    trainer = make_trainer(
        teacher=make_cache(gpt2(16), rows),
        rows=rows,
        objective=bucketed(),
        options={"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)},
    )
    batch = trainer.data_collator(trainer.train_dataset)
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    # The first token of each row is predicted from padding, or from nothing.
    assert count == sum(len(row["input_ids"]) - 1 for row in rows)


@pytest.mark.parametrize("fuse_head", [True, False])
def test_accumulated_gradients_equal_those_of_one_batch(make_trainer, make_cache, fuse_head):
    rows, student, teacher = token_rows(8), gpt2(8), gpt2(16)
    cache = make_cache(teacher, rows)
    curves = [
        curve(
            make_trainer(
                copy.deepcopy(student),
                cache,
                rows,
                bucketed(),
                {"fuse_head": fuse_head},
                max_steps=1,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
            )
        )
        for accumulation in (1, 4)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_resumed_training_gives_the_same_student(make_trainer, make_cache, tmp_path):
    rows, student = token_rows(24), gpt2(8, dropout=0.1)
    cache = make_cache(gpt2(16), rows)

    def trainer(name: str, student: nn.Module) -> DistillationTrainer:
        return make_trainer(
            student,
            TeacherCache(cache.directory),
            rows,
            bucketed(),
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
            output_dir=str(tmp_path / name),
        )

    whole = trainer("whole", student)
    resumed = trainer("resumed", gpt2(8, dropout=0.1))
    expected = curve(whole)
    assert curve(resumed, str(tmp_path / "whole" / "checkpoint-4")) == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_fewer_entries_than_the_cache_has_are_the_largest(make_trainer, make_cache):
    rows, student, teacher = token_rows(8), gpt2(8), gpt2(16)
    curves = [
        curve(
            make_trainer(
                copy.deepcopy(student),
                make_cache(teacher, rows, k=k),
                rows,
                bucketed(2),
                max_steps=2,
            )
        )
        for k in (2, 9)
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("fuse_head", [True, False])
def test_a_sampled_cache(make_trainer, make_cache, caplog, fuse_head):
    rows, student, teacher = token_rows(8), gpt2(8), gpt2(16)
    cache = make_cache(teacher, rows, k=None, draws=9, temperature=2.0)
    soft = TruncatedLogits(0.5, tail="none", temperature=2.0, draws=9)
    curves = [
        curve(
            make_trainer(
                copy.deepcopy(student),
                cache,
                rows,
                objective,
                {"fuse_head": fuse_head},
                max_steps=2,
            )
        )
        for objective in (Objective([soft, HardLabels(0.5)]), hinton().objective)
    ]
    assert curves[0] == curves[1]
    # A batch's soft loss out of the samples themselves.
    trainer = make_trainer(student, cache, rows, Objective([soft]), {"fuse_head": fuse_head})
    batch = trainer.data_collator(trainer.train_dataset)
    logits = student.train()(input_ids=batch["input_ids"]).logits
    sample = cache.rows(range(8), torch.ones(8, LENGTH, dtype=torch.bool))
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = topk_kd_loss(logits, sample, labels, tail="none", temperature=2.0)
    loss = trainer.compute_loss(student, batch)
    torch.testing.assert_close(loss, 0.5 * expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "soft", [Logits(0.6, 2.0), Logits(divergence="reverse_kl"), Logits(divergence="jsd", beta=0.3)]
)
def test_logits_become_truncated_and_it_is_said(make_trainer, make_cache, caplog, soft):
    rows, student, teacher = token_rows(8), gpt2(8), gpt2(16)
    cache = make_cache(teacher, rows, temperature=soft.temperature)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(copy.deepcopy(student), cache, rows, Objective([soft]), max_steps=2)
    said = [record.message for record in caplog.records if "is trained as" in record.message]
    own = TruncatedLogits(
        soft.weight,
        K,
        temperature=soft.temperature,
        divergence=soft.divergence,
        beta=soft.beta,
    )
    assert trainer.objective == Objective([own])
    assert len(said) == 1
    assert "tail='bucket'" in said[0]
    # The teacher itself, truncated as the cache is.
    expected = curve_of_soft(make_trainer(student, teacher, rows, Objective([own]), max_steps=2))
    assert curve_of_soft(trainer) == pytest.approx(expected, rel=HALF)


def curve_of_soft(trainer: DistillationTrainer) -> list[float]:
    trainer.train()
    return [entry["soft_loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_evaluation_with_what_the_cache_holds(make_trainer, make_cache):
    rows, teacher = token_rows(20), gpt2(16)
    parts = {"first": rows[8:14], "second": rows[14:]}
    student = gpt2(8)
    cache = make_cache(teacher, rows)
    trainers = [
        make_trainer(student, source, rows[:8], bucketed(), {"eval_dataset": parts})
        for source in (teacher, cache)
    ]
    for name in parts:
        expected, metrics = (trainer.evaluate()[f"eval_{name}_loss"] for trainer in trainers)
        assert metrics == pytest.approx(expected, rel=HALF)
    metrics = trainers[1].evaluate(trainers[1].eval_dataset["second"])
    assert metrics["eval_loss"] == pytest.approx(
        0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"], rel=1e-5
    )


def test_evaluation_with_what_it_does_not_hold(make_trainer, make_cache, caplog):
    rows, others = token_rows(8), token_rows(6)
    student, shapes = gpt2(8), []

    def compute_metrics(prediction: object) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            student,
            make_cache(gpt2(16), rows),
            rows,
            bucketed(),
            {"eval_dataset": others, "compute_metrics": compute_metrics},
        )
    assert any("hard loss alone" in record.message for record in caplog.records)
    metrics = trainer.evaluate()
    # Batches weigh as their samples do, whatever they count.
    own = [student.eval()(**default_data_collator(part)).loss for part in (others[:4], others[4:])]
    expected = (4 * own[0] + 2 * own[1]).item() / 6
    assert metrics["eval_hard_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == metrics["eval_hard_loss"]
    assert "eval_soft_loss" not in metrics
    assert shapes == [(6, LENGTH, VOCAB)]


def test_prediction_without_labels(make_trainer, make_cache):
    rows = [{"input_ids": row["input_ids"]} for row in token_rows(6)]
    trainer = make_trainer(teacher=make_cache(gpt2(16), rows), rows=rows, objective=bucketed())
    predictions = trainer.predict(trainer.train_dataset).predictions
    with torch.no_grad():
        expected = trainer.model.eval()(torch.stack([row["input_ids"] for row in rows])).logits
    torch.testing.assert_close(torch.from_numpy(predictions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({}, bucketed(temperature=2.0), "temperature must be the teacher cache's, 1, got 2"),
        ({}, bucketed(K + 1), f"k must be at most the teacher cache's, {K}, got {K + 1}"),
        ({}, bucketed(tail="none", draws=K), "draws must be None"),
        ({"k": None, "draws": 4}, bucketed(), "draws must be 4"),
        ({"k": None, "draws": 4}, bucketed(tail="none", draws=5), "draws must be 4"),
        ({}, Objective([Logits(divergence="tvd")]), "of the largest entries, got 'tvd'"),
        (
            {"k": None, "draws": 4},
            Objective([Logits(divergence="jsd")]),
            "of sampled entries, got 'jsd'",
        ),
        ({}, Objective([Logits(teacher_temperature=2.0)]), "teacher_temperature must be"),
    ],
)
def test_objectives_that_a_cache_does_not_fit(
    make_trainer, make_cache, settings, objective, message
):
    rows = token_rows(3)
    cache = make_cache(gpt2(16), rows, **settings)
    with pytest.raises(ValueError, match=message):
        make_trainer(teacher=cache, rows=rows, objective=objective)


def test_one_teacher_or_its_cache(make_trainer, make_cache):
    rows = token_rows(3)
    cache = make_cache(gpt2(16), rows)
    with pytest.raises(ValueError, match=r"exactly one of teacher and teacher_cache .* both"):
        make_trainer(teacher=cache, rows=rows, options={"teacher": gpt2(16)})
    with pytest.raises(ValueError, match="neither"):
        make_trainer(options={"teacher": None})
    with pytest.raises(TypeError, match="must be a TeacherCache, got str"):
        make_trainer(options={"teacher": None, "teacher_cache": str(cache.directory)})


def test_other_data_than_the_cached(make_trainer, make_cache):
    rows = token_rows(6)
    cache = make_cache(gpt2(16), rows)
    with pytest.raises(TeacherCacheError, match="other tokens than row 0"):
        make_trainer(teacher=cache, rows=rows[::-1], objective=bucketed())
    trainer = make_trainer(teacher=cache, objective=bucketed())
    batch = trainer.data_collator(rows)
    with pytest.raises(ValueError, match="nothing of the teacher cache"):
        trainer.compute_loss(trainer.model.train(), batch)


@pytest.mark.parametrize(
    "kind", ["another cache", "a hand-made column", "tokens changed behind attach", "too many"]
)
def test_rows_that_are_not_those_they_claim_to_be(make_trainer, make_cache, kind):
    rows = [{name: value.tolist() for name, value in row.items()} for row in token_rows(6)]
    rows = Dataset.from_list(rows)
    cache = make_cache(gpt2(16), rows)
    if kind == "another cache":
        # Of the same rows in another order.
        attached = cache.attach(rows).select([3, 0, 1, 2, 5, 4])
        cache = make_cache(gpt2(16), attached.remove_columns("teacher_sample"))
    elif kind == "a hand-made column":
        attached = rows.add_column("teacher_sample", [5, 4, 3, 2, 1, 0])
    elif kind == "too many":
        attached = rows.add_column("teacher_sample", range(6, 12))
    else:
        attached = cache.attach(rows).map(lambda row: {"input_ids": row["input_ids"][::-1]})
    trainer = make_trainer(teacher=cache, rows=attached, objective=bucketed(), max_steps=1)
    with pytest.raises(TeacherCacheError, match="teacher_sample must come from this cache's atta"):
        trainer.train()


def test_an_encoder_decoder_has_no_cache(make_trainer, make_cache):
    rows = token_rows(4)
    student = encoder_decoder("t5")
    with pytest.raises(
        ValueError, match=r"\(T5ForConditionalGeneration\) predicts those of its dec"
    ):
        make_trainer(student, make_cache(gpt2(16), rows), rows, bucketed())


def test_without_an_objective_the_temperature_is_the_caches(make_trainer, make_cache):
    rows = token_rows(4)
    trainer = make_trainer(teacher=make_cache(gpt2(16), rows, temperature=3.0), rows=rows)
    assert trainer.objective == Objective(
        [TruncatedLogits(0.5, K, temperature=3.0), HardLabels(0.5)]
    )


def test_collators_that_change_the_tokens(make_trainer, make_cache):
    rows, tokenizer = ragged_rows(6), tokenizer_of()
    cache = make_cache(still_bert(16), rows)

    def trainer(collator: object) -> DistillationTrainer:
        return make_trainer(still_bert(8), cache, rows, bucketed(), {"data_collator": collator})

    with pytest.raises(ValueError, match="mlm=True"):
        trainer(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5))

    # Not recognised by what it is, but by what it does.
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9)
    collator = trainer(lambda rows: masking(rows)).data_collator
    with pytest.raises(ValueError, match="other tokens than the teacher saw of sample 0"):
        collator(trainer(default_data_collator).train_dataset)

    def flattening(rows: list[dict]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[id for row in rows for id in row["input_ids"]]])}

    with pytest.raises(ValueError, match="a batch must be \\[6 samples, positions\\]"):
        trainer(flattening).data_collator(trainer(default_data_collator).train_dataset)


def test_a_cache_is_of_tokens(make_trainer, make_cache):
    rows = [{**row, "labels": torch.tensor(1)} for row in token_rows(4)]
    trainer = make_trainer(teacher=make_cache(gpt2(16), rows), rows=rows, objective=bucketed())
    with pytest.raises(ValueError, match=r"labels must be \(4, 12\), got \(4,\)"):
        trainer.data_collator(trainer.train_dataset)


def test_vocabularies_of_student_and_cache(make_trainer, make_cache, caplog):
    rows, student, teacher = token_rows(4), gpt2(8), gpt2(16)
    cache = make_cache(teacher, rows)
    with pytest.raises(ValueError, match=f"the teacher cache's, {VOCAB}, got {VOCAB - 1}"):
        make_trainer(teacher=cache, rows=rows, objective=bucketed(), options={"vocab_size": 36})
    # Columns beyond the cache's are padding.
    wide = gpt2(8, VOCAB + 5)
    wide.load_state_dict(
        {
            name: nn.functional.pad(value, (0, 0, 0, 5), value=0.3)
            if value.shape[0] == VOCAB
            else value
            for name, value in student.state_dict().items()
        }
    )
    curves = []
    for model in (student, wide):
        for fuse_head in (True, False):
            options = {"fuse_head": fuse_head}
            trainer = make_trainer(
                copy.deepcopy(model), cache, rows, bucketed(), options, max_steps=1
            )
            curves.append(curve(trainer))
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-5)
    for row in rows:
        row["input_ids"].clamp_(max=VOCAB - 2)
    narrow = make_trainer(gpt2(8, VOCAB - 1), make_cache(teacher, rows), rows, bucketed())
    with pytest.raises(ValueError, match="vocab_size must be"):
        narrow.compute_loss(narrow.model, narrow.data_collator(narrow.train_dataset))


def test_another_tokenizer(make_trainer, make_cache):
    rows, tokenizer = token_rows(4), tokenizer_of()
    cache = make_cache(gpt2(16), rows, tokenizer=tokenizer)
    make_trainer(
        teacher=cache, rows=rows, objective=bucketed(), options={"processing_class": tokenizer}
    )
    with pytest.raises(TeacherCacheError, match="of another tokenizer"):
        make_trainer(
            teacher=cache,
            rows=rows,
            objective=bucketed(),
            options={"processing_class": tokenizer_of(VOCAB - 1)},
        )


ONE_OF_TWO_PROCESSES = """
import sys
import torch
from transformers import GPT2LMHeadModel, TrainingArguments, default_data_collator
from kdfast.teacher_cache import TeacherCache
from kdfast.trainer import DistillationTrainer, HardLabels, Objective, TruncatedLogits

folder = sys.argv[1]
rows = torch.load(f"{folder}/rows.pt")
trainer = DistillationTrainer(
    model=GPT2LMHeadModel.from_pretrained(f"{folder}/student"),
    teacher_cache=TeacherCache(sys.argv[2]),
    objective=Objective([TruncatedLogits(0.7, int(sys.argv[3])), HardLabels(0.3)]),
    args=TrainingArguments(
        f"{folder}/out",
        use_cpu=True,
        save_strategy="no",
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=4,
    ),
    data_collator=default_data_collator,
    train_dataset=rows,
)
trainer.train()
if trainer.is_world_process_zero():
    torch.save(trainer.state.log_history, f"{folder}/log.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_with_one(make_trainer, make_cache, tmp_path):
    student, rows = gpt2(8), token_rows(16)
    cache = make_cache(gpt2(16), rows)
    student.save_pretrained(tmp_path / "student")
    torch.save(rows, tmp_path / "rows.pt")
    processes = start_two(ONE_OF_TWO_PROCESSES, tmp_path, str(cache.directory), str(K))
    one = make_trainer(student, cache, rows, bucketed(), max_steps=2, per_device_train_batch_size=8)
    one.train()
    finish(processes)
    two = torch.load(tmp_path / "log.pt")
    for step in range(2):
        for key in ("loss", "soft_loss", "hard_loss", "grad_norm"):
            expected = one.state.log_history[step][key]
            assert two[step][key] == pytest.approx(expected, rel=1e-4)
