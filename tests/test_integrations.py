"""kdfast.integrations against the libraries whose losses it stands in for, and the two pages of
documentation for people with a loop of their own.
"""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from tolerances import assert_gradient_close, assert_loss_close, relative_error
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    TrainingArguments,
    default_data_collator,
)

import kdfast
from kdfast.integrations import liger, trl

ROOT = Path(__file__).parents[1]
VOCAB = 37
LENGTH = 12
TOKENS = (3, 5)
STUDENT, TEACHER = 8, 16

pytestmark = pytest.mark.usefixtures("one_thread")


def peer(module: str, name: str) -> type:
    return getattr(pytest.importorskip(module), name)


@pytest.fixture(scope="module")
def trl_trainers():
    """The trainers of TRL that have a generalized_jsd_loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        pytest.importorskip("trl")
        return {
            "gkd": peer("trl.experimental.gkd.gkd_trainer", "GKDTrainer"),
            "gold": peer("trl.experimental.gold.gold_trainer", "GOLDTrainer"),
            "iw_opd": peer("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer"),
        }


def labels_of(*tokens: int) -> torch.Tensor:
    """Every third token does not count."""
    labels = torch.randint(0, VOCAB, tokens)
    labels.view(-1)[::3] = -100
    return labels


def defaults(function: object) -> dict[str, object]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_importing_needs_none_of_the_libraries():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('trl', 'liger_kernel', 'transformers'));"
        "import kdfast.integrations.liger, kdfast.integrations.trl"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_package_is_installed():
    installed = set(
        re.findall(r'^        "([\w.]+)",$', ROOT.joinpath("setup.py").read_text(), re.M)
    )
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.joinpath("kdfast").rglob("__init__.py")
    }
    assert found >= {"kdfast.integrations"}
    assert installed == found | {"kdfast.kernels"}


def jsd_and_gradient(function, student, teacher, labels, **options):
    student = student.clone().requires_grad_()
    loss = function(student, teacher, labels, **options)
    loss.backward()
    return loss.detach(), student.grad


def logits(dtype=torch.float32, tokens=TOKENS):
    return tuple((3 * torch.randn(*tokens, VOCAB)).to(dtype) for _ in range(2))


def assert_same_jsd(theirs, student, teacher, labels, **options):
    """Theirs on the same values in float64, for they compute in the precision of the logits."""
    loss, gradient = jsd_and_gradient(trl.generalized_jsd_loss, student, teacher, labels, **options)
    expected = jsd_and_gradient(theirs, student.double(), teacher.double(), labels, **options)
    assert loss.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert_loss_close(loss, expected[0], student.dtype)
    assert_gradient_close(gradient, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7), "reduction": "none"},
    ],
    ids=["batchmean", "sum", "mean", "num_items", "num_items_tensor"],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_trl_value_and_gradient(trl_trainers, dtype, beta, temperature, options, labelled):
    labels = labels_of(*TOKENS) if labelled else None
    theirs = trl_trainers["gkd"].generalized_jsd_loss
    assert_same_jsd(theirs, *logits(dtype), labels, beta=beta, temperature=temperature, **options)


def test_trl_in_two_dimensions_and_with_labels_outside_the_vocabulary(trl_trainers):
    theirs = trl_trainers["gkd"].generalized_jsd_loss
    labels = torch.tensor([VOCAB + 5, -100, 3, -1])
    assert_same_jsd(theirs, *logits(tokens=(4,)), labels)
    assert_same_jsd(theirs, *logits(tokens=(4,)), None)


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("gold", {"temperature": 0.9}),
        ("iw_opd", {"temperature": 0.9, "top_k": 0, "add_tail": True}),
        ("iw_opd", {"top_k": VOCAB, "add_tail": False}),
    ],
)
def test_trl_as_its_other_trainers_call_it(trl_trainers, trainer, options):
    """By keyword, as their `compute_loss` does."""
    student, teacher = logits()
    keywords = {"teacher_logits": teacher, "labels": labels_of(*TOKENS), "beta": 0.3, **options}
    found = trl.generalized_jsd_loss(student_logits=student, num_items_in_batch=4, **keywords)
    expected = trl_trainers[trainer].generalized_jsd_loss(
        student_logits=student, num_items_in_batch=4, **keywords
    )
    torch.testing.assert_close(found, expected)


def test_trl_signatures(trl_trainers):
    ours = inspect.signature(trl.generalized_jsd_loss).parameters.values()
    positional = {p.name: p.default for p in ours if p.kind is not p.KEYWORD_ONLY}
    gkd = defaults(trl_trainers["gkd"].generalized_jsd_loss)
    assert list(positional.items()) == list(gkd.items())
    others = {p.name: p.default for p in ours if p.kind is p.KEYWORD_ONLY}
    theirs = {}
    for name in ("gold", "iw_opd"):
        theirs |= defaults(trl_trainers[name].generalized_jsd_loss)
    assert positional | others == theirs


def test_trl_without_a_counted_token(trl_trainers):
    labels = torch.full(TOKENS, -100)
    for reduction in trl.REDUCTIONS:
        loss, gradient = jsd_and_gradient(
            trl.generalized_jsd_loss, *logits(), labels, reduction=reduction
        )
        assert loss == 0
        assert (gradient == 0).all()
    mean = trl_trainers["gkd"].generalized_jsd_loss(*logits(), labels, reduction="mean")
    assert mean.isnan(), "theirs is no longer NaN: the docstring says so"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "none"}, ValueError, r"reduction must be one of .*, got 'none'"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"logits_are_probs": True}, ValueError, "logits_are_probs=True is not served"),
        ({"top_k": 5}, ValueError, "top_k must be 0, or at least the vocabulary of 37, got 5"),
        ({"beta": 1.5}, ValueError, "beta must be"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch must be"),
        ({"num_items_in_batch": False}, TypeError, "num_items_in_batch must be a number"),
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, ValueError, "labels must have"),
        ({"labels": torch.zeros(TOKENS)}, TypeError, "labels must be one of"),
        ({"student_logits": [1.0]}, TypeError, "student_logits must be a tensor"),
        ({"teacher_logits": torch.zeros(*TOKENS, 38)}, ValueError, r"teacher_logits must have one"),
        (
            {"teacher_logits": torch.zeros(*TOKENS, VOCAB, requires_grad=True)},
            ValueError,
            "teacher_logits requires grad",
        ),
    ],
)
def test_trl_bad_input(change, error, message):
    arguments = dict(zip(("student_logits", "teacher_logits"), logits(), strict=True))
    with pytest.raises(error, match=message):
        trl.generalized_jsd_loss(**(arguments | change))


def test_trl_in_a_graph():
    compiled = torch.compile(trl.generalized_jsd_loss, fullgraph=True, backend="eager")
    student, teacher = logits()
    for labels in (None, labels_of(*TOKENS)):
        for reduction in trl.REDUCTIONS:
            torch.testing.assert_close(
                compiled(student, teacher, labels, reduction=reduction),
                trl.generalized_jsd_loss(student, teacher, labels, reduction=reduction),
            )


def test_trl_vectors_are_no_tokens():
    with pytest.raises(ValueError, match="student_logits and teacher_logits must have one shape"):
        trl.generalized_jsd_loss(torch.zeros(VOCAB), torch.zeros(VOCAB))


def gpt2(width: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=width,
            n_layer=1,
            n_head=2,
            # Far from the default's nearly uniform predictions, so that teacher and student differ.
            initializer_range=0.5,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def token_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of which row i counts i tokens fewer than row 0."""
    rows = []
    for i in range(count):
        tokens = torch.randint(1, VOCAB, (LENGTH,))
        labels = tokens.clone()
        labels[: 2 + i] = -100
        mask = torch.ones_like(tokens)
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return rows


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_trl_takes_the_same_step(trl_trainers, tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig

    class FusedGKDTrainer(trl_trainers["gkd"]):
        calls = 0

        @staticmethod
        def generalized_jsd_loss(*arguments, **keywords):
            FusedGKDTrainer.calls += 1
            return trl.generalized_jsd_loss(*arguments, **keywords)

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1")),
        eos_token="w0",
        pad_token="w0",
    )
    student, teacher = gpt2(STUDENT), gpt2(TEACHER)
    rows = datasets.Dataset.from_list(
        [{name: values.tolist() for name, values in row.items()} for row in token_rows(4)]
    )
    results = []
    for cls in (trl_trainers["gkd"], FusedGKDTrainer):
        trainer = cls(
            model=copy.deepcopy(student),
            teacher_model=teacher,
            args=GKDConfig(
                str(tmp_path),
                use_cpu=True,
                bf16=False,
                lmbda=0.0,
                max_steps=1,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                optim="sgd",
                learning_rate=0.1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                seed=0,
            ),
            data_collator=default_data_collator,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        results.append((trainer.state.log_history[-1]["train_loss"], trainer.model.state_dict()))
    (loss, weights), (fused_loss, fused_weights) = results
    assert FusedGKDTrainer.calls == 2
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert any((weights[name] != value).any() for name, value in student.state_dict().items())
    torch.testing.assert_close(fused_weights, weights, rtol=1e-5, atol=1e-6)


def heads(dtype=torch.float32, *, tokens=(13,), vocab=VOCAB, teacher_vocab=VOCAB, bias=False):
    """Arguments of Liger's names; logits have a standard deviation of 3."""
    arguments = {}
    for owner, width, rows in (("student", STUDENT, vocab), ("teacher", TEACHER, teacher_vocab)):
        arguments[f"{owner}_input"] = torch.randn(*tokens, width).to(dtype)
        arguments[f"{owner}_weight"] = (3 * width**-0.5 * torch.randn(rows, width)).to(dtype)
        if bias:
            arguments[f"{owner}_bias"] = torch.randn(rows).to(dtype)
    return arguments


def losses_and_gradients(module, arguments, incoming=1.0):
    leaves = {
        name: value.clone().requires_grad_(
            value.is_floating_point() and (name.startswith("student") or name == "teacher_weight")
        )
        for name, value in arguments.items()
    }
    losses = module(**leaves)
    total = losses[0] if isinstance(losses, tuple) else losses
    (incoming * total).backward()
    assert leaves["teacher_weight"].grad is None
    gradients = {n: leaf.grad for n, leaf in leaves.items() if n.startswith("student")}
    return losses if isinstance(losses, tuple) else (losses,), gradients


def in_float64(arguments):
    return {n: v.double() if v.is_floating_point() else v for n, v in arguments.items()}


WEIGHTS = [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.3, 2.4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("beta", "temperature"), [(0, 2.0), (0.3, 1.0), (0.5, 2.0), (1, 0.7)])
@pytest.mark.parametrize("bias", [True, False])
def test_liger_value_and_gradients(dtype, weights, beta, temperature, bias):
    """Liger's on the same values in float64: it has logits in the precision of its inputs."""
    theirs = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    settings = {
        "weight_hard_loss": weights[0],
        "weight_soft_loss": weights[1],
        "beta": beta,
        "ignore_index": 1,
        "temperature": temperature,
        "compiled": False,
        "chunk_size": 4,
        "return_soft_hard_loss": bias,
    }
    arguments = heads(dtype, bias=bias)
    labels = torch.randint(0, VOCAB, (13,))
    labels[::3] = 1
    arguments["true_labels"] = labels
    losses, gradients = losses_and_gradients(
        liger.LigerFusedLinearJSDLoss(**settings), arguments, incoming=3.0
    )
    expected, expected_gradients = losses_and_gradients(
        theirs(**settings), in_float64(arguments), incoming=3.0
    )
    assert len(losses) == len(expected) == (3 if bias else 1)
    for loss, expected_loss in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        assert_loss_close(loss, expected_loss, dtype)
    assert all(not part.requires_grad for part in losses[1:])
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_gradient_close(gradient, expected_gradients[name])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 0.0)])
def test_liger_where_there_is_nothing_to_learn(weights):
    theirs = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    ignored = torch.full((13,), -100) if any(weights) else labels_of(13)
    arguments = heads() | {"true_labels": ignored}
    for cls in (theirs, liger.LigerFusedLinearJSDLoss):
        (loss,), gradients = losses_and_gradients(cls(*weights, compiled=False), arguments)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients.values())


