import copy
import re
from functools import partial
from pathlib import Path

import literal
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax
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
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
    default_data_collator,
)

import kdfast.trainer
from kdfast.teacher_cache import build_cache
from kdfast.trainer import (
    RECIPES,
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
    HardLabels,
    HiddenMSE,
    LogitMSE,
    Logits,
    Objective,
    TruncatedLogits,
    bilstm,
    distilbert,
    initialise_from_teacher,
    recipes,
    tinybert_general,
    tinybert_intermediate,
    tinybert_prediction,
)


@pytest.fixture
def make_trainer(tmp_path):
    return partial(trainer_of, tmp_path)


def distil(layers: int = 2) -> DistilBertForMaskedLM:
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=16,
            hidden_dim=32,
            n_layers=layers,
            n_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.3,
            dropout=0.0,
            attention_dropout=0.0,
        )
    )


def gpt2(layers: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=16,
            n_layer=layers,
            n_head=2,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def masked_rows(count: int) -> list[dict[str, Tensor]]:
    """Padded rows of which about a third of the tokens are masked, another number in each row."""
    rows = padded_rows(count, labels=True)
    for i, row in enumerate(rows):
        masked = torch.rand(LENGTH) < 0.2 + 0.05 * i
        masked[0] = True
        row["labels"] = row["labels"].masked_fill(~masked, -100)
        row["input_ids"] = row["input_ids"].masked_fill(masked, 0)
    return rows


def classified_rows(count: int) -> list[dict[str, Tensor]]:
    return [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(padded_rows(count))]


def assert_terms(found: dict[str, Tensor], **expected: Tensor) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("fuse_head", [True, False])
@pytest.mark.parametrize("restricted", [False, True])
def test_a_step_of_distilbert_is_the_literal_one(make_trainer, restricted, fuse_head):
    student, teacher = distil(), bert(16, 4)
    own = copy.deepcopy(student)
    objective = distilbert(restrict_ce_to_mask=restricted).objective
    trainer = make_trainer(student, teacher, objective, options={"fuse_head": fuse_head})
    batch = default_data_collator(masked_rows(6))
    found = gradients(trainer, batch)
    assert (trainer._step.heads is not None) == fuse_head

    ce, mlm, cos = literal.distilbert(own, teacher, batch, restrict_ce_to_mask=restricted)
    (5.0 * ce + 2.0 * mlm + 1.0 * cos).backward()
    # Reported without its weight and without T².
    assert_terms(trainer._terms, soft_loss=ce / 4, hard_loss=mlm, cosine_loss=cos)
    assert_same_gradients(found, gradients_of(own))
    assert "distilbert.embeddings.word_embeddings.weight" in found


@pytest.mark.parametrize("fuse_head", [True, False])
def test_a_step_of_distilgpt2_is_the_literal_one(make_trainer, fuse_head):
    student, teacher = gpt2(2), gpt2(4)
    own = copy.deepcopy(student)
    trainer = make_trainer(
        student, teacher, distilbert().objective, options={"fuse_head": fuse_head}
    )
    batch = default_data_collator(padded_rows(6, labels=True))
    found = gradients(trainer, batch)
    ce, clm, cos = literal.distilbert(own, teacher, batch, causal=True)
    (5.0 * ce + 2.0 * clm + 1.0 * cos).backward()
    assert_terms(trainer._terms, soft_loss=ce / 4, hard_loss=clm, cosine_loss=cos)
    assert_same_gradients(found, gradients_of(own))


def test_padding_changes_nothing_in_distilbert(make_trainer):
    trainer = make_trainer(distil(), bert(16, 4), distilbert().objective)
    rows = [row for row in masked_rows(8) if row["attention_mask"].sum() == LENGTH - 3]
    (short,) = {int(row["attention_mask"].sum()) for row in rows}
    batch = default_data_collator(rows)
    cut = {name: values[:, :short] for name, values in batch.items()}
    torch.testing.assert_close(*(gradients(trainer, b) for b in (batch, cut)), rtol=1e-4, atol=1e-6)


def test_tokens_without_a_mask_all_count(make_trainer):
    student, teacher = distil(), bert(16, 4)
    trainer = make_trainer(student, teacher, distilbert().objective)
    batch = default_data_collator(masked_rows(4))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    expected = gradients(trainer, batch)
    del batch["attention_mask"]
    assert_same_gradients(gradients(trainer, batch), expected)


def test_what_accumulated_batches_share(make_trainer):
    """Means of the labelled are the whole step's, as of one large batch; others are means of means.

    The source takes means of means for all three.
    """
    student, teacher = distil(), bert(16, 4)
    own, batches, seen = copy.deepcopy(student), [], {}
    trainer = make_trainer(
        student,
        teacher,
        distilbert().objective,
        masked_rows(8),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
    )
    compute_loss = trainer.compute_loss

    def watched(model: nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object):
        batches.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(student)))
    trainer.train()

    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    parts = [literal.distilbert(own, teacher, batch) for batch in batches]
    ce, _, cos = (torch.stack(losses).mean() for losses in zip(*parts, strict=True))
    whole_ce, mlm, whole_cos = literal.distilbert(own, teacher, whole)
    (5.0 * ce + 2.0 * mlm + 1.0 * cos).backward()
    assert_same_gradients(seen, gradients_of(own))
    logged = trainer.state.log_history[0]
    assert logged["soft_loss"] == pytest.approx(ce.item() / 4, rel=1e-5)
    assert logged["hard_loss"] == pytest.approx(mlm.item(), rel=1e-5)
    assert logged["cosine_loss"] == pytest.approx(cos.item(), rel=1e-5)
    # The rows are padded, so that the two kinds of mean differ.
    assert abs(ce - whole_ce) > 1e-3 * ce
    assert abs(cos - whole_cos) > 1e-3 * cos


