import copy
import logging
import math
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from training import (
    LENGTH,
    VOCAB,
    assert_same_gradients,
    bert,
    gradients,
    gradients_of,
    padded_rows,
    trainer_of,
)
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    default_data_collator,
)

from kdfast.ops.kd_loss import kd_loss
from kdfast.trainer import (
    Ensemble,
    HardLabels,
    HiddenMSE,
    LogitMSE,
    Logits,
    TruncatedLogits,
)
from kdfast.trainer import ensemble as module
from kdfast.trainer.step import logger


@pytest.fixture
def make_trainer(tmp_path):
    return partial(trainer_of, tmp_path)


def distil(width: int = 8) -> DistilBertForMaskedLM:
    """Without token types among its inputs."""
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=width,
            hidden_dim=width,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.3,
            dropout=0.0,
            attention_dropout=0.0,
        )
    )


class Table(nn.Module):
    """A teacher that says what it was given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits}


def mixture(members: list[Tensor], weights: list[float], temperature: float) -> Tensor:
    """Σ w_i · softmax(z_i / T) in float64."""
    total = sum(weights)
    return sum(
        weight / total * softmax(logits.double() / temperature, -1)
        for logits, weight in zip(members, weights, strict=True)
    )


IDS = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 3), (4, 7, 129), (3, 2, 9)])
def test_probabilities_are_averaged(monkeypatch, shape, temperature):
    # So that there are chunks, the last of them smaller.
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * shape[-1])
    members, weights = [3 * torch.randn(shape) for _ in range(3)], [1.0, 2.5, 0.5]
    ensemble = Ensemble([Table(logits) for logits in members], weights=weights)
    ensemble.temperature = temperature
    with torch.inference_mode():
        found = ensemble(**IDS)["logits"]
    expected = mixture(members, weights, temperature)
    torch.testing.assert_close(
        softmax(found.double() / temperature, -1), expected, rtol=3e-6, atol=1e-9
    )
    # Sharper than the mean of the logits would be.
    mean = sum(w * z for w, z in zip(weights, members, strict=True)) / sum(weights)
    assert not torch.allclose(softmax(mean / temperature, -1).double(), expected, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_the_members_and_no_less_than_float32(dtype):
    members = [torch.randn(4, 9).to(dtype) for _ in range(2)]
    found = Ensemble([Table(logits) for logits in members])(**IDS)["logits"]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        softmax(found.double(), -1), mixture(members, [1, 1], 1.0), rtol=tolerance, atol=0
    )


def test_impossible_for_one_and_for_all():
    first, second = torch.randn(2, 5), torch.randn(2, 5)
    first[:, 1] = second[:, 1] = first[:, 2] = -math.inf
    found = Ensemble([Table(first), Table(second)])(**IDS)["logits"]
    assert (found[:, 1] == -math.inf).all()
    torch.testing.assert_close(
        softmax(found.double(), -1), mixture([first, second], [1, 1], 1.0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("count", [1, 3])
def test_members_that_agree_are_one_teacher(count):
    logits = 5 * torch.randn(4, 9)
    ensemble = Ensemble([Table(logits) for _ in range(count)])
    ensemble.temperature = 3.0
    torch.testing.assert_close(ensemble(**IDS)["logits"], logits, rtol=1e-5, atol=1e-5)


def test_a_regression_is_averaged():
    first, second = torch.randn(4, 1), torch.randn(4, 1)
    found = Ensemble([Table(first), Table(second)], weights=[3, 1])(**IDS)["logits"]
    torch.testing.assert_close(found, 0.75 * first + 0.25 * second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_loss_is_that_of_the_mixture(divergence):
    members = [2 * torch.randn(6, 17) for _ in range(2)]
    ensemble = Ensemble([Table(logits) for logits in members], weights=[1, 3])
    ensemble.temperature = 2.0
    student = torch.randn(6, 17, requires_grad=True)
    loss = kd_loss(
        student, ensemble(**IDS)["logits"].detach(), temperature=2.0, divergence=divergence
    )
    loss.backward()
    own = student.detach().double().requires_grad_()
    p, q = mixture(members, [1, 3], 2.0), softmax(own / 2, -1)
    pair = (p, q) if divergence == "forward_kl" else (q, p)
    expected = 4 * (pair[0] * (pair[0] / pair[1]).log()).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad.double(), own.grad, rtol=1e-4, atol=1e-7)


def padded_members() -> list[nn.Module]:
    """Three families, sizes and heads; two vocabularies have padding columns."""
    roberta = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=VOCAB + 7,
            hidden_size=12,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=LENGTH + 2,
            initializer_range=0.3,
            pad_token_id=1,
        )
    )
    return [bert(16, 2, vocab_size=VOCAB + 3), roberta, distil()]


@pytest.mark.parametrize("given", ["ensemble", "members"])
def test_a_step_with_members_of_other_sizes_and_heads(make_trainer, given):
    students = distil(), distil()
    students[1].load_state_dict(students[0].state_dict())
    members = padded_members()
    teacher = Ensemble(members, vocab_size=VOCAB) if given == "ensemble" else members
    rows = padded_rows(4, labels=True)
    for row in rows:
        # Which BERT and RoBERTa take, and the student and DistilBERT do not.
        row["token_type_ids"] = torch.zeros(LENGTH, dtype=torch.int64)
    trainer = make_trainer(
        students[0],
        teacher,
        [Logits(0.7, temperature=2.0), HardLabels(0.3)],
        rows,
        {"vocab_size": VOCAB},
    )
    assert "token_type_ids" in trainer._teacher_only
    batch = default_data_collator(rows)
    found = gradients(trainer, batch)

    labels = batch.pop("labels")
    with torch.no_grad():
        logits = [
            model(
                **{k: v for k, v in batch.items() if k != "token_type_ids" or "Di" not in name}
            ).logits[..., :VOCAB]
            for model in members
            for name in [type(model).__name__]
        ]
    probs = mixture(logits, [1, 1, 1], 2.0).float()
    del batch["token_type_ids"]
    own = students[1](**batch).logits
    counted = labels != -100
    student = (own[counted] / 2).log_softmax(-1)
    soft = nn.KLDivLoss(reduction="batchmean")(student, probs[counted])
    hard = nn.CrossEntropyLoss()(own[counted], labels[counted])
    (0.7 * 4 * soft + 0.3 * hard).backward()
    torch.testing.assert_close(trainer._terms["soft_loss"], soft.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(found, gradients_of(students[1]))


def test_callables_are_in_memory_one_at_a_time(make_trainer):
    alive, most = weakref.WeakSet(), []

    def load(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        # What was there before is gone before the next one is made.
        most.append(len(alive))
        model = bert(16, 1, hidden_dropout_prob=0.5).train()
        alive.add(model)
        return model

    loaders = [partial(load, seed) for seed in range(3)]
    rows, student = padded_rows(4, labels=True), bert(8, 1)
    trainer = make_trainer(student, Ensemble(loaders), [Logits()], rows, max_steps=2)
    assert not alive
    batch = default_data_collator(rows)
    found = gradients(trainer, batch)
    assert len(most) > 3
    assert set(most) == {0}
    assert not alive

    held = Ensemble([load(seed) for seed in range(3)])
    assert_same_gradients(found, gradients(make_trainer(student, held, [Logits()]), batch))
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("wait", ["disk", "cpu"])
def test_teachers_that_wait_change_no_bit(make_trainer, tmp_path, wait):
    for number, size in enumerate([(16, 1), (12, 2)]):
        bert(*size).save_pretrained(tmp_path / str(number))

    def load(number: int) -> nn.Module:
        # What a loader draws is not missing where the student drops out.
        torch.rand(7)
        return BertForMaskedLM.from_pretrained(tmp_path / str(number))

    def step(ensemble: Ensemble) -> tuple[Tensor, dict[str, Tensor]]:
        trainer = make_trainer(copy.deepcopy(student), ensemble, [Logits(0.7), HardLabels(0.3)])
        torch.manual_seed(1)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.detach(), gradients_of(trainer.model)

    student = bert(8, 1, hidden_dropout_prob=0.3)
    batch = default_data_collator(padded_rows(4, labels=True))
    expected, gradients_expected = step(Ensemble([load(0), load(1)], weights=[1, 3]))
    members = [partial(load, i) if wait == "disk" else load(i) for i in range(2)]
    found, gradients_found = step(Ensemble(members, weights=[1, 3], offload=wait == "cpu"))
    assert torch.equal(found, expected)
    assert gradients_found.keys() == gradients_expected.keys()
    for name, gradient in gradients_expected.items():
        assert torch.equal(gradients_found[name], gradient), name


def test_callables_inputs_reach_them(make_trainer):
    """Columns that only what a callable makes would name are kept, and hidden from the student."""
    seen = []

    def load() -> nn.Module:
        model = bert(16, 1)
        model.register_forward_pre_hook(
            lambda module, positional, named: seen.append(sorted(named)), with_kwargs=True
        )
        return model

    rows = [
        {**row, "token_type_ids": torch.ones(LENGTH, dtype=torch.int64)}
        for row in padded_rows(4, labels=True)
    ]
    make_trainer(distil(), Ensemble([load]), [Logits()], rows, max_steps=1).train()
    assert seen
    assert all("token_type_ids" in names for names in seen)


def test_offloaded_members_take_turns(make_trainer, monkeypatch):
    members, moves = [bert(16, 1), bert(12, 2)], []
    for number, member in enumerate(members):
        move = member.to
        monkeypatch.setattr(
            member,
            "to",
            lambda to, number=number, move=move: moves.append((number, to)) or move(to),
        )
    ensemble = Ensemble(members, offload=True)
    # What moves the ensemble leaves them where they are.
    assert not list(ensemble.parameters())
    trainer = make_trainer(bert(8, 1), ensemble, [Logits()])
    assert not moves
    batch = default_data_collator(padded_rows(4, labels=True))
    found = gradients(trainer, batch)
    cpu = torch.device("cpu")
    # To the inputs' device and home again, each before the next.
    turns = [(number, cpu) for number in (0, 0, 1, 1)]
    assert moves[-4:] == turns
    assert moves == turns * (len(moves) // 4)
    assert not any(p.requires_grad or m.training for m in members for p in m.parameters())
    held = Ensemble(members)
    assert len(list(held.parameters())) > 0
    assert_same_gradients(found, gradients(make_trainer(trainer.model, held, [Logits()]), batch))


def test_offloaded_members_come_home_after_an_error(monkeypatch):
    member, moves = bert(8, 1), []
    monkeypatch.setattr(member, "to", lambda to: moves.append(to) or member)
    with pytest.raises(IndexError):
        Ensemble([member], offload=True)(input_ids=torch.tensor([[VOCAB]]))
    assert len(moves) == 2


def test_classifiers(make_trainer):
    gpt2 = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=8,
            n_layer=1,
            n_head=2,
            num_labels=3,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.5,
        )
    )
    teachers = [bert(16, 2, BertForSequenceClassification, num_labels=3), gpt2]
    student = bert(8, 1, BertForSequenceClassification, num_labels=3)
    own, batch = copy.deepcopy(student), default_data_collator(padded_rows(6))
    trainer = make_trainer(student, teachers, [Logits(temperature=3.0)])
    found = gradients(trainer, batch)
    with torch.no_grad():
        logits = [
            teachers[0](**batch).logits,
            gpt2(**batch, use_cache=False).logits,
        ]
    log_probs = (own(**batch).logits / 3).log_softmax(-1)
    soft = nn.KLDivLoss(reduction="batchmean")(log_probs, mixture(logits, [1, 1], 3.0).float())
    (9 * soft).backward()
    assert_same_gradients(found, gradients_of(own))


def test_question_answering(make_trainer):
    teachers = [bert(width, 1, BertForQuestionAnswering) for width in (16, 12)]
    student = bert(8, 1, BertForQuestionAnswering)
    own, batch = copy.deepcopy(student), default_data_collator(padded_rows(4))
    ends = {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.arange(2, 6)}
    found = gradients(make_trainer(student, teachers, [Logits()]), {**batch, **ends})
    losses = []
    for name in ("start_logits", "end_logits"):
        with torch.no_grad():
            probs = mixture([teacher(**batch)[name] for teacher in teachers], [1, 1], 1.0).float()
        log_probs = own(**batch)[name].log_softmax(-1)
        losses.append(nn.KLDivLoss(reduction="batchmean")(log_probs, probs))
    (sum(losses) / 2).backward()
    assert_same_gradients(found, gradients_of(own))


def test_a_truncated_ensemble_leaves_the_students_head_without_logits(make_trainer, monkeypatch):
    teachers, student = [bert(16, 1), bert(12, 2)], bert(8, 1)
    own, k = copy.deepcopy(student), 6
    objective = [TruncatedLogits(k=k, tail="bucket", temperature=2.0)]
    trainer = make_trainer(student, Ensemble(teachers, weights=[2, 1]), objective)
    batch = default_data_collator(padded_rows(4, labels=True))
    found = gradients(trainer, batch)
    assert trainer._step.heads[0] is not None
    assert trainer._step.heads[1] is None
    called, plain = [], nn.Linear.forward
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, inputs: called.append(self) or plain(self, inputs)
    )
    gradients(trainer, batch)
    assert called
    assert not any(module is student.get_output_embeddings() for module in called)
    monkeypatch.undo()

    labels = batch.pop("labels")
    counted = labels != -100
    with torch.no_grad():
        logits = [teacher(**batch).logits[counted] for teacher in teachers]
    probs, indices = mixture(logits, [2, 1], 2.0).topk(k)
    student_probs = softmax(own(**batch).logits[counted].double() / 2, -1).gather(-1, indices)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (probs, student_probs))
    (4 * (p * (p / q).log()).sum(-1).mean()).backward()
    assert_same_gradients(found, gradients_of(own), 1e-4)


def test_logits_are_built_and_it_is_said(make_trainer, caplog):
    logger.warning_once.cache_clear()
    trainer = make_trainer(bert(8, 1), [bert(16, 1), bert(12, 1)], [Logits()])
    with caplog.at_level(logging.WARNING):
        gradients(trainer, default_data_collator(padded_rows(4, labels=True)))
    assert any("teacher (Ensemble) has no output head" in r.message for r in caplog.records)


def test_the_mean_squared_error_of_logits(make_trainer):
    teachers = [bert(width, 1, BertForSequenceClassification, num_labels=3) for width in (16, 12)]
    student = bert(8, 1, BertForSequenceClassification, num_labels=3)
    batch = default_data_collator(padded_rows(4))
    for members in (teachers[:1], teachers):
        ensemble = Ensemble(members)
        own = copy.deepcopy(student)
        loss = make_trainer(own, ensemble, [LogitMSE()]).compute_loss(own.train(), dict(batch))
        with torch.no_grad():
            logits = (
                teachers[0](**batch).logits if len(members) == 1 else ensemble(**batch)["logits"]
            )
            expected = nn.MSELoss()(student(**batch).logits, logits)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)


def test_the_temperature_is_the_objectives(make_trainer):
    for terms, expected in (
        ([Logits(temperature=3.0)], 3.0),
        ([Logits(temperature=3.0, teacher_temperature=1.5)], 1.5),
        ([TruncatedLogits(temperature=2.0)], 2.0),
        ([LogitMSE()], 1.0),
    ):
        trainer = make_trainer(bert(8, 1), [bert(16, 1), bert(12, 1)], terms)
        assert trainer.teacher.temperature == expected


def test_training_from_end_to_end(make_trainer):
    rows = padded_rows(16, labels=True)
    trainer = make_trainer(
        bert(8, 1),
        [bert(16, 1), bert(12, 2)],
        [Logits(0.5, temperature=2.0), HardLabels(0.5)],
        rows,
        {"eval_dataset": rows[:6]},
        num_train_epochs=6,
        eval_strategy="epoch",
    )
    trainer.train()
    losses = [e["eval_soft_loss"] for e in trainer.state.log_history if "eval_soft_loss" in e]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]


def test_features_of_an_ensemble_are_refused(make_trainer):
    with pytest.raises(ValueError, match="an ensemble has no inside"):
        make_trainer(bert(8, 1), [bert(16, 1), bert(16, 1)], [HiddenMSE()])


def test_the_student_is_no_member(make_trainer):
    student = bert(8, 1)
    for teacher in ([student, bert(16, 1)], Ensemble([bert(16, 1), student], offload=True)):
        with pytest.raises(ValueError, match="teacher and student must be two models"):
            make_trainer(student, teacher, [Logits()])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ensemble([]), ValueError, "members must hold a teacher, got none"),
        (lambda: Ensemble(["bert"]), TypeError, "members must be models or callables, got str"),
        (lambda: Ensemble([Ensemble([bert(8, 1)])]), ValueError, "members must not be ensembles"),
        (lambda: Ensemble([lambda: "bert"]), TypeError, "must make a model, got str"),
        (lambda: Ensemble([bert(8, 1)], weights=[1, 2]), ValueError, "each of 1 members, got 2"),
        (lambda: Ensemble([bert(8, 1)], weights=[0]), ValueError, "weights must be"),
        (lambda: Ensemble([bert(8, 1)], vocab_size=0), ValueError, "vocab_size must be"),
    ],
)
def test_settings_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_members_whose_columns_differ():
    batch = default_data_collator(padded_rows(2))
    ensemble = Ensemble([bert(8, 1), bert(8, 1, vocab_size=VOCAB + 3)])
    with pytest.raises(ValueError, match="of vocabularies with padding, pass vocab_size"):
        ensemble(**batch)