def test_liger_without_a_hard_term_takes_any_label():
    theirs = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    arguments = heads() | {"true_labels": torch.arange(VOCAB - 3, VOCAB + 10)}
    settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False}
    torch.testing.assert_close(
        liger.LigerFusedLinearJSDLoss(**settings)(**arguments), theirs(**settings)(**arguments)
    )
    with pytest.raises(ValueError, match=r"labels must be in \[0, 37\)"):
        liger.LigerFusedLinearJSDLoss()(**arguments)


def test_liger_with_a_teacher_that_is_padded():
    """Theirs gives the student probability in the padding; ours is theirs of what both have."""
    theirs = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(compiled=False)
    arguments = heads(teacher_vocab=VOCAB + 27, bias=True) | {"true_labels": labels_of(13)}
    loss = liger.LigerFusedLinearJSDLoss()(**arguments)
    cut = {n: arguments[n][:VOCAB] for n in ("teacher_weight", "teacher_bias")}
    torch.testing.assert_close(loss, theirs(**arguments | cut))
    assert (theirs(**arguments) - loss).abs() > 0.01, "the docstring says that it differs"


INTERPRETED = """
import sys, torch
from liger_kernel.transformers import LigerFusedLinearJSD

arguments, settings = torch.load(sys.argv[1])
results = []
for labels in (arguments.pop("shift_labels"), None):
    for setting in settings:
        leaves = {n: v.clone() for n, v in arguments.items()}
        for name in ("student_input", "student_weight"):
            leaves[name].requires_grad_()
        loss = LigerFusedLinearJSD(**setting)(**leaves, shift_labels=labels)
        loss.backward()
        results.append((loss.detach(), leaves["student_input"].grad, leaves["student_weight"].grad))
torch.save(results, sys.argv[2])
"""