@pytest.mark.parametrize("fuse_head", [True, False])
def test_a_truncated_teacher_of_all_tokens(make_trainer, fuse_head):
    student, teacher = distil(), bert(16, 4)
    own, k = copy.deepcopy(student), 5
    objective = [TruncatedLogits(0.5, k, "none", tokens="all"), HardLabels(2.0)]
    trainer = make_trainer(student, teacher, objective, options={"fuse_head": fuse_head})
    batch = default_data_collator(masked_rows(6))
    found = gradients(trainer, batch)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"].bool()
    logits = own(**inputs).logits
    with torch.no_grad():
        probs, indices = softmax(teacher(**inputs).logits[mask], -1).topk(k)
    soft = -(probs * log_softmax(logits[mask], -1).gather(-1, indices)).sum(-1).mean()
    hard = nn.CrossEntropyLoss()(logits.flatten(0, 1), batch["labels"].flatten())
    (0.5 * soft + 2.0 * hard).backward()
    entropy = -(probs * probs.log()).sum(-1).mean()
    assert_terms(trainer._terms, soft_loss=soft - entropy, hard_loss=hard)
    assert_same_gradients(found, gradients_of(own))


@pytest.mark.parametrize("fuse_head", [True, False])
def test_a_cached_teacher_of_all_tokens(make_trainer, tmp_path, fuse_head):
    student, teacher, rows = distil(), bert(16, 4), masked_rows(6)
    cache = build_cache(teacher, rows, tmp_path / "cache", k=5, temperature=2.0)
    options = {"fuse_head": fuse_head}
    found = make_trainer(
        copy.deepcopy(student),
        None,
        [Logits(1.0, 2.0, tokens="all")],
        rows,
        {**options, "teacher_cache": cache},
        max_steps=1,
        per_device_train_batch_size=6,
    )
    assert found.objective.soft.tokens == "all"
    live = [TruncatedLogits(1.0, 5, "bucket", 2.0, tokens="all")]
    expected = make_trainer(
        student, teacher, live, rows, options, max_steps=1, per_device_train_batch_size=6
    )
    logs = []
    for trainer in (found, expected):
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "soft_loss", "grad_norm"):
        # The cache has float16 probabilities.
        assert logs[0][name] == pytest.approx(logs[1][name], rel=5e-3), name


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ([LogitMSE()], "no LogitMSE with a teacher cache"),
        ([LogitMSE(), Logits()], "no LogitMSE with a teacher cache"),
        ([HiddenMSE()], "must have Logits or TruncatedLogits"),
        ([Logits(per_class=True)], "per_class must be False"),
    ],
)
def test_what_a_cache_does_not_have(make_trainer, tmp_path, objective, message):
    rows = masked_rows(2)
    cache = build_cache(bert(16, 1), rows, tmp_path / "cache", k=5)
    with pytest.raises(ValueError, match=message):
        make_trainer(distil(), None, objective, rows, {"teacher_cache": cache})


