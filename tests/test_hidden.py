import copy
import inspect
import itertools
import pickle

import products
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import peak_bytes
from tolerances import assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import reference
from kdfast.ops import head, hidden

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("student", "weight", "bias")
OPERATIONS = {"hidden_mse": kdfast.hidden_mse, "hidden_cosine": kdfast.hidden_cosine}
CASES = ("hidden_mse", "hidden_cosine", "projected")
BACKENDS = [name for name in ("cpp", "torch") if name in kdfast.available_backends()]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    # Three rows of 20 features and a few of the others: no test fits into one chunk.
    monkeypatch.setenv("KDFAST_CHUNK_BYTES", "600")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kdfast.backend(request.param):
        yield request.param


def states(case, *tokens, width=20, student=12, dtype=torch.float32):
    """The tensor arguments of a case: a projection has a bias too."""
    width_s = student if case == "projected" else width
    arguments = {
        "student": torch.randn(*tokens, width_s).to(dtype),
        "teacher": torch.randn(*tokens, width).to(dtype),
    }
    if case == "projected":
        arguments["weight"] = (width_s**-0.5 * torch.randn(width, width_s)).to(dtype)
        arguments["bias"] = torch.randn(width).to(dtype)
    return arguments


def function(case):
    return kdfast.hidden_cosine if case == "hidden_cosine" else kdfast.hidden_mse


def specification(case):
    return reference.hidden_cosine_rows if case == "hidden_cosine" else reference.hidden_mse_rows


def leaves(arguments):
    return {
        name: value.detach().clone().requires_grad_() if name in NAMES else value
        for name, value in arguments.items()
    }


def gradients(arguments):
    return {name: arguments[name].grad for name in NAMES if name in arguments}


def loss_and_gradients(case, arguments, incoming=None, **options):
    arguments = leaves(arguments)
    loss = function(case)(**arguments, **options)
    loss.backward(incoming)
    return loss.detach(), gradients(arguments)


def oracle(case, arguments, incoming=None, *, mask=None, reduction="mean"):
    """Loss and gradients in float64, by differentiating the specification."""
    arguments = leaves({name: value.double() for name, value in arguments.items()})
    loss = specification(case)(**arguments, mask=mask)
    if reduction != "none":
        counted = loss.numel() if mask is None else mask.sum()
        loss = loss.sum() / (counted if reduction == "mean" else 1)
    loss.backward(incoming)
    return loss.detach(), gradients(arguments)


def assert_same(result, expected, dtype):
    assert_loss_close(result[0], expected[0], dtype)
    assert result[1].keys() == expected[1].keys()
    for name, gradient in result[1].items():
        assert gradient.dtype == dtype
        assert_gradient_close(gradient, expected[1][name])


# The specification.


def test_reference_by_hand():
    student, teacher = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0]]),
        torch.tensor([[4.0, 3.0], [0.0, 2.0]]),
    )
    torch.testing.assert_close(
        reference.hidden_mse_rows(student, teacher), torch.tensor([1.0, 2.5])
    )
    torch.testing.assert_close(
        reference.hidden_cosine_rows(student, teacher), torch.tensor([1 / 25, 1.0])
    )
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.0, -1.0])
    torch.testing.assert_close(
        reference.hidden_mse_rows(student, teacher, weight, bias), torch.tensor([8.5, 5.0])
    )


def test_reference_is_what_torch_computes():
    tensors = states("projected", 4, 6, dtype=torch.float64)
    projected = F.linear(*(tensors[name] for name in NAMES))
    rows = reference.hidden_mse_rows(**tensors)
    torch.testing.assert_close(rows.mean(), F.mse_loss(projected, tensors["teacher"]))
    tensors = states("hidden_cosine", 4, 6, dtype=torch.float64)
    tensors["student"][0, 0] = tensors["teacher"][1, 1] = 0
    rows = reference.hidden_cosine_rows(**tensors)
    torch.testing.assert_close(rows, 1 - F.cosine_similarity(*tensors.values(), dim=-1))
    flat = [side.flatten(0, 1) for side in tensors.values()]
    torch.testing.assert_close(rows.mean(), F.cosine_embedding_loss(*flat, torch.ones(24)))