def test_liger_in_triton(tmp_path, monkeypatch):
    """Its kernels run in Triton's interpreter, which is chosen before they are imported."""
    peer("liger_kernel.transformers", "LigerFusedLinearJSD")
    settings = [
        {"jsd_beta": beta, "temperature": temperature, "ignore_index": 1}
        for beta, temperature in ((0.0, 2.0), (0.3, 1.0), (1.0, 0.7))
    ]
    labels = torch.randint(0, VOCAB, (13,))
    labels[::3] = 1
    arguments = heads() | {"shift_labels": labels}
    torch.save((arguments, settings), tmp_path / "arguments")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    subprocess.run(
        [sys.executable, "-c", INTERPRETED, tmp_path / "arguments", tmp_path / "results"],
        check=True,
        capture_output=True,
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    expected = iter(torch.load(tmp_path / "results"))
    for shift_labels in (labels, None):
        for setting in settings:
            leaves = {
                # Of the teacher too: a head's parameters require grad in Liger's own examples.
                name: value.clone().requires_grad_()
                for name, value in heads_of(arguments).items()
            }
            loss = liger.LigerFusedLinearJSD(**setting)(**leaves, shift_labels=shift_labels)
            loss.backward()
            expected_loss, *expected_gradients = next(expected)
            torch.testing.assert_close(loss.detach(), expected_loss)
            for name, gradient in zip(
                ("student_input", "student_weight"), expected_gradients, strict=True
            ):
                assert relative_error(leaves[name].grad, gradient) < 5e-6
            assert leaves["teacher_weight"].grad is None


def heads_of(arguments):
    return {n: v for n, v in arguments.items() if n.endswith(("_input", "_weight"))}


@pytest.mark.parametrize("cls", [liger.LigerFusedLinearJSDLoss, liger.LigerFusedLinearJSD])
def test_liger_in_a_graph(cls):
    arguments = (*heads().values(), labels_of(13))
    torch.testing.assert_close(
        torch.compile(cls(), fullgraph=True, backend="eager")(*arguments), cls()(*arguments)
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss"),
        ("liger_kernel.transformers", "LigerFusedLinearJSD"),
    ],
)
def test_liger_signatures(module, name):
    theirs, ours = peer(module, name), getattr(liger, name)
    for method in ("__init__", "forward"):
        expected = defaults(getattr(theirs, method))
        assert list(defaults(getattr(ours, method)).items()) == list(expected.items())
    made = ours()
    for attribute, value in vars(theirs()).items():
        if not attribute.startswith("_"):
            assert getattr(made, attribute) == value


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weight_hard_loss": -0.5}, ValueError, "weight_hard_loss must be"),
        ({"weight_soft_loss": "1"}, TypeError, "weight_soft_loss must be a number"),
        ({"beta": 2.0}, ValueError, "beta must be"),
        ({"temperature": 0}, ValueError, "temperature must be"),
    ],
)
def test_liger_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        liger.LigerFusedLinearJSDLoss(**settings)
    renamed = {"jsd_beta" if name == "beta" else name: v for name, v in settings.items()}
    if not any(name.startswith("weight") for name in settings):
        with pytest.raises(error, match=message):
            liger.LigerFusedLinearJSD(**renamed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_input": None}, TypeError, "student_input must be a tensor"),
        (
            {"teacher_weight": torch.zeros(VOCAB, 9)},
            ValueError,
            "teacher_input must be .*teacher_w",
        ),
        ({"teacher_input": torch.zeros(12, TEACHER)}, ValueError, "teacher_input must have"),
        ({"student_weight": torch.zeros(40, STUDENT)}, ValueError, "student_weight .* 37 rows"),
        ({"true_labels": torch.zeros(12).long()}, ValueError, "true_labels must have"),
        ({"true_labels": torch.zeros(13)}, TypeError, "true_labels must be one of"),
        ({"student_bias": torch.zeros(36)}, ValueError, "student_bias must have"),
        ({"teacher_bias": 1.0}, TypeError, "teacher_bias must be a tensor"),
    ],
)
def test_liger_bad_input(change, error, message):
    arguments = heads() | {"true_labels": labels_of(13)} | change
    with pytest.raises(error, match=message):
        liger.LigerFusedLinearJSDLoss()(**arguments)
    if "teacher_bias" in change or "student_bias" in change:
        return
    arguments["shift_labels"] = arguments.pop("true_labels")
    message = message.replace("true", "shift").replace("student_weight .* 37 rows", "40 rows")
    with pytest.raises(error, match=message):
        liger.LigerFusedLinearJSD()(**arguments)


