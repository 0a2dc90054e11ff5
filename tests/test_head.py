"""The output head as the loss: DistillationTrainer without logits, against itself with logits."""

import copy
import logging

import pytest
import torch
from distributed import finish, start_two
from test_trainer import LENGTH, VOCAB, gpt2, step_gradients, token_rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForTokenClassification,
    CohereConfig,
    CohereForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainingArguments,
    default_data_collator,
)

from kdfast.trainer import DistillationTrainer, Logits, Objective, hinton
from kdfast.trainer.head import find_head

# Far enough from uniform predictions that caps and scales matter.
SHARED = {"initializer_range": 0.5, "num_attention_heads": 2, "num_hidden_layers": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**SHARED, "num_key_value_heads": 1, "pad_token_id": 0}
FAMILIES = {
    # A transform before the decoder, and a bias, which is a parameter of its own.
    "bert": (BertForMaskedLM, BertConfig, SHARED | NO_DROPOUT),
    "bert_dropout": (BertForMaskedLM, BertConfig, SHARED),
    "roberta": (RobertaForMaskedLM, RobertaConfig, SHARED | NO_DROPOUT | {"pad_token_id": 0}),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig, SHARED | {"pad_token_id": 0}),
    "llama": (LlamaForCausalLM, LlamaConfig, DECODER),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, DECODER | {"tie_word_embeddings": True}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, DECODER | {"final_logit_softcapping": 2.0}),
    "cohere": (CohereForCausalLM, CohereConfig, DECODER | {"logit_scale": 0.3}),
    "granite": (GraniteForCausalLM, GraniteConfig, DECODER | {"logits_scaling": 3.0}),
}


def model_of(family: str, width: int, vocab_size: int = VOCAB) -> nn.Module:
    if family == "gpt2":
        return gpt2(width, vocab_size)
    if family == "distilbert":
        config = DistilBertConfig(
            vocab_size=vocab_size,
            dim=width,
            hidden_dim=width,
            n_layers=1,
            n_heads=2,
            initializer_range=0.5,
        )
        return DistilBertForMaskedLM(config)
    cls, config, settings = FAMILIES[family]
    if issubclass(config, Qwen3Config | Gemma2Config):
        settings = settings | {"head_dim": width // 2}
    # RoBERTa counts positions from its padding token on.
    return cls(
        config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=width,
            max_position_embeddings=LENGTH + 2,
            **settings,
        )
    )