def test_reference_counts_what_the_mask_says():
    for case in CASES:
        tensors, mask = states(case, 5), torch.tensor([True, False, True, True, False])
        rows = specification(case)(**tensors, mask=mask)
        assert torch.equal(rows[mask], specification(case)(**tensors)[mask])
        assert (rows[~mask] == 0).all()


# Against it.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("width", [1, 7, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype, width, reduction, backend):
    arguments = states(case, 3, 7, width=width, dtype=dtype)
    mask = torch.rand(3, 7) < 0.7
    incoming = None
    if reduction == "none":
        incoming = torch.randn(3, 7, dtype=torch.float64 if dtype == torch.float64 else None)
    if case == "hidden_cosine" and width == 1:
        # The cosine of numbers is the sign of their product, which has no gradient.
        loss, found = loss_and_gradients(case, arguments, incoming, reduction=reduction)
        signs = (arguments["student"] * arguments["teacher"]).squeeze(-1).sign().double()
        expected = {"mean": (1 - signs).mean(), "sum": (1 - signs).sum(), "none": 1 - signs}
        torch.testing.assert_close(loss.double(), expected[reduction])
        assert found["student"].abs().max() < 1e-4
        return
    options = {"mask": mask, "reduction": reduction}
    result = loss_and_gradients(case, arguments, incoming, **options)
    double = None if incoming is None else incoming.double()
    assert result[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(result, oracle(case, arguments, double, **options), dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (2, 3, 4)])
def test_leading_shapes(leading, case, backend):
    arguments = states(case, *leading)
    result = loss_and_gradients(case, arguments, reduction="sum")
    expected = oracle(case, arguments, reduction="sum")
    torch.testing.assert_close(result[0].double(), expected[0], rtol=1e-6, atol=0)
    for name, gradient in result[1].items():
        torch.testing.assert_close(gradient.double(), expected[1][name], rtol=1e-5, atol=1e-7)
    per_token = function(case)(**arguments, reduction="none")
    assert per_token.shape == leading
    torch.testing.assert_close(per_token.sum(), result[0])


def test_a_projection_onto_no_features(monkeypatch, backend):
    monkeypatch.setattr(hidden, "fresh", lambda *size, **like: torch.full(size, torch.nan, **like))
    student, weight = torch.randn(2, 3, requires_grad=True), torch.randn(0, 3, requires_grad=True)
    loss = kdfast.hidden_mse(student, torch.randn(2, 0), weight=weight)
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("budget", ["1", "300", "5000", "1000000", None])
@pytest.mark.parametrize("case", CASES)
def test_every_chunk_gives_the_same(case, budget, monkeypatch, backend):
    if budget is None:
        monkeypatch.delenv("KDFAST_CHUNK_BYTES")
    else:
        monkeypatch.setenv("KDFAST_CHUNK_BYTES", budget)
    arguments = states(case, 130)
    mask = torch.rand(130) < 0.8
    result = loss_and_gradients(case, arguments, mask=mask)
    assert_same(result, oracle(case, arguments, mask=mask), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, reduction, backend):
    arguments = leaves(states(case, 2, 3, width=5, student=4, dtype=torch.float64))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    names = [name for name in NAMES if name in arguments]

    def loss(*students):
        changed = dict(zip(names, students, strict=True))
        return function(case)(**{**arguments, **changed}, mask=mask, reduction=reduction)

    assert torch.autograd.gradcheck(loss, [arguments[name] for name in names])


