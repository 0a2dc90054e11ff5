"""The CUDA kernel of kd_loss on a device with thread-block clusters, against float64.

The cases of the Triton kernel, and those that are this kernel's own: sizes of clusters, rows that
are misaligned in every way, mixed types.
"""

import itertools
import math

import pytest
import torch

# Collected here a second time, for this backend.
from test_gpu_kd_loss import (  # noqa: F401
    _free_memory,
    logits,
    loss_and_gradient,
    oracle,
    some_labels,
    test_a_loss_scale_keeps_small_float16_gradients,
    test_a_retained_graph_gives_the_gradient_again,
    test_compiles_whole_and_with_dynamic_shapes,
    test_incoming_gradients,
    test_large_logits_and_extreme_temperatures,
    test_matches_reference,
    test_no_memory_of_the_logits_size_but_the_gradient,
    test_no_probability_and_nan,
    test_opcheck,
    test_overwriting_the_students_logits,
    test_past_two_to_the_31_elements,
    test_same_bits_every_run,
    test_small_vocabularies,
    test_stays_exact_as_the_student_converges,
    test_views_padding_and_ignored_rows,
)
from tolerances import assert_gradient_close, assert_loss_close

import kdfast
from kdfast.ops import kd_loss as kd_loss_ops
from kdfast.ops import registry
from kdfast.reference import DIVERGENCES