@pytest.fixture
def make_trainer(tmp_path):
    def make(student, teacher=None, rows=(), *, objective=None, options=None, **arguments):
        return DistillationTrainer(
            model=student,
            args=TrainingArguments(
                **{
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
            ),
            train_dataset=rows or None,
            data_collator=default_data_collator,
            teacher=gpt2(16) if teacher is None else teacher,
            objective=objective,
            **(options or {}),
        )

    return make


@pytest.fixture
def no_logits(monkeypatch):
    """Make the path that takes logits fail."""

    def forbid():
        def kd_loss(*_, **__):
            raise AssertionError("the step took logits")

        monkeypatch.setattr("kdfast.trainer.objective.kd_loss", kd_loss)

    return forbid


def one_step(
    trainer: DistillationTrainer, batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one training step, whatever the state of the random numbers."""
    trainer.model.train()
    trainer.model.zero_grad()
    torch.manual_seed(1)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(9))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return {"loss": loss.detach(), **trainer._terms}, gradients


def assert_same_step(step: tuple, expected: tuple, rtol: float = 1e-5) -> None:
    (losses, gradients), (expected_losses, expected_gradients) = step, expected
    assert losses.keys() == expected_losses.keys()
    for name, value in expected_losses.items():
        torch.testing.assert_close(losses[name], value, rtol=rtol, atol=0, msg=name)
    # Some gradients are 0 but for rounding: the bias of a key changes no attention.
    whole = torch.cat([gradient.flatten() for gradient in expected_gradients.values()]).norm()
    assert whole > 1e-3
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).norm()
        assert error <= rtol * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("family", ["gpt2", "distilbert", *FAMILIES])
def test_every_gradient_is_that_of_the_logits(make_trainer, no_logits, family):
    student, teacher = model_of(family, 8), model_of(family, 16)
    batch = default_data_collator(token_rows(4))
    objective = hinton(2.0, 0.7).objective
    with_logits = make_trainer(
        copy.deepcopy(student), teacher, objective=objective, options={"fuse_head": False}
    )
    expected = one_step(with_logits, batch)
    no_logits()
    assert_same_step(one_step(make_trainer(student, teacher, objective=objective), batch), expected)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("gpt2", "gemma2"), ("gemma2", "granite"), ("cohere", "llama"), ("bert", "distilbert")],
)
@pytest.mark.parametrize("vocab_size", [None, VOCAB - 2])
def test_families_vocabularies_and_divergences_mix(
    make_trainer, no_logits, student, teacher, vocab_size
):
    batch = default_data_collator(token_rows(4))
    if vocab_size is not None:
        for column in batch.values():
            column.clamp_(max=vocab_size - 1)
    student, teacher = model_of(student, 8), model_of(teacher, 16, VOCAB + 5)
    objective = Objective([Logits(2.0, 3.0, divergence="jsd", teacher_temperature=2.0)])
    options = {"vocab_size": vocab_size, "shift_labels": True}
    with_logits = make_trainer(
        copy.deepcopy(student),
        teacher,
        objective=objective,
        options={**options, "fuse_head": False},
    )
    expected = one_step(with_logits, batch)
    no_logits()
    assert_same_step(
        one_step(make_trainer(student, teacher, objective=objective, options=options), batch),
        expected,
    )


class NothingAsLarge(TorchDispatchMode):
    """Raises where an operator returns a tensor of `elements` elements or more."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "kdfast":
            # Its inside counts too, and the mode is off in here.
            with self:
                return function._op_dk(
                    torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {})
                )
        outputs = function(*args, **(kwargs or {}))
        for output in torch.utils._pytree.tree_leaves(outputs):
            if isinstance(output, Tensor) and output.numel() >= self.elements:
                raise MemoryError(f"{function} made {tuple(output.shape)}")
        return outputs


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3"])
def test_no_step_allocates_logits(make_trainer, monkeypatch, family):
    vocab_size, rows = 499, token_rows(4, ignored=False)
    logits = len(rows) * LENGTH * vocab_size
    # Both models' logits of 8 tokens.
    monkeypatch.setenv("KDFAST_CHUNK_BYTES", str(8 * 2 * 4 * vocab_size))
    student, teacher = (model_of(family, width, vocab_size) for width in (8, 16))
    batch = default_data_collator(rows)
    for fuse_head in (True, False):
        trainer = make_trainer(student, teacher, options={"fuse_head": fuse_head})
        trainer.model.train()
        with NothingAsLarge(logits):
            if fuse_head:
                trainer.compute_loss(trainer.model, batch).backward()
            else:
                with pytest.raises(MemoryError, match=str(vocab_size)):
                    trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_training_curves_agree(make_trainer, no_logits, tmp_path, family):
    rows, student, teacher = token_rows(40), model_of(family, 8), model_of(family, 16)

    def curve(name: str, checkpoint: str | None = None, **options: object) -> list[float]:
        trainer = make_trainer(
            copy.deepcopy(student),
            teacher,
            rows,
            options=options,
            output_dir=str(tmp_path / name),
            max_steps=20,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=10,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        history = trainer.state.log_history
        return [
            e[key] for e in history if "loss" in e for key in ("loss", "soft_loss", "grad_norm")
        ]

    expected = curve("logits", fuse_head=False)
    assert len(expected) == 60
    assert expected[-3] < 0.96 * expected[0]
    no_logits()
    assert curve("fused") == pytest.approx(expected, rel=1e-4)
    checkpoint = str(tmp_path / "fused" / "checkpoint-10")
    assert curve("resumed", checkpoint) == pytest.approx(expected, rel=1e-4)


# Newer releases of transformers have another name for it.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_and_autocast(make_trainer, no_logits, checkpointing, bf16):
    rows, student, teacher = token_rows(4), model_of("llama", 8), model_of("llama", 16)
    if checkpointing:
        student.gradient_checkpointing_enable()
    gradients = []
    for fuse_head in (False, True):
        if fuse_head:
            no_logits()
        trainer = make_trainer(
            copy.deepcopy(student),
            teacher,
            rows,
            options={"fuse_head": fuse_head},
            max_steps=1,
            bf16=bf16,
        )
        gradients.append(step_gradients(trainer))
    # Autocast rounds the logits where there are any.
    rtol = 2e-2 if bf16 else 1e-5
    whole = torch.cat([gradient.flatten() for gradient in gradients[0].values()]).norm()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= rtol * whole, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(make_trainer, no_logits, dtype):
    no_logits()
    student, teacher = model_of("gemma2", 8), model_of("cohere", 16)
    batch = default_data_collator(token_rows(4))
    exact, _ = one_step(make_trainer(student, teacher), batch)
    trainer = make_trainer(copy.deepcopy(student).to(dtype), copy.deepcopy(teacher).to(dtype))
    losses, gradients = one_step(trainer, batch)
    torch.testing.assert_close(losses["loss"], exact["loss"], rtol=0.05, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


class Scaled(GPT2LMHeadModel):
    def forward(self, input_ids, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = outputs.logits * 1.01
        return outputs


class WithBias(GPT2LMHeadModel):
    def forward(self, input_ids, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = outputs.logits + torch.zeros(VOCAB)
        return outputs


class Masked(GPT2LMHeadModel):
    def forward(self, input_ids, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits[..., VOCAB // 2 :] -= 1.0
        return outputs


class Twice(GPT2LMHeadModel):
    def forward(self, input_ids, **kwargs):
        self.lm_head(torch.zeros(1, 1, 8))
        return super().forward(input_ids, **kwargs)


class PlainHead(nn.Linear):
    pass


class OwnHead(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = PlainHead(8, VOCAB)


class Hooked(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)


UNKNOWN = {
    Scaled: "changes its logits",
    WithBias: "fails without its logits",
    Masked: "changes its logits",
    Twice: "calls its output head 2 times",
    OwnHead: "has an output head of type test_head.PlainHead",
    Hooked: "changes its logits",
}


@pytest.mark.parametrize("cls", UNKNOWN)
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_head_that_is_not_known_falls_back(make_trainer, caplog, cls, owner):
    unknown, other = cls(gpt2(8).config), gpt2(8)
    student, teacher = (unknown, other) if owner == "student" else (other, unknown)
    rows, gradients = token_rows(8), []
    for fuse_head in (False, True):
        trainer = make_trainer(
            copy.deepcopy(student),
            teacher,
            rows,
            options={"fuse_head": fuse_head, "shift_labels": True},
            max_steps=2,
        )
        with caplog.at_level(logging.WARNING):
            gradients.append(step_gradients(trainer))
        warnings = [r.message for r in caplog.records if "build logits" in r.message]
        assert len(warnings) == fuse_head
    assert f"{owner} ({cls.__name__}) {UNKNOWN[cls]}" in warnings[0]
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_a_configuration_is_not_believed(make_trainer, no_logits):
    student, teacher, batch = gpt2(8), gpt2(16), default_data_collator(token_rows(4))
    student.config.logit_scale, student.config.final_logit_softcapping = 7.0, 30.0
    expected = one_step(make_trainer(student, teacher, options={"fuse_head": False}), batch)
    no_logits()
    assert_same_step(one_step(make_trainer(student, teacher), batch), expected)


def test_small_logits_do_not_hide_a_softcap(make_trainer):
    student = model_of("gemma2", 8)
    nn.init.normal_(student.lm_head.weight, std=1e-4)
    trainer = make_trainer(student)
    one_step(trainer, default_data_collator(token_rows(2)))
    assert trainer._step.heads[0].softcap == 2.0


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("bert", {"cls"}),
        ("roberta", {"lm_head"}),
        ("modernbert", {"head", "decoder"}),
        (
            "distilbert",
            {
                "activation",
                "vocab_transform",
                "vocab_layer_norm",
                "vocab_projector",
                "mlm_loss_fct",
            },
        ),
        ("llama", {"lm_head"}),
    ],
)
def test_a_head_is_skipped_with_the_layers_in_front_of_it(family, parts):
    model, tokens = model_of(family, 8).eval(), torch.arange(6).view(2, 3)
    called = set()
    with torch.no_grad():
        head = find_head(model, lambda: model(tokens).logits, to_skip=True)
        for module in model.modules():
            module.register_forward_hook(lambda module, inputs, outputs: called.add(module))
        assert head.skipped(lambda: model(tokens).logits).shape == (2, 3, 0)
    assert {*head.parts} == {model.get_submodule(name) for name in parts}
    inside = {module for part in head.parts for module in part.modules()}
    assert called & inside <= {*head.parts}
    assert not any("forward" in vars(module) for module in model.modules())


class Nested(nn.Module):
    """A model whose core and head are one module."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, VOCAB))

    @property
    def base_model(self) -> nn.Linear:
        return self.inside[0]

    def get_output_embeddings(self) -> nn.Linear:
        return self.inside[1]

    def forward(self, states: Tensor) -> Tensor:
        return self.inside(states)


class Core(nn.Module):
    def forward(self, states: Tensor) -> tuple[Tensor]:
        return (states.mean(-1, keepdim=True).expand(*states.shape[:-1], 8),)


class InFront(Nested):
    """One with a layer in front of its core, which takes whatever that returns."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.core, self.head = nn.Linear(8, 8), Core(), nn.Linear(8, VOCAB)

    @property
    def base_model(self) -> nn.Module:
        return self.core

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, states: Tensor) -> Tensor:
        return self.head(self.core(self.front(states))[0])


def test_what_stands_elsewhere_is_not_skipped():
    states, tokens = torch.randn(2, 3, 8), torch.arange(6).view(2, 3)
    nested, in_front, hooked = Nested(), InFront(), model_of("bert", 8).eval()
    hooked.cls.forward = hooked.cls.forward
    two_tasks = BertForPreTraining(hooked.config).eval()
    with torch.no_grad():
        for head in (
            find_head(nested, lambda: nested(states), to_skip=True),
            find_head(in_front, lambda: in_front(states), to_skip=True),
            find_head(hooked, lambda: hooked(tokens).logits, to_skip=True),
            find_head(two_tasks, lambda: two_tasks(tokens).prediction_logits, to_skip=True),
        ):
            assert head.parts == (head.linear,)
    assert "forward" in vars(hooked.cls)


def test_a_compiled_student_falls_back(make_trainer, caplog):
    trainer = make_trainer(
        gpt2(8),
        rows=token_rows(4),
        max_steps=1,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert any("(GPT2LMHeadModel) is compiled" in record.message for record in caplog.records)


def test_token_classifiers_are_none_of_its_business(make_trainer, caplog):
    student, teacher = (
        BertForTokenClassification(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=width,
                intermediate_size=width,
                max_position_embeddings=LENGTH,
                num_labels=VOCAB,
                **SHARED,
            )
        )
        for width in (8, 16)
    )
    trainer = make_trainer(student, teacher)
    with caplog.at_level(logging.WARNING):
        one_step(trainer, default_data_collator(token_rows(2)))
    assert not caplog.records


@pytest.mark.parametrize("where", ["student", "teacher", "loss"])
def test_an_error_leaves_the_heads_as_they_were(make_trainer, where):
    trainer = make_trainer(gpt2(8))
    batch = default_data_collator(token_rows(3))
    expected = one_step(trainer, batch)

    def fail(*_):
        raise KeyboardInterrupt

    if where == "loss":
        # Labels of other positions than the logits'.
        with pytest.raises(ValueError, match="labels"):
            one_step(trainer, {**batch, "labels": batch["labels"][:, 2:]})
    else:
        hook = getattr(trainer, "model" if where == "student" else where).register_forward_hook(
            fail
        )
        with pytest.raises(KeyboardInterrupt):
            one_step(trainer, batch)
        hook.remove()
    for model in (trainer.model, trainer.teacher):
        assert "forward" not in vars(model.lm_head)
        assert not model._forward_hooks
        assert model(batch["input_ids"]).logits.shape[-1] == VOCAB
    again = one_step(trainer, batch)
    for name, gradient in expected[1].items():
        assert torch.equal(again[1][name], gradient)


def test_trying_the_heads_leaves_no_trace(make_trainer):
    student, batch = gpt2(8, dropout=0.5), default_data_collator(token_rows(3))
    trainer = make_trainer(student)
    student.train()
    student.transformer.drop.eval()
    modes = [module.training for module in student.modules()]
    steps = []
    for _ in range(2):
        student.zero_grad()
        torch.manual_seed(2)
        loss = trainer.compute_loss(student, batch)
        loss.backward()
        steps.append((loss.item(), student.lm_head.weight.grad.clone(), torch.get_rng_state()))
        assert [module.training for module in student.modules()] == modes
    assert steps[0][0] == steps[1][0]
    assert torch.equal(steps[0][1], steps[1][1])
    assert torch.equal(steps[0][2], steps[1][2])


def test_evaluation_has_logits_and_training_outputs_none(make_trainer):
    rows, widths, metrics = token_rows(8), [], []
    student, teacher = gpt2(8), gpt2(16)

    def compute_metrics(prediction):
        assert prediction.predictions.shape == (8, LENGTH, VOCAB)
        return {"largest": float(prediction.predictions.max())}

    for fuse_head in (True, False):
        trainer = make_trainer(
            copy.deepcopy(student),
            teacher,
            rows,
            options={
                "fuse_head": fuse_head,
                "eval_dataset": rows,
                "compute_metrics": compute_metrics,
            },
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
        )
        # Behind the trainer's own hook: what the student returns to whoever looks.
        trainer.model.register_forward_hook(
            lambda module, inputs, outputs: widths.append(
                (module.training, outputs.logits.shape[-1])
            )
        )
        trainer.train()
        metrics.append(
            [
                entry[key]
                for entry in trainer.state.log_history
                if "eval_loss" in entry
                for key in ("eval_loss", "eval_soft_loss", "eval_hard_loss", "eval_largest")
            ]
        )
    assert {w for training, w in widths[: len(widths) // 2] if training} == {0}
    assert {w for training, w in widths if not training} >= {VOCAB}
    assert len(metrics[0]) == 8
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


ONE_OF_TWO_SHARDS = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GPT2LMHeadModel, TrainingArguments
from kdfast.trainer import DistillationTrainer

folder, batches = sys.argv[1], torch.load(f"{sys.argv[1]}/batches.pt")
student = GPT2LMHeadModel.from_pretrained(f"{folder}/student")
trainer = DistillationTrainer(
    model=student,
    teacher=GPT2LMHeadModel.from_pretrained(f"{folder}/teacher"),
    args=TrainingArguments(f"{folder}/out", use_cpu=True),
)
mesh = init_device_mesh("cpu", (2,))
for block in student.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(student, mesh=mesh)
student.train()
for _ in range(2):
    # The second step's weights are gathered anew.
    student.zero_grad()
    trainer.compute_loss(student, batches[mesh.get_rank()]).backward()
assert trainer._step.heads is not None
gradients = {name: p.grad.full_tensor() for name, p in student.named_parameters()}
if mesh.get_rank() == 0:
    torch.save(gradients, f"{folder}/gradients.pt")
torch.distributed.destroy_process_group()
"""


def test_a_sharded_student(make_trainer, tmp_path):
    student, teacher = gpt2(8), gpt2(16)
    batches = [default_data_collator(token_rows(3)) for _ in range(2)]
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    torch.save(batches, tmp_path / "batches.pt")
    processes = start_two(ONE_OF_TWO_SHARDS, tmp_path)
    trainer = make_trainer(student, teacher, options={"fuse_head": False})
    losses = [trainer.compute_loss(student.train(), batch) for batch in batches]
    (sum(losses) / 2).backward()
    finish(processes)
    gradients = torch.load(tmp_path / "gradients.pt")
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