@pytest.mark.parametrize("case", CASES)
def test_strided_inputs(case, backend):
    arguments = states(case, 4, 9)
    expected = loss_and_gradients(case, arguments)
    strided = {name: value.repeat_interleave(2, -1)[..., ::2] for name, value in arguments.items()}
    strided["student"] = strided["student"].transpose(0, 1).contiguous().transpose(0, 1)
    if case == "projected":
        strided["weight"] = strided["weight"].t().contiguous().t()
    assert_same(loss_and_gradients(case, strided), expected, torch.float32)


def test_mean_is_torchs_over_the_tokens_that_count(backend):
    arguments, mask = states("projected", 3, 7), torch.rand(3, 7) < 0.6
    projected = F.linear(*(arguments[name] for name in NAMES))
    expected = F.mse_loss(projected[mask], arguments["teacher"][mask])
    torch.testing.assert_close(kdfast.hidden_mse(**arguments, mask=mask), expected)
    # As the docstring says of the sum.
    expected = F.mse_loss(projected[mask], arguments["teacher"][mask], reduction="sum") / 20
    found = kdfast.hidden_mse(**arguments, mask=mask, reduction="sum")
    torch.testing.assert_close(found, expected)


def test_without_a_bias(backend):
    arguments = states("projected", 9)
    del arguments["bias"]
    result = loss_and_gradients("projected", arguments)
    assert_same(result, oracle("projected", arguments), torch.float32)


@pytest.mark.parametrize("wider", ["student", "teacher", "weight"])
def test_dtypes_that_differ(wider, backend):
    arguments = {n: v.bfloat16() for n, v in states("projected", 9).items()}
    expected = oracle("projected", arguments)
    arguments[wider] = arguments[wider].double()
    loss, found = loss_and_gradients("projected", arguments)
    assert loss.dtype == (torch.float32 if wider == "teacher" else torch.float64)
    assert_loss_close(loss, expected[0], loss.dtype)
    for name, gradient in found.items():
        assert gradient.dtype == arguments[name].dtype
        assert_gradient_close(gradient, expected[1][name])


