import copy
import re
from functools import partial

import pytest
import torch
from distributed import finish, start_two
from torch import Tensor, nn
from training import (
    LENGTH,
    VOCAB,
    bert,
    gradients,
    padded_rows,
    trainer_of,
)
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from kdfast.trainer import (
    AttentionMSE,
    EmbeddingMSE,
    HardLabels,
    HiddenCosine,
    HiddenMSE,
    Logits,
    Objective,
    TruncatedLogits,
)
from kdfast.trainer.projections import FILE, Projections

INSIDE = [
    AttentionMSE(reduction="tinybert", mask_queries=False),
    HiddenMSE(projection="shared", mask=False),
    EmbeddingMSE(projection="shared", mask=False),
]


def llama(width: int, layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.3,
        )
    )


@pytest.fixture
def make_trainer(tmp_path):
    return partial(trainer_of, tmp_path)


@pytest.mark.parametrize("family", [bert, llama])
def test_terms_are_what_the_operators_say(make_trainer, family):
    import kdfast

    student, teacher = family(8, 2), family(16, 4)
    rows = padded_rows(4)
    batch = default_data_collator(rows)
    objective = [AttentionMSE(0.5), HiddenMSE(2.0), EmbeddingMSE(0.25)]
    trainer = make_trainer(student, teacher, objective)
    loss = trainer.compute_loss(student.train(), dict(batch))

    mask = batch["attention_mask"].bool()
    with (
        torch.no_grad(),
        kdfast.capture_attention(student.eval()) as own,
        kdfast.capture_attention(teacher) as other,
    ):
        student_hidden = student(**batch, output_hidden_states=True).hidden_states
        teacher_hidden = teacher(**batch, output_hidden_states=True).hidden_states
    own, other, total = list(own.values()), list(other.values()), 0.0
    attention = sum(
        kdfast.attention_mse(
            *own[i][:2], *other[j][:2], key_mask=mask, query_mask=mask, causal=family is llama
        )
        for i, j in ((0, 1), (1, 3))
    )

    def hidden(layer: int, other: int, name: str) -> Tensor:
        weight, bias = student.distillation_projections[name]
        difference = student_hidden[layer] @ weight.T + bias - teacher_hidden[other]
        return difference[mask].square().mean()

    total = {
        "attention_loss": attention,
        "hidden_loss": hidden(1, 2, "HiddenMSE_0") + hidden(2, 4, "HiddenMSE_1"),
        "embedding_loss": hidden(0, 0, "EmbeddingMSE_0"),
    }
    assert trainer._terms.keys() == total.keys()
    for name, value in total.items():
        torch.testing.assert_close(trainer._terms[name], value, rtol=1e-5, atol=0, msg=name)
    weighted = sum(w * v for w, v in zip((0.5, 2.0, 0.25), total.values(), strict=True))
    torch.testing.assert_close(loss.detach(), weighted.detach(), rtol=1e-5, atol=0)


def test_cosine_of_the_last_layer(make_trainer):
    student, teacher = bert(8, 2), bert(8, 4)
    batch = default_data_collator(padded_rows(4))
    trainer = make_trainer(student, teacher, [HiddenCosine(layers={-1: -1})])
    loss = trainer.compute_loss(student.train(), dict(batch))
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        own, other = (
            model.eval()(**batch, output_hidden_states=True).hidden_states[-1][mask]
            for model in (student, teacher)
        )
    expected = nn.CosineEmbeddingLoss()(own, other, torch.ones(len(own)))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert not hasattr(student, "distillation_projections")


def test_more_heads_are_mixed(make_trainer):
    student, teacher = bert(8, 1), bert(16, 2, num_attention_heads=4)
    batch = default_data_collator(padded_rows(4))
    with pytest.raises(ValueError, match="pass head_map"):
        make_trainer(student, teacher, [AttentionMSE()])
    with pytest.raises(ValueError, match=r"head_map must be \[2, 4\]"):
        make_trainer(student, teacher, [AttentionMSE(head_map=[[1.0], [1.0]])])
    chosen = [AttentionMSE(head_map=[[1, 0, 0, 0], [0, 0, 0.5, 0.5]])]
    assert make_trainer(student, teacher, chosen).compute_loss(student, dict(batch)) > 0