@pytest.mark.parametrize(
    ("recipe", "cls"),
    [
        (tinybert_general, BertForMaskedLM),
        (tinybert_intermediate, partial(bert, cls=BertForSequenceClassification)),
    ],
)
def test_a_step_of_tinybert_is_the_literal_one(make_trainer, recipe, cls):
    make = bert if cls is BertForMaskedLM else cls
    student, teacher = make(8, 2), make(16, 4)
    batch = default_data_collator(padded_rows(4))
    trainer = make_trainer(student, teacher, recipe().objective)
    weight, bias = student.distillation_projections["shared"]
    assert weight.shape == (16, 8)
    found = gradients(trainer, batch)

    own = copy.deepcopy(student).eval()
    fit_dense = nn.Linear(8, 16)
    with torch.no_grad():
        fit_dense.weight.copy_(weight)
        fit_dense.bias.copy_(bias)
    own.zero_grad()
    attention, hidden = literal.tinybert(own, teacher, fit_dense, batch)
    (attention + hidden).backward()

    terms = trainer._terms
    assert_terms(
        {
            "attention_loss": terms["attention_loss"],
            "rep_loss": terms["hidden_loss"] + terms["embedding_loss"],
        },
        attention_loss=attention,
        rep_loss=hidden,
    )
    expected = {n: g for n, g in gradients_of(own).items() if "projections" not in n}
    expected["distillation_projections.shared_weight"] = fit_dense.weight.grad
    expected["distillation_projections.shared_bias"] = fit_dense.bias.grad
    assert any("query" in name for name in expected)
    assert_same_gradients(found, expected)


def test_students_as_wide_as_their_teacher_have_the_projection_too(make_trainer):
    student = bert(16, 2)
    make_trainer(student, bert(16, 4), tinybert_general().objective)
    assert student.distillation_projections.names == ("shared",)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_step_of_tinyberts_prediction_is_the_literal_one(make_trainer, temperature, labelled):
    student = bert(8, 2, BertForSequenceClassification, num_labels=3)
    teacher = bert(16, 4, BertForSequenceClassification, num_labels=3)
    own = copy.deepcopy(student)
    trainer = make_trainer(student, teacher, tinybert_prediction(temperature).objective)
    batch = default_data_collator(classified_rows(6) if labelled else padded_rows(6))
    student.train()
    loss = trainer.compute_loss(student, dict(batch))
    found = gradients(trainer, batch)

    batch.pop("labels", None)
    with torch.no_grad():
        logits = teacher(**batch).logits
    expected = literal.soft_cross_entropy(own(**batch).logits, logits, temperature)
    expected.backward()
    # What remains where the student is the teacher.
    entropy = literal.soft_cross_entropy(logits, logits, temperature)
    torch.testing.assert_close(loss.detach(), (expected - entropy).detach(), rtol=1e-5, atol=1e-7)
    assert_same_gradients(found, gradients_of(own))


