import copy
import logging
import math

import pytest
import torch
from distributed import finish, start_two
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    default_data_collator,
)

from kdfast.trainer import DistillationTrainer, Ensemble, HardLabels, Logits, Objective, hinton

VOCAB = 37
LENGTH = 12


def gpt2(width: int, vocab_size: int = VOCAB, dropout: float = 0.0) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=LENGTH,
            n_embd=width,
            n_layer=1,
            n_head=2,
            # Far from the default's nearly uniform predictions, so that teacher and student differ.
            initializer_range=0.5,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert(cls: type, width: int, **settings: object) -> torch.nn.Module:
    return cls(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.5,
            **settings,
        )
    )


def encoder_decoder(family: str, start: int = 0) -> torch.nn.Module:
    tokens = {"vocab_size": VOCAB, "decoder_start_token_id": start, "pad_token_id": 0}
    if family == "t5":
        config = T5Config(
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            initializer_factor=5.0,
            **tokens,
        )
        return T5ForConditionalGeneration(config)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 8))
    }
    config = BartConfig(d_model=8, max_position_embeddings=64, dropout=0.0, init_std=0.5, **sides)
    config.update({**tokens, "forced_eos_token_id": None})
    return BartForConditionalGeneration(config)


def token_rows(count: int, *, ignored: bool = True) -> list[dict[str, Tensor]]:
    """Sequences of which row i counts fewer tokens than row i − 1: batches weigh differently."""
    rows = []
    for i in range(count):
        tokens = torch.randint(1, VOCAB, (LENGTH,))
        labels = tokens.clone()
        if ignored:
            labels[LENGTH - i % (LENGTH - 2) :] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


@pytest.fixture
def make_trainer(tmp_path):
    def make(student=None, teacher=None, rows=(), objective=None, options=None, **arguments):
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "disable_tqdm": True,
            "log_level": "error",
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            **arguments,
        }
        return DistillationTrainer(
            model=gpt2(8) if student is None else student,
            args=TrainingArguments(**arguments),
            train_dataset=rows or None,
            teacher=gpt2(16) if teacher is None else teacher,
            objective=objective,
            **{"data_collator": default_data_collator, **(options or {})},
        )

    return make