def page(name: str) -> str:
    return ROOT.joinpath("docs", name).read_text("utf-8")


def llama(width: int, vocab_size: int = VOCAB) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.5,
        )
    )


def blocks_of(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)


def given_to_blocks(rows: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    """What the page takes for granted."""
    student, teacher = llama(STUDENT), llama(TEACHER)
    return {
        "student": student,
        "teacher": teacher,
        "device": "cpu",
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.01),
        "loader": [default_data_collator(rows[i : i + 2]) for i in range(0, len(rows), 2)],
        "larger_teacher_logits": torch.randn(2, LENGTH, VOCAB + 3),
        "tokenizer": range(VOCAB),
        "student_head": torch.nn.Linear(STUDENT, VOCAB),
        "teacher_head": torch.nn.Linear(TEACHER, VOCAB).requires_grad_(False),
    }


@pytest.mark.filterwarnings("ignore")
def test_the_documented_loop_runs(monkeypatch):
    """Every block of the page, in order and in one namespace."""
    pytest.importorskip("trl")
    # The graph without the compiler behind it.
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *model, **options: compiler(*model, **{"backend": "eager"} | options),
    )
    rows = token_rows(8)
    given = given_to_blocks(rows)
    student, teacher = given["student"], given["teacher"]
    blocks = blocks_of("your-own-loop.md")
    assert len(blocks) == 11
    for number, block in enumerate(blocks):
        if "DistributedDataParallel" in block:
            # It has a test of its own, in two processes.
            continue
        if "compiled_loss" in block:
            given["logits"], given["teacher_logits"] = torch.randn(2, 2, LENGTH, VOCAB).unbind()
            given["batch"] = {"labels": torch.randint(0, VOCAB, (2, LENGTH))}
        elif "larger_teacher_logits" in block:
            given["logits"] = torch.randn(2, LENGTH, VOCAB)
        elif "LigerFusedLinearJSDLoss" in block:
            given["hidden"], given["teacher_hidden"] = (
                torch.randn(5, STUDENT),
                torch.randn(5, TEACHER),
            )
            given["labels"] = labels_of(5)
        exec(compile(block, f"block {number}", "exec"), given)
        if "loss" in given:
            assert torch.isfinite(given["loss"]), block

    batches = given["loader"]
    whole = {n: torch.cat([batch[n] for batch in batches[:2]]) for n in batches[0]}
    # Accumulated over batches of different lengths, the gradient is that of all tokens at once.
    student.zero_grad()
    given["optimizer"].param_groups[0]["lr"] = 0.0
    given["step"](batches[:2])
    accumulated = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    given["loss_of"](whole).backward()
    for parameter, expected in zip(student.parameters(), accumulated, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        given["hidden_loss_of"](whole), given["loss_of"](whole), rtol=1e-5, atol=0
    )
    # Its own definition, by hand, on the tokens that count.
    with torch.no_grad():
        inputs = given["inputs_of"](whole)
        counted = whole["labels"][:, 1:] != -100
        s, t = (m(**inputs).logits[:, :-1][counted] for m in (student, teacher))
        soft = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
        by_hand = 0.5 * 4 * soft + 0.5 * F.cross_entropy(s, whole["labels"][:, 1:][counted])
    torch.testing.assert_close(given["loss_of"](whole).detach(), by_hand)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_documented_trainer(tmp_path, accumulate):
    rows = token_rows(4)
    given = given_to_blocks(rows)
    first, *others = blocks_of("your-own-loop.md")
    (trainer,) = (block for block in others if "class KDTrainer" in block)
    exec(first.split("for batch in loader")[0] + trainer, given)
    before = given["loss_of"](default_data_collator(rows)).item()
    trainer = given["KDTrainer"](
        model=given["student"],
        args=TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            learning_rate=0.1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train()
    # Rows of different lengths: a mean of the batches' means would be another number.
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(before, rel=1e-5)
    after = given["loss_of"](default_data_collator(rows)).item()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(after, rel=1e-5)
    assert after < before


def gradients_of_a_rank(rank: int, rows: list, weights: dict) -> list[dict[str, torch.Tensor]]:
    """Of a step on the rank's own batch, wrapped as the page says and as it says instead."""
    from torch.distributed.fsdp import fully_shard

    first, *others = blocks_of("your-own-loop.md")
    (several,) = (block for block in others if "fully_shard" in block)
    results = []
    for wrap in ("DistributedDataParallel", "fully_shard"):
        given = given_to_blocks(rows) | {"fully_shard": fully_shard}
        for owner in ("student", "teacher"):
            given[owner].load_state_dict(weights[owner])
        exec(first.split("for batch in loader")[0], given)
        given["batch"] = given["loader"][rank]
        exec(several.replace("DistributedDataParallel(Dist", f"{wrap}(Dist"), given)
        gradients = {name: p.grad for name, p in given["student"].named_parameters()}
        results.append(
            {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
        )
    return results


def test_the_documented_step_of_several_processes():
    """Two ranks with batches of different lengths have the gradient of all tokens at once."""
    rows = token_rows(4)
    given = given_to_blocks(rows)
    weights = {owner: given[owner].state_dict() for owner in ("student", "teacher")}
    ranks = run_on_ranks(2, gradients_of_a_rank, rows, weights)
    whole = default_data_collator(rows)
    inputs = {name: whole[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher_logits = given["teacher"](**inputs).logits
    logits = given["student"](**inputs).logits
    kdfast.kd_loss(logits[:, :-1], teacher_logits[:, :-1], whole["labels"][:, 1:]).backward()
    for gradients in (wrapped for rank in ranks for wrapped in rank):
        for name, parameter in given["student"].named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "row", "keyword", "value"),
    [
        (Gemma2Config, "Gemma 2", "student_softcap", lambda c: c.final_logit_softcapping),
        (CohereConfig, "Cohere", "student_logit_scale", lambda c: c.logit_scale),
        (GraniteConfig, "Granite", "student_logit_scale", lambda c: 1 / c.logits_scaling),
    ],
)
def test_what_models_do_to_their_logits(config, row, keyword, value):
    """The page's table: the head's output with the documented keyword is the model's logits."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": STUDENT,
        "intermediate_size": STUDENT,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "initializer_range": 0.5,
    }
    if config is GraniteConfig:
        sizes["logits_scaling"] = 3.0
        del sizes["head_dim"]
    model = AutoModelForCausalLM.from_config(config(**sizes, pad_token_id=0))
    (documented,) = re.findall(rf"^\| {row} \| `(\w+)=(.*?)` \|$", page("your-own-loop.md"), re.M)
    assert documented[0] == keyword
    assert eval(documented[1], {"config": model.config}) == value(model.config) != 1
    ids = torch.randint(1, VOCAB, (2, LENGTH))
    with torch.no_grad():
        expected = model(ids).logits
        hidden = model.base_model(ids).last_hidden_state
        weight = model.get_output_embeddings().weight
        teacher = torch.randn(2, LENGTH, TEACHER), torch.randn(VOCAB, TEACHER)
        loss = kdfast.linear_kd_loss(hidden, weight, *teacher, **{keyword: value(model.config)})
        torch.testing.assert_close(loss, kdfast.kd_loss(expected, teacher[0] @ teacher[1].T))


@pytest.mark.filterwarnings("ignore:reduction. .mean")
def test_the_table_of_other_losses(trl_trainers):
    """Rows of the page's table whose other side is a function at hand."""
    student, teacher = logits(tokens=(15,))
    log_q, p = F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1)
    torch.testing.assert_close(
        kdfast.kd_loss(student, teacher, temperature=2.0, num_items=15 * VOCAB),
        4 * F.kl_div(log_q, p, reduction="mean"),
    )
    torch.testing.assert_close(
        kdfast.kd_loss(
            student, teacher, divergence="jsd", beta=0.2, temperature=2.0, scale_t2=False
        ),
        trl_trainers["gkd"].generalized_jsd_loss(student, teacher, beta=0.2, temperature=2.0),
    )
    arguments = heads()
    hidden = [
        arguments[f"{owner}_{what}"]
        for owner in ("student", "teacher")
        for what in ("input", "weight")
    ]
    divergence = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    per_token, _ = divergence.apply(*hidden[:2], None, *hidden[2:], None, 1.0, 2.0)
    torch.testing.assert_close(
        kdfast.linear_kd_loss(
            *hidden, divergence="jsd", beta=1.0, temperature=2.0, scale_t2=False, reduction="none"
        ),
        per_token,
        rtol=1e-4,
        atol=1e-6,
    )
    chunked = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    labels = labels_of(13)
    torch.testing.assert_close(
        kdfast.linear_kd_loss(*hidden, labels, divergence="jsd", temperature=2.0, alpha=0.3),
        chunked(0.7, 0.3 * 4, temperature=2.0, compiled=False)(*hidden, labels),
    )


def test_every_variable_is_on_its_page():
    """And none that nothing reads. Macros of the C++ sources are not settings."""
    sources = [
        ROOT / "setup.py",
        ROOT / "Makefile",
        *(
            path
            for folder in ("kdfast", "kernels", "csrc")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".txt")
        ),
    ]
    text = "\n".join(path.read_text("utf-8") for path in sources)
    macros = set(re.findall(r"#define (KDFAST_[A-Z0-9_]+)", text))
    used = set(re.findall(r"KDFAST_[A-Z0-9_]+", text)) - macros
    assert {"KDFAST_BACKEND", "KDFAST_CHUNK_BYTES", "KDFAST_BUILD_CUDA"} <= used
    assert used == set(re.findall(r"KDFAST_[A-Z0-9_]+", page("settings.md")))