@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_training_a_bilstm_is_the_literal_loop(make_trainer, ce_weight):
    teacher = bert(16, 2, BertForSequenceClassification, num_labels=3)
    student = BiLSTMForSequenceClassification(
        BiLSTMConfig(
            vocab_size=VOCAB,
            embedding_size=6,
            hidden_size=5,
            classifier_size=7,
            dropout=0.0,
            embeddings="multichannel",
            num_labels=3,
        )
    )
    own, recipe, rows = copy.deepcopy(student), bilstm(ce_weight=ce_weight), classified_rows(6)
    # One batch, whose rows may come in any order.
    trainer = make_trainer(
        student,
        teacher,
        recipe.objective,
        rows,
        {"optimizer_cls_and_kwargs": recipe.optimizer},
        **{**recipe.training_arguments, "num_train_epochs": 4},
    )
    trainer.train()

    batch = default_data_collator(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = teacher(**batch).logits
    optimizer = torch.optim.Adadelta(
        [parameter for parameter in own.parameters() if parameter.requires_grad], lr=1.0, rho=0.95
    )
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = literal.bilstm(own(**batch).logits, logits, labels, ce_lambda=ce_weight)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(losses, rel=1e-4)
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(student.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_distilbert_begins_with_the_teachers_layers():
    recipe = distilbert()
    assert recipe.initialise
    assert recipe.student_config.n_layers == 6
    teacher, student = bert(16, 12), distil(6)
    initialise_from_teacher(student, teacher)
    for own, other in enumerate((0, 2, 4, 7, 9, 11)):
        torch.testing.assert_close(
            student.distilbert.transformer.layer[own].attention.q_lin.weight,
            teacher.bert.encoder.layer[other].attention.self.query.weight,
            rtol=0,
            atol=0,
        )


def test_every_recipe_is_a_public_name():
    assert {name: getattr(kdfast.trainer, name) for name in RECIPES} == RECIPES
    assert RECIPES.keys() <= set(kdfast.trainer.__all__)


@pytest.mark.parametrize("name", RECIPES)
def test_training_arguments_are_transformers_own(tmp_path, name):
    recipe = RECIPES[name]()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **recipe.training_arguments)
    for setting, value in recipe.training_arguments.items():
        assert getattr(arguments, setting) == value
    if recipe.optimizer is not None:
        optimizer, settings = recipe.optimizer
        parameters = [nn.Parameter(torch.zeros(1))]
        assert optimizer(parameters, **settings).defaults["lr"] == arguments.learning_rate
    # Nobody's changes reach the next one.
    assert RECIPES[name]().student_config is not recipe.student_config or (
        recipe.student_config is None
    )


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        # A tenth of ten steps to warm up, and then down to 0.
        (tinybert_prediction, [0.0] + [3e-5 * (10 - step) / 9 for step in range(1, 10)]),
        (tinybert_intermediate, [5e-5] * 10),
    ],
)
def test_learning_rates_of_tinybert(make_trainer, recipe, rates):
    made = recipe()
    trainer = make_trainer(
        bert(8, 1, BertForSequenceClassification),
        bert(8, 1, BertForSequenceClassification),
        made.objective,
        padded_rows(4),
        max_steps=10,
        **{**made.training_arguments, "per_device_train_batch_size": 4},
    )
    trainer.train()
    found = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(rates)
    decayed = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.01
    for name, parameter in trainer.model.named_parameters():
        # As in the source: all but biases and normalisation.
        assert (id(parameter) in decayed) == (not ("bias" in name or "LayerNorm" in name)), name


def documented_examples() -> list[str]:
    text = Path(__file__).parents[1].joinpath("docs", "recipes.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(documented_examples())))
def test_the_documented_examples_run(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    tiny = {
        "DistilBertConfig": lambda: distil(3).config,
        "_tinybert_4": lambda: bert(8, 2).config,
        "BiLSTMConfig": partial(
            BiLSTMConfig, vocab_size=VOCAB, embedding_size=4, hidden_size=4, num_labels=3
        ),
    }
    for name, small in tiny.items():
        monkeypatch.setattr(recipes, name, small)
    classifier = bert(16, 4, BertForSequenceClassification, num_labels=3)
    teacher, text = bert(16, 4), masked_rows(6)
    teacher.save_pretrained("bert")
    classifier.save_pretrained("fine-tuned")
    example = documented_examples()[number]
    given = {
        "student": bert(8, 2),
        "teacher": classifier if "sentences" in example else teacher,
        "larger": bert(24, 4),
        "text": text,
        "sentences": classified_rows(6),
        "collator": default_data_collator,
        "TrainingArguments": lambda folder, **arguments: TrainingArguments(
            folder,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **{**arguments, "max_steps": 2, "gradient_accumulation_steps": 1},
        ),
    }
    exec(compile(example, f"example {number}", "exec"), given)
    if "trainer" in given:
        assert given["trainer"].state.global_step == 2
        assert given["trainer"].state.log_history[-1]["train_loss"] > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: distilbert(temperature=0.0), ValueError, "temperature must be"),
        (lambda: distilbert(alpha_ce=-1.0), ValueError, "weight must be"),
        (lambda: distilbert(restrict_ce_to_mask="no"), TypeError, "restrict_ce_to_mask must be"),
        (lambda: distilbert(alpha_cos="1"), TypeError, "weight must be a number"),
        (lambda: tinybert_prediction(-1.0), ValueError, "temperature must be"),
        (lambda: bilstm(distill_weight=-1.0), ValueError, "distill_weight must be"),
        (lambda: bilstm(ce_weight="1"), TypeError, "ce_weight must be a number"),
        (lambda: bilstm(0.0), ValueError, "weight above 0"),
    ],
)
def test_settings_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_all_tokens_need_a_distribution_for_each(make_trainer):
    student = bert(8, 1, BertForSequenceClassification)
    teacher = bert(8, 1, BertForSequenceClassification)
    objective = Objective([distilbert().objective.soft])
    trainer = make_trainer(student, teacher, objective)
    with pytest.raises(ValueError, match="tokens='all' is for models with a distribution per tok"):
        trainer.compute_loss(student.train(), default_data_collator(classified_rows(2)))