@pytest.mark.parametrize("labelled", [False, True])
def test_no_logits_where_no_term_has_them(make_trainer, monkeypatch, labelled):
    student, teacher = bert(8, 2), bert(16, 4)
    batch = default_data_collator(padded_rows(4, labels=labelled))
    expected = gradients(
        make_trainer(student, teacher, INSIDE, options={"fuse_head": False}), batch
    )
    del student.distillation_projections
    torch.manual_seed(0)
    trainer = make_trainer(student, teacher, INSIDE)
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    # The heads are known now.
    called, plain = set(), nn.Linear.forward
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, inputs: called.add(self) or plain(self, inputs)
    )
    found = gradients(trainer, batch)
    for model in (student, teacher):
        assert called & set(model.bert.modules())
        # Nor what turns hidden states into the inputs of the layer that makes them.
        assert not called & set(model.cls.modules())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("fuse_head", [True, False])
def test_beside_a_loss_of_tokens(make_trainer, fuse_head):
    student, teacher = llama(8, 2), llama(16, 4)
    batch = default_data_collator(padded_rows(4, labels=True))
    terms = [Logits(0.6, temperature=2.0), HardLabels(0.4)]
    inside = [AttentionMSE(0.1), HiddenMSE(0.3)]
    options = {"fuse_head": fuse_head}
    together = make_trainer(student, teacher, [*terms, *inside], options=options)
    found = gradients(together, batch)
    names = ["soft_loss", "hard_loss", "attention_loss", "hidden_loss"]
    assert list(together._terms) == names

    # Trainer seeds what it draws, projections included.
    expected = gradients(make_trainer(student, teacher, inside, options=options), batch)
    del student.distillation_projections
    for name, gradient in gradients(
        make_trainer(student, teacher, terms, options=options), batch
    ).items():
        expected[name] = expected.get(name, 0) + gradient
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_hard_labels_without_the_teachers_logits(make_trainer):
    student = bert(8, 2, BertForSequenceClassification, num_labels=3)
    teacher = bert(8, 4, BertModel)
    batch = default_data_collator(
        [{**row, "labels": i % 3} for i, row in enumerate(padded_rows(4))]
    )
    trainer = make_trainer(student, teacher, [HiddenMSE(0.5), HardLabels(2.0)])
    loss = trainer.compute_loss(student.train(), dict(batch))
    expected = 2 * student(**batch).loss + 0.5 * trainer._terms["hidden_loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("terms", [[], [Logits()]])
def test_accumulated_batches_share_a_step(make_trainer, terms):
    """Equal parts of one batch, without padding: their means are the whole's."""
    rows = [
        {"input_ids": (tokens := torch.randint(1, VOCAB, (LENGTH,))), "labels": tokens}
        for _ in range(8)
    ]
    student, teacher, results = bert(8, 2), bert(16, 4), []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            copy.deepcopy(student),
            teacher,
            [*terms, AttentionMSE(), HiddenMSE()],
            rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            seed=1,
        )
        trainer.train()
        results.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm", "attention_loss", "hidden_loss"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4), name