pytestmark = pytest.mark.gpu
if registry.missing("cuda") is not None:
    pytest.skip(registry.missing("cuda"), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _by_cuda(monkeypatch):
    """Whoever asks for the Triton kernel gets this one."""
    backend = kdfast.backend
    monkeypatch.setattr(
        kdfast, "backend", lambda name: backend("cuda" if name == "triton" else name)
    )


@pytest.fixture
def of_blocks(monkeypatch):
    """Makes clusters of a size, where the device can schedule them."""

    def choose(blocks):
        monkeypatch.setattr(kd_loss_ops, "_cluster_blocks", lambda *_: (blocks, ""))

    return choose


def misaligned(values, offset):
    storage = torch.empty(values.numel() + offset, dtype=values.dtype, device="cuda")
    return storage[offset:].view(values.shape).copy_(values)


def test_it_is_what_serves_a_call():
    with kdfast.backend("auto"):
        chosen = registry.select("kd_loss", kd_loss_ops.BACKENDS, logits(1, 8))
    assert chosen is kd_loss_ops._cuda_rows


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_size_of_a_cluster(divergence, blocks, of_blocks):
    of_blocks(blocks)
    most_bytes = torch.cuda.get_device_properties().shared_memory_per_block_optin
    for vocab, dtype in itertools.product((5, 1000, 32003), DTYPES):
        name = str(dtype).removeprefix("torch.")
        if registry.extension().kd_loss_block_bytes(vocab, blocks, name, name) > most_bytes:
            continue
        student, teacher = logits(6, vocab, dtype=dtype), logits(6, vocab, dtype=dtype)
        labels = some_labels(6, vocab=vocab)
        options = {"divergence": divergence, "beta": 0.3, "alpha": 0.4, "temperature": 2.0}
        loss, gradient = loss_and_gradient(student, teacher, labels, **options)
        expected, expected_gradient = oracle(student, teacher, labels, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
        assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize("vocab", [30522, 151936, 262144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_vocabularies(dtype, vocab):
    student, teacher = logits(3, vocab, dtype=dtype), logits(3, vocab, dtype=dtype)
    labels = some_labels(3, vocab=vocab)
    for divergence in ("forward_kl", "jsd"):
        options = {"divergence": divergence, "alpha": 0.5, "temperature": 2.0}
        loss, gradient = loss_and_gradient(student, teacher, labels, **options)
        expected, expected_gradient = oracle(student, teacher, labels, **options)
        assert_loss_close(loss, expected, dtype)
        assert_gradient_close(gradient, expected_gradient)


def test_a_row_that_fits_no_cluster():
    student, teacher = logits(1, 2**20), logits(1, 2**20)
    with (
        kdfast.backend("cuda"),
        pytest.raises(RuntimeError, match=r"'cuda' cannot serve .*1048576"),
    ):
        kdfast.kd_loss(student, teacher)
    with kdfast.backend("auto"):
        loss = kdfast.kd_loss(student, teacher)
    assert_loss_close(loss, oracle(student, teacher)[0], torch.float32)


@pytest.mark.parametrize("offsets", [(0, 5), (5, 0), (3, 3), (7, 1)])
@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), itertools.product(DTYPES, DTYPES))
def test_any_alignment_and_type(student_dtype, teacher_dtype, offsets):
    for vocab, divergence in itertools.product((131, 40961), ("reverse_kl", "skew_forward_kl")):
        student = misaligned(logits(3, vocab, dtype=student_dtype), offsets[0])
        teacher = misaligned(logits(3, vocab, dtype=teacher_dtype), offsets[1])
        loss, gradient = loss_and_gradient(student, teacher, divergence=divergence)
        expected, expected_gradient = oracle(student, teacher, divergence=divergence)
        assert_loss_close(loss, expected, student_dtype)
        assert_gradient_close(gradient, expected_gradient)


def test_a_teacher_in_float64():
    student, teacher = logits(3, 1003), logits(3, 1003).double()
    loss, gradient = loss_and_gradient(student, teacher)
    expected, expected_gradient = oracle(student, teacher)
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
def test_gradients_of_another_type(gradient_dtype):
    """As linear_kd_loss asks for them, of float32 logits."""
    student, teacher = logits(1, 4, 50257), logits(1, 4, 50257)
    gradient = torch.empty(student.shape, dtype=gradient_dtype, device="cuda")
    options = {
        "divergence": "jsd", "beta": 0.5, "scale_t2": True, "alpha": 1.0, "ignore_index": -100,
        "vocab_size": 50257, "need_hard": False,
    }  # fmt: skip
    grad_scale = torch.tensor([0.25], device="cuda")
    kd_loss_ops._cuda_rows(student, teacher, None, None, 1.0, 1.0, grad_scale, gradient, **options)
    assert_gradient_close(gradient, oracle(student, teacher, divergence="jsd")[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_per_row(divergence):
    student, teacher = logits(2, 4, 32003), logits(2, 4, 32003)
    labels = torch.randint(32003, (2, 4), device="cuda").int()
    per_token = {
        name: torch.rand(2, 4, device="cuda") + 0.5
        for name in ("token_weight", "temperature", "teacher_temperature")
    }
    options = {"divergence": divergence, "alpha": 0.4, "reduction": "sum"}
    results = []
    for backend in ("cuda", "torch"):
        leaf = student.clone().requires_grad_()
        with kdfast.backend(backend):
            loss = kdfast.kd_loss(leaf, teacher, labels, **per_token, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_only_the_loss():
    student, teacher = logits(8, 50257, dtype=torch.bfloat16), logits(8, 50257)
    for divergence in DIVERGENCES:
        loss, _ = loss_and_gradient(student, teacher, divergence=divergence)
        with torch.no_grad(), kdfast.backend("cuda"):
            assert torch.equal(kdfast.kd_loss(student, teacher, divergence=divergence), loss)


@pytest.mark.parametrize("blocks", [1, 4, 16])
def test_a_label_in_any_block(blocks, of_blocks):
    """The block that has the label writes the losses, while others write the gradient over it."""
    of_blocks(blocks)
    vocab = 50257
    student, teacher = (logits(16, vocab, dtype=torch.bfloat16) for _ in range(2))
    labels = torch.linspace(0, vocab - 1, 16, device="cuda").long()
    options = {"alpha": 0.5, "temperature": 2.0}
    expected, expected_gradient = oracle(student, teacher, labels, **options)
    for overwrite in (False, True):
        loss, gradient = loss_and_gradient(
            student, teacher, labels, overwrite_student_logits=overwrite, **options
        )
        assert_loss_close(loss, expected, torch.bfloat16)
        assert_gradient_close(gradient, expected_gradient)


def test_a_term_without_a_share_may_be_infinite():
    student, teacher = logits(4, 1003), logits(4, 1003)
    teacher[:, :100] = -math.inf
    labels = some_labels(4, vocab=1003)
    loss, gradient = loss_and_gradient(student, teacher, labels, divergence="reverse_kl", alpha=0.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_linear_kd_loss_takes_it(monkeypatch):
    used = []

    def counted(*args, **kwargs):
        used.append(args[0].dtype)
        return kd_loss_ops._cuda_rows(*args, **kwargs)

    monkeypatch.setitem(kd_loss_ops.BACKENDS, "cuda", counted)
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1003, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for backend in ("auto", "torch"):
        with kdfast.backend(backend):
            loss = kdfast.linear_kd_loss(
                hidden, weight, hidden.detach().flip(0), weight.detach(), chunk_size=24
            )
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert used == [torch.float32] * 3
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-5)


@pytest.mark.parametrize("blocks", [1, 2, 16])
def test_for_the_sanitizer(blocks, of_blocks):
    """A few small calls that take every path: `make gpu-test` runs them under compute-sanitizer."""
    of_blocks(blocks)
    for vocab, dtype in ((5, torch.float16), (3001, torch.bfloat16), (8192, torch.float32)):
        student = misaligned(logits(3, vocab + 3, dtype=dtype), 3)
        teacher = misaligned(logits(3, vocab + 1, dtype=torch.bfloat16), 1)
        labels = torch.tensor([0, -100, vocab - 1], device="cuda")
        for divergence in ("forward_kl", "jsd"):
            options = {"divergence": divergence, "alpha": 0.5, "vocab_size": vocab}
            _, gradient = loss_and_gradient(student, teacher, labels, **options)
            _, same = loss_and_gradient(
                student, teacher, labels, overwrite_student_logits=True, **options
            )
            assert gradient.isfinite().all()
            assert torch.equal(gradient, same)
            assert math.isfinite(gradient.float().norm())