def test_the_documented_backend_runs():
    (block,) = blocks_of("settings.md")
    student, teacher = logits()
    given = {"kdfast": kdfast, "student_logits": student, "teacher_logits": teacher}
    exec(block, given)
    torch.testing.assert_close(given["loss"], kdfast.kd_loss(student, teacher))


def test_the_defaults_on_the_settings_page():
    from kdfast.ops import head, hidden, matmul, registry

    rows = dict(re.findall(r"^\| `(KDFAST_\w+)` \| (.*)$", page("settings.md"), re.M))
    for names, row in (
        (("auto", *registry.BACKENDS), rows["KDFAST_BACKEND"]),
        (matmul.CHOICES, rows["KDFAST_MATMUL"]),
    ):
        assert row.startswith(", ".join(f"`{name}`" for name in names) + " |")
    assert f"{head.CHUNK_BYTES['cpu']} (128 MiB) on the CPU" in rows["KDFAST_CHUNK_BYTES"]
    assert f"{head.CHUNK_BYTES['cuda']} (1 GiB) elsewhere" in rows["KDFAST_CHUNK_BYTES"]
    assert f"{hidden.PROJECTED_BYTES >> 20} MiB" in rows["KDFAST_CHUNK_BYTES"]


@pytest.mark.parametrize("name", ["generalized_jsd_loss", "LigerFusedLinearJSD"])
def test_labels_of_few_bits(name):
    """156 is no −100, though the two have the same eight bits."""
    hidden, weight = torch.randn(2, 3, 8), torch.randn(2, 200, 8)
    labels = torch.tensor([156, 1, 2])

    def loss(labels):
        if name == "generalized_jsd_loss":
            return trl.generalized_jsd_loss(*(hidden @ weight.mT), labels)
        distill = liger.LigerFusedLinearJSD()
        return distill(hidden[0], weight[0], hidden[1], weight[1], labels)

    assert torch.equal(loss(labels.to(torch.uint8)), loss(labels))