@pytest.mark.parametrize("width", [2048, 2049, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rows_of_more_than_a_chunk(case, dtype, width, backend):
    arguments = states(case, 5, width=width, dtype=dtype)
    result = loss_and_gradients(case, arguments)
    assert_same(result, oracle(case, arguments), dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_views_of_hidden_states(name, backend):
    # All but the first token, as a model's hidden states without the [CLS] are.
    arguments = states(name, 4, 9, dtype=torch.bfloat16)
    mask = torch.rand(4, 8) < 0.7
    views = {side: value[:, 1:] for side, value in arguments.items()}
    assert not views["student"].is_contiguous()
    result = OPERATIONS[name](**leaves(views), mask=mask, reduction="none")
    copies = {side: value.contiguous() for side, value in views.items()}
    assert torch.equal(result, OPERATIONS[name](**copies, mask=mask, reduction="none"))
    student = arguments["student"].clone().requires_grad_()
    loss = OPERATIONS[name](student[:, 1:], views["teacher"], mask=mask)
    loss.backward()
    expected = oracle(name, views, mask=mask)
    assert_loss_close(loss.detach(), expected[0], torch.bfloat16)
    assert_gradient_close(student.grad[:, 1:], expected[1]["student"])


# Tokens that do not count.


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES)
def test_masked_tokens_count_for_nothing(case, reduction, on_cpu, monkeypatch, backend):
    if not on_cpu:
        # Elsewhere a mask is not read: a projection's chunks hold every token.
        monkeypatch.setattr(hidden, "_masked", lambda mask: mask)
        monkeypatch.setattr(
            hidden, "chunks_of", lambda rows, size, *_: head.chunks_of(rows, size, None, -100)
        )
    arguments, mask = states(case, 6, 5), torch.rand(6, 5) < 0.6
    mask[2] = False
    incoming = torch.randn(6, 5) if reduction == "none" else None
    options = {"mask": mask, "reduction": reduction}
    expected = oracle(case, arguments, None if incoming is None else incoming.double(), **options)
    for side in ("student", "teacher"):
        arguments[side][~mask] = torch.nan
    loss, found = loss_and_gradients(case, arguments, incoming, **options)
    assert_same((loss, found), expected, torch.float32)
    assert (found["student"][~mask] == 0).all()
    if reduction == "none":
        assert (loss[~mask] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_no_token_that_counts_is_a_loss_of_zero(case, reduction, backend):
    arguments = states(case, 4)
    for side in ("student", "teacher"):
        arguments[side][:] = torch.nan
    incoming = torch.ones(4) if reduction == "none" else None
    mask = torch.zeros(4, dtype=torch.bool)
    loss, found = loss_and_gradients(case, arguments, incoming, mask=mask, reduction=reduction)
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("case", CASES)
def test_a_nan_stays_in_its_row(case, backend):
    arguments = states(case, 9)
    clean = loss_and_gradients(case, arguments, torch.ones(9), reduction="none")
    arguments["student"][4, 2] = torch.nan
    loss, found = loss_and_gradients(case, arguments, torch.ones(9), reduction="none")
    others = torch.arange(9) != 4
    assert loss[4].isnan()
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(found["student"][others], clean[1]["student"][others])


# The cosine's edges.


def test_zero_vectors(backend):
    tensors = states("hidden_cosine", 4, dtype=torch.float64)
    tensors["student"][0] = tensors["teacher"][1] = 0
    tensors["student"][2] = tensors["teacher"][2] = 0
    student = tensors["student"].requires_grad_()
    loss = kdfast.hidden_cosine(student, tensors["teacher"], reduction="none")
    assert loss[:3].tolist() == pytest.approx([1, 1, 1])
    (found,) = torch.autograd.grad(loss.sum(), student)
    similarity = F.cosine_similarity(student, tensors["teacher"], dim=-1, eps=1e-8)
    (expected,) = torch.autograd.grad((1 - similarity).sum(), student)
    torch.testing.assert_close(found, expected)
    # The size that the docstring names.
    assert found[0].norm() == pytest.approx(1e8)
    assert found[1:3].abs().max() < 1e-15


@pytest.mark.parametrize("size", [1e-15, 1e-4, 1e4])
def test_the_size_of_a_vector_does_not_matter(size, backend):
    arguments = states("hidden_cosine", 5)
    expected = oracle("hidden_cosine", arguments)
    for side in arguments.values():
        side.mul_(size)
    loss, found = loss_and_gradients("hidden_cosine", arguments)
    if size < 1e-8:
        assert loss == pytest.approx(1, abs=1e-6)
        return
    assert_loss_close(loss, expected[0], torch.float32)
    torch.testing.assert_close(size * found["student"].double(), expected[1]["student"])


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_the_cosine_keeps_its_digits_near_convergence(distance, backend):
    student = torch.randn(64, 768)
    arguments = {"student": student, "teacher": student + distance * torch.randn(64, 768)}
    expected = oracle("hidden_cosine", arguments)
    loss, found = loss_and_gradients("hidden_cosine", arguments)
    # The inputs' own rounding is part of either: what is left is that of a / ‖a‖.
    assert abs(loss - expected[0]) <= 1e-6 * expected[0]
    error = (found["student"] - expected[1]["student"]).norm()
    assert error <= 2e-7 / distance * expected[1]["student"].norm()
    plain = 1 - F.cosine_similarity(*arguments.values(), dim=-1).mean()
    assert distance > 1e-2 or abs(plain - expected[0]) > abs(loss - expected[0])


@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_never_negative_and_zero_where_they_agree(rows, width, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, width, generator=generator)
    for backend, operation in itertools.product(BACKENDS, OPERATIONS.values()):
        with kdfast.backend(backend):
            assert (operation(student, teacher, reduction="none") >= 0).all()
            assert (operation(student, student.clone(), reduction="none") == 0).all()
            cosine = kdfast.hidden_cosine(student, teacher, reduction="none")
            assert (cosine <= 2 + 1e-6).all()


# What is computed, and in what memory.


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_half_precision_gradient_is_written_once(name, monkeypatch):
    monkeypatch.delenv("KDFAST_CHUNK_BYTES")
    student = torch.randn(16384, 1024).bfloat16().requires_grad_()
    teacher = torch.randn_like(student).detach()

    def step():
        torch.autograd.grad(OPERATIONS[name](student, teacher), student)

    step()
    # A gradient in float32 would be twice the size, and beside it.
    assert peak_bytes(step) < student.nbytes + (8 << 20)


def test_memory_is_the_gradients_and_a_chunk(monkeypatch):
    monkeypatch.delenv("KDFAST_CHUNK_BYTES")
    # What products pack and the allocator keeps. Projected states, or their difference, would be
    # 64 MiB each.
    slack = 24 << 20

    def peak_of(step):
        # A first call touches more: code, threads and their buffers.
        step()
        return peak_bytes(step)

    arguments = leaves(states("projected", 16384, width=1024, student=32))
    names = [arguments[name] for name in NAMES]
    peak = peak_of(lambda: torch.autograd.grad(kdfast.hidden_mse(**arguments), names))
    assert peak < hidden.PROJECTED_BYTES + sum(tensor.nbytes for tensor in names) + slack
    # Without a projection the gradient is of that size, and nothing else.
    teacher, student = arguments["teacher"], torch.randn(16384, 1024).requires_grad_()
    for operation in OPERATIONS.values():
        peak = peak_of(lambda op=operation: torch.autograd.grad(op(student, teacher), student))
        assert peak < student.nbytes + slack
        with torch.no_grad():
            assert peak_of(lambda op=operation: op(student, teacher)) < slack


@pytest.mark.parametrize("multiplier", products.CHOICES)
def test_a_step_is_three_products(multiplier, monkeypatch):
    monkeypatch.setenv("KDFAST_MATMUL", multiplier)
    arguments = states("projected", 64)
    one = 2 * 64 * 20 * 12

    def flops(*differentiable, mask=None):
        tensors = {n: v.detach().requires_grad_(n in differentiable) for n, v in arguments.items()}

        def step():
            loss = kdfast.hidden_mse(**tensors, mask=mask)
            if differentiable:
                loss.backward()

        return products.product_flops(step)

    assert flops(*NAMES) == 3 * one
    assert flops("student") == flops("weight") == 2 * one
    assert flops() == one
    # Masked tokens take part in no product.
    mask = torch.arange(64) < 16
    assert flops(*NAMES, mask=mask) == 3 * one / 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_that_nobody_wants_are_none(reduction):
    arguments = states("projected", 6)
    for wanted in NAMES:
        tensors = {n: v.detach().requires_grad_(n == wanted) for n, v in arguments.items()}
        kdfast.hidden_mse(**tensors, reduction=reduction).sum().backward()
        assert [n for n in tensors if tensors[n].grad is not None] == [wanted]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_loss_scale_is_inside_the_rounding(case, dtype, backend):
    arguments, scale = states(case, 500, dtype=dtype), torch.tensor(65536.0)
    # Unscaled, the gradients are below float16's smallest number.
    result = loss_and_gradients(case, arguments, scale / 1e6)
    expected = oracle(case, arguments)[1]
    for name, gradient in result[1].items():
        assert_gradient_close(gradient, expected[name] * (65536 / 1e6))


@pytest.mark.parametrize("incoming", [1e-8, 1.0, 1e4])
def test_a_difference_in_float16_neither_overflows_nor_vanishes(incoming, monkeypatch, backend):
    # A GPU's products take the difference in float16 and add up in float32. A CPU's do not.
    def multiply(left, right, out, *, accumulate=False):
        product = left.to(out.dtype) @ right.to(out.dtype)
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(head, "multiply", multiply)
    monkeypatch.setattr(hidden, "product_dtype", lambda *_: torch.float16)
    tensors = {n: v.half().float() for n, v in states("projected", 40).items()}
    # Massive activations, as language models have them in a few places.
    tensors["teacher"][3, 0] = 3e4
    each = incoming * (torch.rand(40) + 0.5)
    loss, found = loss_and_gradients("projected", tensors, each, reduction="none")
    expected = oracle("projected", tensors, each.double(), reduction="none")
    assert_loss_close(loss, expected[0], torch.float32)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[1][name]) < 1e-3
    nothing = {n: v[:0] if n in ("student", "teacher") else v for n, v in tensors.items()}
    loss, found = loss_and_gradients("projected", nothing, torch.ones(0), reduction="none")
    assert loss.shape == (0,)
    assert (found["weight"] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_same_bits_every_run(case):
    arguments, mask = states(case, 77), torch.rand(77) < 0.8
    first = loss_and_gradients(case, arguments, mask=mask)
    for _ in range(3):
        again = loss_and_gradients(case, arguments, mask=mask)
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(again[1][name], first[1][name]) for name in first[1])


# With the rest of PyTorch.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES)
def test_second_backward_through_a_retained_graph(case, reduction):
    arguments = leaves(states(case, 6))
    loss = function(case)(**arguments, reduction=reduction).sum()
    students = [arguments[name] for name in NAMES if name in arguments]
    first = torch.autograd.grad(3 * loss, students, retain_graph=True)
    second = torch.autograd.grad(3 * loss, students)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_double_backward_is_refused(name, reduction):
    arguments = leaves(states(name, 6))
    loss = OPERATIONS[name](**arguments, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(loss, arguments["student"], create_graph=True)


def test_checkpointing():
    arguments = leaves(states("projected", 9))
    students = [arguments[name] for name in NAMES]
    recomputed = torch.utils.checkpoint.checkpoint(
        lambda student: kdfast.hidden_mse(**{**arguments, "student": student}),
        arguments["student"],
        use_reentrant=False,
    )
    expected = torch.autograd.grad(kdfast.hidden_mse(**arguments), students)
    found = torch.autograd.grad(recomputed, students)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_autocast_mixes_precisions(case):
    arguments = states(case, 9)
    for side in ("student", "teacher"):
        arguments[side] = arguments[side].bfloat16()
    expected = oracle(case, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = loss_and_gradients(case, arguments)
    assert_loss_close(loss, expected[0], torch.float32)
    for name, gradient in found.items():
        # A projection in float32 has a gradient that was never rounded.
        assert gradient.dtype == arguments[name].dtype
        assert_gradient_close(gradient, expected[1][name])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES)
def test_compiles_whole_with_dynamic_shapes(case, reduction):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(arguments, mask):
        return 2 * function(case)(**arguments, mask=mask, reduction=reduction).sum()

    for rows in (4, 6, 9):
        arguments, mask = states(case, rows), torch.arange(rows) != 1
        compiled = leaves(arguments)
        loss = step(compiled, mask)
        loss.backward()
        eager = leaves(arguments)
        expected = 2 * function(case)(**eager, mask=mask, reduction=reduction).sum()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, gradient in gradients(compiled).items():
            torch.testing.assert_close(gradient, eager[name].grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, reduction):
    arguments, mask = states(case, 3, 4), torch.rand(3, 4) < 0.7
    incoming = torch.rand(3, 4) if reduction == "none" else None
    options = {"reduction": reduction}
    if case == "hidden_cosine":
        operator = torch.ops.kdfast.hidden_cosine_forward.default
        tensors, students = list(arguments.values()), [arguments["student"]]
    else:
        operator = torch.ops.kdfast.hidden_mse_forward.default
        students = [arguments.get(name) for name in NAMES]
        tensors = [*students, arguments["teacher"]]
        options |= {"chunk_bytes": 600, "autocast": None}
    for buffers in (
        [None if tensor is None else torch.empty_like(tensor) for tensor in students],
        [None] * len(students),
    ):
        for loss in (torch.empty(3, 4) if reduction == "none" else torch.empty(()), None):
            torch.library.opcheck(operator, (*tensors, mask, incoming, loss, *buffers), options)


@pytest.mark.parametrize(
    ("module", "name"), [(kdfast.HiddenMSE, "hidden_mse"), (kdfast.HiddenCosine, "hidden_cosine")]
)
def test_modules_are_the_functions(module, name):
    arguments, mask = states(name, 4), torch.tensor([True, False, True, True])
    expected = OPERATIONS[name](**arguments, mask=mask, reduction="sum")
    summed = module(reduction="sum")
    for face in (summed, copy.deepcopy(summed), pickle.loads(pickle.dumps(summed))):
        assert torch.equal(face(**arguments, mask=mask), expected)
    assert "reduction='sum'" in repr(summed)

    parameters = inspect.signature(OPERATIONS[name]).parameters
    known = inspect.signature(module).parameters, inspect.signature(module.forward).parameters
    assert set(parameters) == set(known[0]) | set(known[1]) - {"self"}
    assert known[0]["reduction"].default == parameters["reduction"].default


# Errors.

SHARED_ERRORS = [
    ({"student": [1.0]}, TypeError, "student must be a tensor, got list"),
    ({"teacher": torch.zeros(4, 6).long()}, TypeError, "teacher must be one of .*got torch.int64"),
    ({"teacher": torch.zeros(4, 6, requires_grad=True)}, ValueError, "teacher requires grad"),
    ({"teacher": torch.zeros(5, 6)}, ValueError, r"teacher must have .*\(4,\), got \(5,\)"),
    ({"teacher": torch.zeros(4, 6, device="meta")}, ValueError, "teacher must be on cpu"),
    ({"student": torch.zeros(())}, ValueError, "student and teacher must have a feature dimension"),
    ({"reduction": "tinybert"}, ValueError, "reduction must be one of .*got 'tinybert'"),
    ({"mask": [True] * 4}, TypeError, "mask must be a tensor, got list"),
    ({"mask": torch.ones(4)}, TypeError, r"mask must be torch.bool.*float32: pass attention_mask"),
    ({"mask": torch.ones(4, 6).bool()}, ValueError, r"mask must have .*\(4,\), got \(4, 6\)"),
    ({"mask": torch.ones(4, device="meta").bool()}, ValueError, "mask must be on cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), SHARED_ERRORS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_bad_input_names_the_argument(name, change, error, message):
    arguments = states(name, 4, width=6) | change
    with pytest.raises(error, match=message):
        OPERATIONS[name](**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, "bias is added to a projection"),
        ({"weight": None, "bias": None}, ValueError, r"and student 4: pass weight \[6, 4\]"),
        ({"weight": torch.zeros(4, 6)}, ValueError, r"weight must have .*\(6, 4\), got \(4, 6\)"),
        ({"weight": torch.zeros(6, 4).int()}, TypeError, "weight must be one of"),
        ({"weight": torch.zeros(6, 4, device="meta")}, ValueError, "weight must be on cpu"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have .*\(6,\), got \(4,\)"),
        ({"bias": torch.zeros(6).int()}, TypeError, "bias must be one of"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias must be on cpu"),
    ],
)  # fmt: skip
def test_bad_projections(change, error, message):
    arguments = states("projected", 4, width=6, student=4) | change
    with pytest.raises(error, match=message):
        kdfast.hidden_mse(**arguments)


def test_cosine_needs_equal_widths():
    with pytest.raises(ValueError, match=r"teacher must have .*\(4, 6\), got \(4, 7\)"):
        kdfast.hidden_cosine(torch.zeros(4, 6), torch.zeros(4, 7))