def test_gradient_checkpointing_changes_nothing(make_trainer):
    student, teacher = bert(8, 2), bert(16, 4)
    batch = default_data_collator(padded_rows(4))
    trainer = make_trainer(student, teacher, INSIDE)
    expected = gradients(trainer, batch)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(trainer, batch)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_mixed_precision(make_trainer):
    student, teacher = bert(8, 2), bert(16, 4)
    losses = [
        make_trainer(
            copy.deepcopy(student), teacher, INSIDE, padded_rows(4), max_steps=1, **options
        )
        .train()
        .training_loss
        for options in ({}, {"bf16": True})
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_evaluation_without_labels(make_trainer):
    rows = padded_rows(6)
    trainer = make_trainer(bert(8, 2), bert(16, 4), INSIDE, options={"eval_dataset": rows})
    metrics = trainer.evaluate()
    parts = [metrics[f"eval_{name}_loss"] for name in ("attention", "hidden", "embedding")]
    assert metrics["eval_loss"] == pytest.approx(sum(parts), rel=1e-5)
    batch = default_data_collator(rows)
    assert trainer.predict(rows).predictions.shape == (6, LENGTH, VOCAB)
    with torch.no_grad():
        whole = trainer.compute_loss(trainer.model.eval(), batch)
    # The last batch is smaller, and Trainer weighs samples.
    assert metrics["eval_loss"] == pytest.approx(whole.item(), rel=1e-4)


def test_metrics_see_logits_alone(make_trainer):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    trainer = make_trainer(
        bert(8, 2, BertForSequenceClassification, num_labels=3),
        bert(16, 4, BertForSequenceClassification, num_labels=3),
        [*INSIDE, Logits()],
        options={
            "eval_dataset": [{**row, "labels": 1} for row in padded_rows(4)],
            "compute_metrics": metrics,
        },
    )
    trainer.evaluate()
    assert seen[0].shape == (4, 3)


def test_projections_are_saved_beside_and_resume(make_trainer, tmp_path):
    rows, teacher = padded_rows(24), bert(16, 4)

    def arguments(name: str) -> dict[str, object]:
        folder = str(tmp_path / name)
        return {"output_dir": folder, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}

    def student() -> nn.Module:
        torch.manual_seed(3)
        return bert(8, 2, hidden_dropout_prob=0.1)

    whole = make_trainer(student(), teacher, INSIDE, rows, **arguments("whole"))
    first = whole.projections["shared"][0].clone()
    whole.train()
    whole.save_model()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    torch.manual_seed(99)
    resumed = make_trainer(student(), teacher, INSIDE, rows, **arguments("resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    own, other = (trainer.projections["shared"] for trainer in (whole, resumed))
    assert not torch.equal(own[0], first)
    assert all(torch.equal(*pair) for pair in zip(own, other, strict=True))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name

    for folder in (checkpoint, tmp_path / "whole"):
        assert (folder / FILE).is_file()
        loaded, info = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
    assert loaded.num_parameters() == bert(8, 2).num_parameters()
    assert not any("projections" in name for name in whole.model.state_dict())


def test_damaged_or_other_projections(tmp_path):
    Projections(["a"], 2, 3, 0.1).save(tmp_path)
    with pytest.raises(ValueError, match=r"holds .*: the objective has"):
        Projections(["b"], 2, 3, 0.1).load(tmp_path)
    (tmp_path / FILE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=re.escape(f"{FILE} is damaged")):
        Projections(["a"], 2, 3, 0.1).load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Projections(["a"], 2, 3, 0.1).load(tmp_path / "nowhere")


ONE_OF_TWO_PROCESSES = """
import sys
import torch
from transformers import BertForMaskedLM, TrainingArguments, default_data_collator
from kdfast.trainer import *

folder = sys.argv[1]
trainer = DistillationTrainer(
    model=BertForMaskedLM.from_pretrained(f"{folder}/student"),
    teacher=BertForMaskedLM.from_pretrained(f"{folder}/teacher"),
    objective=Objective([AttentionMSE(), HiddenMSE(), EmbeddingMSE()]),
    args=TrainingArguments(
        f"{folder}/out",
        use_cpu=True,
        save_strategy="no",
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=4,
    ),
    data_collator=default_data_collator,
    train_dataset=torch.load(f"{folder}/rows.pt"),
)
trainer.train()
trainer.save_model(f"{folder}/two")
if trainer.is_world_process_zero():
    torch.save(trainer.state.log_history, f"{folder}/log.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_with_one(make_trainer, tmp_path):
    student, teacher = bert(8, 2), bert(16, 4)
    # Without padding, so that the mean of the processes' means is the mean of the whole.
    rows = [{"input_ids": torch.randint(1, VOCAB, (LENGTH,))} for _ in range(8)]
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    torch.save(rows, tmp_path / "rows.pt")
    processes = start_two(ONE_OF_TWO_PROCESSES, tmp_path)
    one = make_trainer(
        student,
        teacher,
        [AttentionMSE(), HiddenMSE(), EmbeddingMSE()],
        rows,
        max_steps=3,
        per_device_train_batch_size=8,
    )
    one.train()
    finish(processes)
    two = torch.load(tmp_path / "log.pt")
    for step in range(3):
        for key in ("loss", "attention_loss", "hidden_loss", "embedding_loss", "grad_norm"):
            assert two[step][key] == pytest.approx(one.state.log_history[step][key], rel=1e-3), key
    other = Projections(one.projections.names, 8, 16, 0.1)
    other.load(tmp_path / "two")
    for own, loaded in zip(one.projections.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(loaded, own, rtol=1e-3, atol=1e-4)


ONE_OF_TWO_SHARDS = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertForMaskedLM, TrainingArguments
from kdfast.trainer import *

folder, batches = sys.argv[1], torch.load(f"{sys.argv[1]}/batches.pt")
student = BertForMaskedLM.from_pretrained(f"{folder}/student")
trainer = DistillationTrainer(
    model=student,
    teacher=BertForMaskedLM.from_pretrained(f"{folder}/teacher"),
    objective=Objective([AttentionMSE(), HiddenMSE(), EmbeddingMSE()]),
    args=TrainingArguments(f"{folder}/out", use_cpu=True),
)
mesh = init_device_mesh("cpu", (2,))
for layer in student.bert.encoder.layer:
    fully_shard(layer, mesh=mesh)
fully_shard(student, mesh=mesh)
trainer.projections.load(folder)
student.train()
for _ in range(2):
    # The second step's weights are gathered anew.
    student.zero_grad()
    trainer.compute_loss(student, batches[mesh.get_rank()]).backward()
gradients = {
    name: p.grad.full_tensor() for name, p in student.named_parameters() if p.grad is not None
}
trainer.projections.save(f"{folder}/out", write=mesh.get_rank() == 0)
if mesh.get_rank() == 0:
    torch.save(gradients, f"{folder}/gradients.pt")
torch.distributed.destroy_process_group()
"""


def test_a_sharded_student(make_trainer, tmp_path):
    student, teacher = bert(8, 2), bert(16, 4)
    batches = [default_data_collator(padded_rows(3)) for _ in range(2)]
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    torch.save(batches, tmp_path / "batches.pt")
    trainer = make_trainer(student, teacher, [AttentionMSE(), HiddenMSE(), EmbeddingMSE()])
    trainer.projections.save(tmp_path)
    (tmp_path / "out").mkdir(exist_ok=True)
    processes = start_two(ONE_OF_TWO_SHARDS, tmp_path)
    losses = [trainer.compute_loss(student.train(), batch) for batch in batches]
    (sum(losses) / 2).backward()
    finish(processes)
    gradients = torch.load(tmp_path / "gradients.pt")
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert any("projections" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "expected"),
    [
        (4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        (6, 12, [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]),
        (3, 4, [(0, 0), (1, 1), (2, 3)]),
        (2, 2, [(0, 0), (1, 1)]),
    ],
)
def test_the_uniform_map(student_layers, teacher_layers, expected):
    assert HiddenMSE().pairs(student_layers, teacher_layers) == expected


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttentionMSE(-1), ValueError, "weight must be"),
        (lambda: AttentionMSE(layers=[0]), TypeError, "layers must be a mapping"),
        (lambda: AttentionMSE(layers={0: "a"}), TypeError, "layers must map whole numbers"),
        (lambda: AttentionMSE(layers={}), ValueError, "layers must name a layer"),
        (lambda: AttentionMSE(reduction="none"), ValueError, "reduction must be one of"),
        (lambda: AttentionMSE(method="fast"), ValueError, "method must be one of"),
        (lambda: AttentionMSE(head_map=[["1"]]), TypeError, "head_map.s entries must be a number"),
        (lambda: AttentionMSE(head_map=[[1.0], [1.0, 2.0]]), ValueError, "head_map must be"),
        (
            lambda: AttentionMSE(head_map=3),
            TypeError,
            "head_map must be .* nested sequences, got 3",
        ),
        (lambda: AttentionMSE(head_map=[1, 0]), TypeError, r"nested sequences, got \[1, 0\]"),
        (lambda: AttentionMSE(mask_queries="no"), TypeError, "mask_queries must be True or False"),
        (lambda: AttentionMSE(allow_partial_scores=0), TypeError, "allow_partial_scores must be"),
        (lambda: HiddenMSE(mask="no"), TypeError, "mask must be True or False, got str"),
        (lambda: EmbeddingMSE(mask="no"), TypeError, "mask must be True or False, got str"),
        (lambda: HiddenCosine(mask="no"), TypeError, "mask must be True or False, got str"),
        (lambda: Logits(scale_t2="no"), TypeError, "scale_t2 must be True or False, got str"),
        (lambda: Logits(per_class="no"), TypeError, "per_class must be True or False, got str"),
        (lambda: TruncatedLogits(scale_t2="no"), TypeError, "scale_t2 must be True or False"),
        (lambda: HiddenMSE(projection="own"), ValueError, "projection must be one of"),
        (lambda: EmbeddingMSE(layers={0: 0}), ValueError, "layers is no setting"),
        (lambda: HiddenCosine(weight="1"), TypeError, "weight must be"),
        (lambda: Objective([HardLabels()]), ValueError, "nothing comes from the teacher"),
        (lambda: Objective([HiddenMSE(), HiddenMSE()]), ValueError, "at most one HiddenMSE"),
    ],
)
def test_settings_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("student", "teacher", "terms", "message"),
    [
        ((8, 4), (16, 2), [AttentionMSE()], "the student has 4 layers and the teacher 2"),
        ((8, 2), (16, 4), [HiddenMSE(layers={0: 4})], "layer 4 of the teacher, which has 4"),
        ((8, 2), (16, 4), [HiddenMSE(layers={2: 0})], "layer 2 of the student, which has 2"),
        ((8, 2), (16, 4), [HiddenMSE(layers={1: 0, -1: 1})], "names a student layer twice"),
        ((8, 2), (16, 4), [HiddenCosine()], "student and teacher must have one width"),
        ((8, 2), (16, 4), [HiddenMSE(projection="none")], "projection must not be 'none'"),
    ],
)
def test_models_that_do_not_fit(make_trainer, student, teacher, terms, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(bert(*student), bert(*teacher), terms)


def test_models_without_an_inside(make_trainer):
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match=r"teacher .* is an encoder and a decoder"):
        make_trainer(bert(8, 1), t5, [HiddenMSE()])
    with pytest.raises(ValueError, match="no num_hidden_layers"):
        make_trainer(nn.Linear(2, 2), bert(8, 1), [HiddenMSE()])
    student = llama(16, 2)
    trainer = make_trainer(student, bert(16, 2, num_attention_heads=4), [AttentionMSE()])
    batch = default_data_collator(padded_rows(2))
    with pytest.raises(ValueError, match="unlike the teacher's"):
        trainer.compute_loss(student, batch)