def step_gradients(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """The gradients that the first optimiser step sees."""
    gradients = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for name, parameter in trainer.model.named_parameters():
            gradients.setdefault(name, parameter.grad.clone())

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients


def literal_hinton(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Section 2 of the paper, term by term: p_i = exp(v_i / T) / Σ exp(v_j / T) and so on.

    The soft cross entropy less the teacher's entropy, which the paper's formula lacks and no
    gradient sees: their difference is the KL that kdfast reports.
    """
    losses = []
    for z, v, label in zip(
        student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), labels.flatten(), strict=True
    ):
        if label == -100:
            continue
        soft_teacher = (v / temperature).exp() / (v / temperature).exp().sum()
        soft_student = (z / temperature).exp() / (z / temperature).exp().sum()
        cross_entropy = -(soft_teacher * soft_student.log()).sum()
        entropy = -(soft_teacher * soft_teacher.log()).sum()
        hard = -(z.exp() / z.exp().sum())[label].log()
        losses.append(alpha * temperature**2 * (cross_entropy - entropy) + (1 - alpha) * hard)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.0, 0.5), (4.0, 0.9), (2.0, 1.0)])
def test_hinton_is_the_published_formula(temperature, alpha):
    student = torch.randn(3, 5, VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, VOCAB, dtype=torch.float64)
    labels = torch.randint(VOCAB, (3, 5))
    labels[0, 2:] = -100
    loss, _ = hinton(temperature, alpha).objective(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = literal_hinton(student, teacher, labels, temperature, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, student)[0], rtol=1e-10, atol=1e-14
    )


def test_weights_need_not_sum_to_one():
    student, teacher = torch.randn(4, VOCAB).double(), torch.randn(4, VOCAB).double()
    labels = torch.randint(VOCAB, (4,))
    total, terms = Objective([HardLabels(0.5), Logits(3.0, temperature=2.0)])(
        student, teacher, labels
    )
    expected = 3.0 * 4.0 * terms["soft_loss"] + 0.5 * terms["hard_loss"]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([HardLabels()], "nothing comes from the teacher"),
        ([Logits(), Logits()], "at most one Logits, got 2"),
        ([Logits(0.0), HardLabels(0.0)], "weight above 0"),
    ],
)
def test_an_objective_says_what_it_lacks(terms, message):
    with pytest.raises(ValueError, match=message):
        Objective(terms)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"alpha": 1.5}, {"divergence": "kl"}, {"temperature": -1}]
)
def test_hinton_refuses_settings_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        hinton(**settings)


def test_causal_loss_predicts_the_next_token(make_trainer):
    trainer = make_trainer(objective=hinton(3.0, 0.7).objective)
    batch = default_data_collator(token_rows(6))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    with torch.no_grad():
        student = trainer.model(input_ids=batch["input_ids"]).logits.double()
        teacher = trainer.teacher(input_ids=batch["input_ids"]).logits.double()
    expected = literal_hinton(student[:, :-1], teacher[:, :-1], batch["labels"][:, 1:], 3.0, 0.7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_accumulated_gradients_equal_those_of_one_batch(make_trainer):
    rows, student, teacher = token_rows(8), gpt2(8), gpt2(16)
    gradients = [
        step_gradients(
            make_trainer(
                copy.deepcopy(student),
                teacher,
                rows,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
            )
        )
        for accumulation in (1, 4)
    ]
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-4, atol=1e-6)


def test_accumulated_logs_equal_those_of_one_batch(make_trainer):
    rows, student, teacher = token_rows(8), gpt2(8), gpt2(16)
    logs = []
    for accumulation in (1, 4):
        trainer = make_trainer(
            copy.deepcopy(student),
            teacher,
            rows,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for key in ("loss", "soft_loss", "hard_loss"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-5)


def test_every_term_is_logged_and_adds_up(make_trainer):
    rows = token_rows(10)
    trainer = make_trainer(
        rows=rows,
        objective=hinton(2.0, 0.25).objective,
        options={"eval_dataset": rows[:6]},
        num_train_epochs=2,
        logging_steps=2,
        eval_strategy="epoch",
    )
    trainer.train()
    history = trainer.state.log_history
    trained = [entry for entry in history if "loss" in entry]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in trained] == [2, 4, 6]
    assert len(evaluated) == 2
    for entries, prefix in ((trained, ""), (evaluated, "eval_")):
        for entry in entries:
            soft, hard = entry[f"{prefix}soft_loss"], entry[f"{prefix}hard_loss"]
            assert entry[f"{prefix}loss"] == pytest.approx(0.25 * 4 * soft + 0.75 * hard, rel=1e-5)
    summary = next(entry for entry in history if "train_loss" in entry)
    assert "soft_loss" not in summary


def test_evaluation_returns_logits_and_labels_to_the_metrics(make_trainer):
    rows = token_rows(6)
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"ones": 1.0}

    trainer = make_trainer(options={"compute_metrics": compute_metrics})
    metrics = trainer.evaluate(rows)
    assert seen["shapes"] == ((6, LENGTH, VOCAB), (6, LENGTH))
    assert metrics["eval_ones"] == 1.0
    prediction = trainer.predict(rows)
    assert prediction.metrics["test_hard_loss"] == pytest.approx(metrics["eval_hard_loss"])


def test_hard_loss_is_what_the_student_computes_by_itself(make_trainer):
    rows = token_rows(4)
    trainer = make_trainer()
    own = trainer.model.eval()(**default_data_collator(rows)).loss.item()
    assert trainer.evaluate(rows)["eval_hard_loss"] == pytest.approx(own, rel=1e-5)


def test_the_teacher_is_left_as_it_was(make_trainer, tmp_path):
    teacher = gpt2(16, dropout=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(
        teacher=teacher, rows=token_rows(8), num_train_epochs=1, save_strategy="epoch"
    )
    modes = []
    teacher.register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_inference_mode_enabled()))
    )
    trainer.train()
    # Twice for the two steps, and before that its output head is tried.
    assert len(modes) > 2
    assert set(modes) == {(False, True)}
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert saved.config.n_embd == 8
    weights = list((tmp_path / "out" / "checkpoint-2").glob("*.safetensors"))
    assert len(weights) == 1


def test_resumed_training_gives_the_same_student(make_trainer, tmp_path):
    rows, student, teacher = token_rows(24), gpt2(8, dropout=0.1), gpt2(16)

    def arguments(name: str) -> dict[str, object]:
        return {"output_dir": str(tmp_path / name), "save_strategy": "steps", "save_steps": 4}

    whole = make_trainer(copy.deepcopy(student), teacher, rows, max_steps=8, **arguments("whole"))
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = make_trainer(gpt2(8, dropout=0.1), teacher, rows, max_steps=8, **arguments("resumed"))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 8
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    logs = [
        {
            entry["step"]: entry["soft_loss"]
            for entry in trainer.state.log_history
            if "loss" in entry
        }
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def test_ignored_tokens_count_for_nothing(make_trainer):
    trainer = make_trainer()
    rows = token_rows(3, ignored=False)
    for row in rows:
        row["labels"][LENGTH // 2 :] = -100
    batch = default_data_collator(rows)
    short = {"input_ids": batch["input_ids"][:, : LENGTH // 2]}
    short["labels"] = short["input_ids"]
    model = trainer.model.eval()
    assert trainer.compute_loss(model, batch).item() == pytest.approx(
        trainer.compute_loss(model, short).item(), rel=1e-5
    )
    loss = trainer.compute_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    loss.backward()
    assert loss.item() == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_padding_does_not_change_the_loss(make_trainer):
    trainer = make_trainer()
    rows = token_rows(3, ignored=False)
    batch = default_data_collator(rows)
    padded = {key: torch.nn.functional.pad(value, (0, 4)) for key, value in batch.items()}
    padded["labels"][:, LENGTH:] = -100
    batch, padded = (
        {**inputs, "position_ids": torch.arange(n).clamp(max=LENGTH - 1).expand(3, n)}
        for inputs, n in ((batch, LENGTH), (padded, LENGTH + 4))
    )
    model = trainer.model.eval()
    assert trainer.compute_loss(model, padded).item() == pytest.approx(
        trainer.compute_loss(model, batch).item(), rel=1e-5
    )


def test_masked_language_model(make_trainer):
    trainer = make_trainer(
        bert(BertForMaskedLM, 8), bert(BertForMaskedLM, 16), objective=hinton(2.0, 0.5).objective
    )
    assert not trainer.shift_labels
    batch = default_data_collator(token_rows(3))
    batch["labels"][:, ::2] = -100
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    with torch.no_grad():
        student, teacher = (
            model(input_ids=batch["input_ids"]).logits.double()
            for model in (trainer.model, trainer.teacher)
        )
    expected = literal_hinton(student, teacher, batch["labels"], 2.0, 0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_inputs_that_one_model_alone_takes(make_trainer):
    teacher = bert(BertForMaskedLM, 16)
    student = DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=8,
            hidden_dim=8,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    seen = []
    for model in (student, teacher):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
        )
    rows = [
        {**row, "token_type_ids": torch.ones(LENGTH, dtype=torch.long)} for row in token_rows(4)
    ]
    make_trainer(student, teacher, rows, max_steps=1).train()
    by_teacher, by_student = seen[-2:]
    assert "token_type_ids" in by_teacher
    assert "token_type_ids" not in by_student


def test_classifier_learns_from_labels_and_without_them(make_trainer):
    student, teacher = (bert(BertForSequenceClassification, n, num_labels=3) for n in (8, 16))
    rows = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(token_rows(8))]
    trainer = make_trainer(student, teacher, rows, max_steps=2)
    trainer.train()
    assert {"soft_loss", "hard_loss"} <= trainer.state.log_history[0].keys()

    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    trainer = make_trainer(
        student,
        teacher,
        unlabelled,
        Objective([Logits()]),
        max_steps=1,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert "hard_loss" not in log
    assert log["loss"] == pytest.approx(log["soft_loss"], rel=1e-5)


def test_missing_labels_are_an_error(make_trainer):
    batch = {"input_ids": torch.ones(2, LENGTH, dtype=torch.long)}
    for objective, message in (
        (hinton().objective, "the objective needs them"),
        (Objective([Logits()]), "which tokens count"),
    ):
        trainer = make_trainer(objective=objective)
        with pytest.raises(ValueError, match=message):
            trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("vocab_size", [None, VOCAB])
def test_padding_columns_of_a_wider_teacher(make_trainer, vocab_size):
    teacher = gpt2(16)
    wide = gpt2(16, VOCAB + 5)
    wide.load_state_dict(
        {
            name: torch.nn.functional.pad(value, (0, 0, 0, 5), value=0.3)
            if value.shape[0] == VOCAB
            else value
            for name, value in teacher.state_dict().items()
        }
    )
    student, batch = gpt2(8), default_data_collator(token_rows(3))
    losses = [
        trainer.compute_loss(trainer.model.eval(), batch)
        for trainer in (
            make_trainer(student, teacher),
            make_trainer(student, wide, options={"vocab_size": vocab_size}),
        )
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_classes_must_agree(make_trainer):
    trainer = make_trainer(
        bert(BertForSequenceClassification, 8, num_labels=3),
        bert(BertForSequenceClassification, 16, num_labels=2),
    )
    batch = default_data_collator(token_rows(2)) | {"labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="student has 3 classes and the teacher 2"):
        trainer.compute_loss(trainer.model, batch)


def test_half_precision_student_saves_no_inference_tensor(make_trainer):
    trainer = make_trainer(gpt2(8).half(), gpt2(16), options={"fuse_head": False})
    loss = trainer.compute_loss(trainer.model, default_data_collator(token_rows(2)))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trainer.model.parameters())


def test_mixed_precision(make_trainer):
    trainer = make_trainer(rows=token_rows(8), max_steps=2, bf16=True)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bert"])
def test_overwritten_logits_give_the_same_gradients(make_trainer, family):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    student = {
        "gpt2": lambda: gpt2(8),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        # A soft cap on the logits: its tanh keeps what the cap multiplies, not the logits.
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**sizes)),
        "bert": lambda: bert(
            BertForMaskedLM, 8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
    }[family]()
    teacher, rows = gpt2(16), token_rows(4)
    gradients = [
        step_gradients(
            make_trainer(
                copy.deepcopy(student),
                teacher,
                rows,
                options={
                    "fuse_head": False,
                    "overwrite_student_logits": overwrite,
                    "shift_labels": True,
                },
                max_steps=1,
            )
        )
        for overwrite in (False, True)
    ]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_data_parallel_divides_by_all_tokens(make_trainer):
    student, teacher, batch = gpt2(8), gpt2(16), default_data_collator(token_rows(4))
    expected = make_trainer(student, teacher).compute_loss(student.eval(), batch)
    for average in (True, False):
        trainer = make_trainer(student, teacher, average_tokens_across_devices=average)
        trainer.args._n_gpu = 2
        count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        loss = trainer.compute_loss(student.eval(), batch, num_items_in_batch=count)
        # Without averaging, Trainer itself rounds a device's share of the tokens down.
        torch.testing.assert_close(loss, expected, rtol=1e-5 if average else 0.05, atol=0)


ONE_OF_TWO_PROCESSES = """
import sys
import torch
from transformers import GPT2LMHeadModel, TrainingArguments, default_data_collator
from kdfast.trainer import DistillationTrainer

folder = sys.argv[1]
rows = torch.load(f"{folder}/rows.pt")
trainer = DistillationTrainer(
    model=GPT2LMHeadModel.from_pretrained(f"{folder}/student"),
    teacher=GPT2LMHeadModel.from_pretrained(f"{folder}/teacher"),
    args=TrainingArguments(
        f"{folder}/out",
        use_cpu=True,
        save_strategy="no",
        max_steps=1,
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
    ),
    data_collator=default_data_collator,
    train_dataset=rows,
    eval_dataset=rows,
)
trainer.train()
trainer.evaluate()
if trainer.is_world_process_zero():
    torch.save(trainer.state.log_history, f"{folder}/log.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_with_one(make_trainer, tmp_path):
    student, teacher, rows = gpt2(8), gpt2(16), token_rows(8)
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    torch.save(rows, tmp_path / "rows.pt")
    processes = start_two(ONE_OF_TWO_PROCESSES, tmp_path)
    one = make_trainer(
        student,
        teacher,
        rows,
        options={"eval_dataset": rows},
        max_steps=1,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
    )
    one.train()
    one.evaluate()
    finish(processes)
    two = torch.load(tmp_path / "log.pt")
    for entry, keys in (
        (0, ("loss", "soft_loss", "hard_loss", "grad_norm")),
        (-1, ("eval_loss", "eval_soft_loss", "eval_hard_loss")),
    ):
        for key in keys:
            assert two[entry][key] == pytest.approx(one.state.log_history[entry][key], rel=1e-4)


def test_logits_that_the_student_keeps_cannot_be_overwritten_unseen(make_trainer):
    student = gpt2(8)
    student.lm_head = torch.nn.Sequential(student.lm_head, torch.nn.Tanh())
    trainer = make_trainer(student, options={"overwrite_student_logits": True})
    loss = trainer.compute_loss(student.train(), default_data_collator(token_rows(2)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"compute_loss_func": lambda *_: 0}}, "compute_loss_func"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_other_losses_are_refused(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**changes)


def test_the_student_cannot_be_its_own_teacher(make_trainer):
    model = gpt2(8)
    with pytest.raises(ValueError, match="two models"):
        make_trainer(model, model)


@pytest.mark.parametrize("objective", [Logits(), [Logits()]])
def test_what_is_no_objective_is_refused(make_trainer, objective):
    with pytest.raises(TypeError, match="objective must be an Objective, got"):
        make_trainer(objective=objective)


def test_arguments_of_other_types_are_refused(make_trainer):
    with pytest.raises(TypeError, match=r"got Recipe: pass its .objective"):
        make_trainer(objective=hinton())
    for teacher in ("bert", 3):
        with pytest.raises(TypeError, match="teacher must be a model or a sequence of models, got"):
            make_trainer(teacher=teacher)


def test_a_model_that_sees_the_next_token_does_not_learn_to_predict_it(make_trainer):
    both_ways, decoder = (bert(BertLMHeadModel, 8, is_decoder=flag) for flag in (False, True))
    with pytest.raises(ValueError, match=r"student \(BertLMHeadModel\) .* have is_decoder=True"):
        make_trainer(both_ways)
    with pytest.raises(ValueError, match=r"teacher \(BertLMHeadModel\) .* have is_decoder=True"):
        make_trainer(teacher=both_ways)
    assert make_trainer(decoder).shift_labels
    assert not make_trainer(both_ways, options={"shift_labels": False}).shift_labels


@pytest.mark.parametrize("targets", [LENGTH, LENGTH - 5])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_decoder_reads_what_it_makes_of_labels(make_trainer, family, targets):
    # Each begins its decoder's tokens with its own.
    student, teacher = encoder_decoder(family, start=2), encoder_decoder(family, start=3)
    rows = token_rows(4)
    for row in rows:
        row["labels"] = row["labels"][-targets:]
    batch = default_data_collator(rows)
    trainer = make_trainer(student, teacher, rows, hinton(2.0, 0.5).objective, max_steps=1)
    logits = []
    with torch.no_grad():
        for model in (student.eval(), teacher.eval()):
            start = torch.full((4, 1), model.config.decoder_start_token_id)
            shifted = torch.cat([start, batch["labels"][:, :-1].clamp_min(0)], 1)
            inputs = {"input_ids": batch["input_ids"], "decoder_input_ids": shifted}
            logits.append(model(**inputs).logits.double())
    expected = literal_hinton(*logits, batch["labels"], 2.0, 0.5).item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_encoder_decoder_without_its_inputs_is_an_error(make_trainer):
    batch = default_data_collator(token_rows(2))
    student, teacher = encoder_decoder("bart"), encoder_decoder("bart")
    trainer = make_trainer(student, teacher, objective=Objective([Logits(tokens="all")]))
    with pytest.raises(ValueError, match="for the student: there are no labels to make them of"):
        trainer.compute_loss(student, {"input_ids": batch["input_ids"]})
    trainer = make_trainer(student, Ensemble([teacher, teacher]))
    with pytest.raises(ValueError, match="for the teacher: Ensemble makes none of labels"):
        trainer.compute_loss(student, batch)


@pytest.mark.parametrize("mask", ["labels", "decoder_attention_mask"])
def test_all_tokens_of_an_encoder_decoder_are_its_decoders(make_trainer, mask):
    student, teacher = encoder_decoder("t5"), encoder_decoder("t5")
    batch = default_data_collator(token_rows(4))
    batch["attention_mask"] = torch.ones(4, LENGTH, dtype=torch.int64)
    batch["attention_mask"][1:, 3:] = 0
    counted = batch["labels"] != -100
    if mask == "decoder_attention_mask":
        counted = torch.arange(LENGTH) < torch.tensor([[4], [5], [6], [7]])
        batch[mask] = counted.long()
    trainer = make_trainer(student, teacher, objective=Objective([Logits(tokens="all")]))
    loss = trainer.compute_loss(student.eval(), batch)
    with torch.no_grad():
        # Of both with labels, of which they make the decoder's inputs.
        s, t = (model(**batch).logits.double().log_softmax(-1) for model in (student, teacher))
    expected = (t.exp() * (t - s)).sum(-1)[counted].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_classes_of_tokens_that_differ_are_refused(make_trainer):
    student, teacher = (bert(BertForTokenClassification, 8, num_labels=n) for n in (3, 5))
    rows = [{**row, "labels": row["labels"].clamp(max=2)} for row in token_rows(4)]
    with pytest.raises(ValueError, match="the student has 3 classes and the teacher 5"):
        make_trainer(student, teacher, rows, max_steps=1).train()


def test_a_loss_of_the_students_own_is_left_out_aloud(make_trainer, caplog):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    for own in (False, True):
        config = MixtralConfig(vocab_size=VOCAB, output_router_logits=own, **sizes, **heads)
        with caplog.at_level(logging.WARNING):
            make_trainer(MixtralForCausalLM(config), log_level="warning")
        assert ("auxiliary loss (output_router_logits) is no term" in caplog.text) == own