def test_wrappers_that_hide_the_inside(make_trainer):
    with pytest.raises(ValueError, match="torch_compile hides"):
        make_trainer(bert(8, 1), bert(8, 1), [HiddenMSE()], torch_compile=True)


def test_what_would_not_train_projections_is_refused(make_trainer):
    student, teacher = bert(8, 2), bert(16, 4)
    optimizer = torch.optim.AdamW(student.parameters())
    with pytest.raises(ValueError, match="optimizers was made before the projections"):
        make_trainer(student, teacher, [HiddenMSE()], options={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="model_init makes students that lack"):
        make_trainer(None, teacher, [HiddenMSE()], options={"model_init": lambda: bert(8, 2)})
    # Without projections there is nothing to miss.
    make_trainer(student, bert(8, 4), [HiddenMSE()], options={"optimizers": (optimizer, None)})


def test_the_student_is_itself_again_after_training(make_trainer):
    student, teacher = bert(8, 2), bert(16, 4)
    names = [name for name, _ in student.named_parameters()]
    trainer = make_trainer(student, teacher, INSIDE, padded_rows(4), max_steps=1)
    before = trainer.projections["shared"][0].clone()
    trainer.train()
    assert [name for name, _ in student.named_parameters()] == names
    assert not torch.equal(trainer.projections["shared"][0], before)
    # Those of a training that never began are another's too.
    make_trainer(student, teacher, INSIDE)
    make_trainer(student, teacher, [Logits()])
    assert [name for name, _ in student.named_parameters()] == names


def test_layers_without_attention_have_no_number(make_trainer):
    crossed = bert(8, 2, is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="has 2 layers and 4 attention modules"):
        make_trainer(crossed, bert(16, 4), [AttentionMSE()])
    make_trainer(crossed, bert(16, 4), [HiddenMSE()])


def test_measures_of_unlabelled_data_are_not_asked_for(make_trainer):
    asked = []
    trainer = make_trainer(
        bert(8, 2, BertForSequenceClassification, num_labels=3),
        bert(16, 4, BertForSequenceClassification, num_labels=3),
        [Logits()],
        options={"eval_dataset": padded_rows(7), "compute_metrics": asked.append},
    )
    assert trainer.evaluate()["eval_soft_loss"] > 0
    assert trainer.predict(padded_rows(7)).predictions.shape == (7, 3)
    assert not asked


def test_projections_are_as_wide_as_what_trains(make_trainer):
    student = bert(8, 2).to(torch.bfloat16)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    student.cls.float().requires_grad_(True)
    trainer = make_trainer(student, bert(16, 4), [HiddenMSE()])
    assert trainer.projections["HiddenMSE_0"][0].dtype == torch.float32
