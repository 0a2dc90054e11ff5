import copy
import inspect
import pickle
from functools import partial

import measure
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_gradient_close, assert_loss_close, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdfast
from kdfast import reference
from kdfast.ops.attention_mse import _attention_mse_forward, _full_precision

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METHODS = ("gram", "tiled", "auto")
STUDENT = ("student_query", "student_key")

needs_cpp = pytest.mark.skipif(
    "cpp" not in kdfast.available_backends(), reason="the C++ extension was not built"
)


@pytest.fixture(params=[name for name in kdfast.available_backends() if name != "triton"])
def backend(request):
    with kdfast.backend(request.param):
        yield request.param


@pytest.fixture(params=METHODS)
def method(request, backend):
    return request.param


@pytest.fixture
def length_of_blocks(backend, monkeypatch):
    """Tokens of several blocks and tiles, the last of them smaller."""
    if backend == "cpp":
        return 150
    for name in ("TILE", "SPAN", "CAUSAL_SPAN"):
        monkeypatch.setattr(f"kdfast.ops.attention_mse.{name}", 8)
    monkeypatch.setattr("kdfast.ops.attention_mse.BLOCK_BYTES", {"cpu": 1 << 12})
    return 19


def attention(
    batch=2, length=19, heads=(4, 4), key_heads=None, widths=(8, 12), dtype=torch.float32
):
    """The tensor arguments of two models; pairs are (student, teacher)."""
    arguments = {}
    key_heads = heads if key_heads is None else key_heads
    for owner, *sizes, width in zip(("student", "teacher"), heads, key_heads, widths, strict=True):
        for part, size in zip(("query", "key"), sizes, strict=True):
            arguments[f"{owner}_{part}"] = torch.randn(batch, size, length, width).to(dtype)
    return arguments


def copied(epsilon, rotated=False, **sizes):
    """A student that is epsilon away from its teacher, in the teacher's basis or in another one."""
    arguments = attention(widths=(64, 64), dtype=torch.float64, **sizes)
    basis = torch.eye(64, dtype=torch.float64)
    if rotated:
        basis = torch.linalg.qr(torch.randn_like(basis)).Q
    for part in ("query", "key"):
        teacher = arguments[f"teacher_{part}"]
        moved = teacher + epsilon * torch.randn_like(teacher)
        arguments[f"student_{part}"] = moved @ basis
    return {name: tensor.float() for name, tensor in arguments.items()}


def smaller(size, **sizes):
    """A student whose queries and keys are `size` times what its teacher's are."""
    arguments = attention(widths=(64, 64), **sizes)
    return arguments | {name: size * arguments[name] for name in STUDENT}


def leaves(arguments):
    return {
        name: tensor.detach().requires_grad_(name in STUDENT) for name, tensor in arguments.items()
    }


def loss_and_gradients(arguments, incoming=None, **options):
    arguments = leaves(arguments)
    loss = kdfast.attention_mse(**arguments, **options)
    loss.backward(incoming)
    return loss.detach(), {name: arguments[name].grad for name in STUDENT}


def counted_cells(heads, length, batch, key_mask, query_mask, causal):
    """By building every cell."""
    cells = torch.ones(batch, heads, length, length, dtype=torch.int64)
    if query_mask is not None:
        cells = cells * query_mask[:, None, :, None]
    if key_mask is not None:
        cells = cells * key_mask[:, None, None, :]
    return (cells.tril() if causal else cells).sum()


def oracle(arguments, incoming=None, *, reduction="mean", **options):
    """Loss and gradients in float64, by differentiating the specification."""
    arguments = leaves({name: tensor.double() for name, tensor in arguments.items()})
    if options.get("head_map") is not None:
        options["head_map"] = options["head_map"].double()
    options.pop("method", None)
    loss = reference.attention_mse_sums(**arguments, **options)
    batch, heads, length, _ = arguments["student_query"].shape
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        masks = options.get("key_mask"), options.get("query_mask"), options.get("causal", False)
        loss = loss / counted_cells(heads, length, batch, *masks).clamp_min(1)
    if reduction == "tinybert":
        loss = loss / (batch * heads * length**2)
    loss.backward(None if incoming is None else incoming.double())
    return loss.detach(), {name: arguments[name].grad for name in STUDENT}


def assert_same(found, expected, dtype):
    assert_loss_close(found[0], expected[0], dtype)
    for name in STUDENT:
        assert found[1][name].dtype == dtype
        assert_gradient_close(found[1][name], expected[1][name])


def check(arguments, dtype=torch.float32, **options):
    assert_same(loss_and_gradients(arguments, **options), oracle(arguments, **options), dtype)


def masks(batch, length):
    key_mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    return {"key_mask": key_mask, "query_mask": torch.rand(batch, length) < 0.7}


# Against the specification.


def test_reference_by_hand():
    query, key = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [-1.0]]]])
    zero = torch.zeros(1, 1, 2, 1)
    # The scores are [[3, -1], [6, -2]].
    sums = reference.attention_mse_sums
    assert sums(query, key, zero, zero).tolist() == [9 + 1 + 36 + 4]
    assert sums(query, key, zero, zero, causal=True).tolist() == [9 + 36 + 4]
    assert sums(query, key, zero, zero, student_scale=0.5).tolist() == [50 / 4]
    mask = torch.tensor([[True, False]])
    assert sums(query, key, zero, zero, mask).tolist() == [9 + 36]
    assert sums(query, key, zero, zero, None, mask).tolist() == [9 + 1]
    assert sums(query, key, query, key, teacher_scale=2.0).tolist() == [50]
    # A key head for two query heads, and half of each teacher head for a student head.
    both = query.expand(1, 2, 2, 1)
    assert sums(both, key, both * 0, key).tolist() == [100]
    assert sums(query, key, both, key, head_map=torch.full((1, 2), 0.5)).tolist() == [0]


def test_reference_gradcheck():
    arguments = leaves(attention(length=5, heads=(2, 3), dtype=torch.float64))
    options = {"head_map": torch.rand(2, 3), "causal": True, **masks(2, 5)}

    def sums(query, key):
        student = {"student_query": query, "student_key": key}
        return reference.attention_mse_sums(**{**arguments, **student}, **options)

    assert torch.autograd.gradcheck(sums, [arguments[name] for name in STUDENT])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 19, 64, 128, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_reference(causal, length, dtype, method):
    arguments = attention(length=length, dtype=dtype)
    check(arguments, dtype, causal=causal, method=method, **masks(2, length))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(8, 8), (8, 12), (12, 8), (1, 5)])
@pytest.mark.parametrize(
    ("heads", "key_heads"),
    [
        ((4, 4), (4, 4)),
        ((12, 12), (4, 4)),
        ((12, 12), (4, 6)),
        ((12, 12), (1, 12)),
        ((12, 12), (12, 3)),
        ((4, 6), (2, 3)),
        ((6, 2), (6, 2)),
    ],
)
def test_heads_and_sizes(heads, key_heads, widths, causal, method, length_of_blocks):
    sizes = {"heads": heads, "key_heads": key_heads, "widths": widths, "length": length_of_blocks}
    arguments = attention(**sizes)
    options = {"causal": causal, "method": method, **masks(2, length_of_blocks)}
    if heads[0] != heads[1]:
        options["head_map"] = torch.randn(heads)
    check(arguments, **options)


@pytest.mark.parametrize("reduction", ["mean", "tinybert", "sum", "none"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [(), ("key_mask",), ("query_mask",), ("key_mask", "query_mask")])
def test_reductions(masked, causal, reduction, method, length_of_blocks):
    arguments, given = attention(3, length_of_blocks), masks(3, length_of_blocks)
    options = {"causal": causal, "reduction": reduction, "method": method}
    options |= {name: given[name] for name in masked}
    incoming = torch.randn(3) if reduction == "none" else torch.tensor(-3.0)
    found = loss_and_gradients(arguments, incoming, **options)
    assert_same(found, oracle(arguments, incoming, **options), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_incoming_gradient_per_sample(dtype, method):
    arguments, incoming = attention(batch=3, dtype=dtype), torch.tensor([2.0, 0.0, -0.5])
    options = {"reduction": "none", "method": method}
    found = loss_and_gradients(arguments, incoming, **options)
    assert_same(found, oracle(arguments, incoming, **options), dtype)


@pytest.mark.parametrize("widths", [(8, 8), (8, 12)])
def test_scales(widths, method):
    arguments = attention(widths=widths)
    check(arguments, student_scale=0.3, teacher_scale=0.7, method=method)
    check(arguments, student_scale=1.0, method=method)
    check(arguments, teacher_scale=0.125, head_map=torch.randn(4, 4), method=method)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(2, 2), (2, 3)])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("method", ["gram", "tiled"])
def test_gradcheck(method, mapped, widths, causal, length_of_blocks):
    sizes = {"heads": (2, 2), "key_heads": (1, 2), "widths": widths}
    arguments = leaves(attention(length=length_of_blocks, **sizes, dtype=torch.float64))
    given = masks(2, length_of_blocks)
    options = {"causal": causal, "method": method, "reduction": "none", **given}
    options["head_map"] = torch.randn(2, 2) if mapped else None

    def loss(query, key):
        student = {"student_query": query, "student_key": key}
        return kdfast.attention_mse(**{**arguments, **student}, **options)

    assert torch.autograd.gradcheck(loss, [arguments[name] for name in STUDENT], fast_mode=True)


def test_a_map_that_selects_heads_is_a_selection(method):
    arguments, chosen = attention(heads=(3, 6)), torch.tensor([1, 3, 5])
    head_map = F.one_hot(chosen, 6).float()
    mapped = loss_and_gradients(arguments, head_map=head_map, method=method)
    for name in ("teacher_query", "teacher_key"):
        arguments[name] = arguments[name][:, chosen]
    assert_same(mapped, oracle(arguments), torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens_count_for_nothing(causal, method):
    arguments, given = attention(batch=3), masks(3, 19)
    given["query_mask"][0] = given["key_mask"][0]
    options = {"causal": causal, "method": method, **given}
    clean = loss_and_gradients(arguments, **options)
    for owner in ("student", "teacher"):
        for part in ("query", "key"):
            left_out = ~given[f"{part}_mask"][:, None, :, None]
            name = f"{owner}_{part}"
            arguments[name] = arguments[name].masked_fill(left_out, torch.nan)
    found = loss_and_gradients(arguments, **options)
    assert torch.equal(found[0], clean[0])
    for name in STUDENT:
        assert torch.equal(found[1][name], clean[1][name])
    assert (found[1]["student_key"].transpose(1, 2)[~given["key_mask"]] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "tinybert", "sum", "none"])
def test_no_counted_cell_is_a_loss_of_zero(reduction, method):
    nothing = torch.zeros(2, 19, dtype=torch.bool)
    incoming = torch.ones(2) if reduction == "none" else None
    loss, found = loss_and_gradients(
        attention(), incoming, key_mask=nothing, reduction=reduction, method=method
    )
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1023, 1024, 1025, 2100])
def test_more_tokens_than_float32_adds_up(length, causal, method):
    arguments = attention(1, length, heads=(2, 2), key_heads=(1, 2))
    check(arguments, causal=causal, method=method)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(40, 40), (33, 100), (130, 64), (256, 256)])
def test_wide_heads(widths, causal, method):
    check(attention(1, 140, heads=(2, 2), widths=widths), causal=causal, method=method)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}])
def test_nothing_to_compare(sizes, method):
    for reduction in ("mean", "tinybert", "sum"):
        loss, found = loss_and_gradients(attention(**sizes), reduction=reduction, method=method)
        assert loss == 0
        assert all(gradient.numel() == 0 for gradient in found.values())


def test_a_nan_stays_in_its_sample(method):
    arguments = attention(batch=3)
    clean = loss_and_gradients(arguments, torch.ones(3), reduction="none", method=method)
    arguments["student_query"][1, 0, 3, 2] = torch.nan
    found = loss_and_gradients(arguments, torch.ones(3), reduction="none", method=method)
    assert found[0].isnan().tolist() == [False, True, False]
    assert torch.equal(found[0][::2], clean[0][::2])
    for name in STUDENT:
        assert torch.equal(found[1][name][::2], clean[1][name][::2])


def tinybert_loss(student_scores, teacher_scores):
    """As in TinyBERT's general_distill.py."""
    student_scores = torch.where(
        student_scores <= -1e2, torch.zeros_like(student_scores), student_scores
    )
    teacher_scores = torch.where(
        teacher_scores <= -1e2, torch.zeros_like(teacher_scores), teacher_scores
    )
    return torch.nn.MSELoss()(student_scores, teacher_scores)


def test_tinybert(method):
    arguments = leaves(attention(batch=3, widths=(8, 12)))
    mask = masks(3, 19)["key_mask"]
    extended = (1.0 - mask[:, None, None, :].float()) * -10000.0
    scores = [
        arguments[f"{owner}_query"] @ arguments[f"{owner}_key"].mT / width**0.5 + extended
        for owner, width in (("student", 8), ("teacher", 12))
    ]
    literal = tinybert_loss(*scores)
    loss = kdfast.attention_mse(**arguments, key_mask=mask, reduction="tinybert", method=method)
    torch.testing.assert_close(loss, literal, rtol=1e-6, atol=0)
    students = [arguments[name] for name in STUDENT]
    for found, expected in zip(
        torch.autograd.grad(loss, students), torch.autograd.grad(literal, students), strict=True
    ):
        assert relative_error(found, expected) < 1e-6


# Near convergence.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotated", [False, True], ids=["same basis", "rotated"])
@pytest.mark.parametrize("epsilon", [1, 1e-1, 1e-2, 1e-3, 1e-4])
def test_precision_as_the_student_approaches_the_teacher(epsilon, rotated, causal, backend):
    arguments = copied(epsilon, rotated, length=640, batch=1, heads=(2, 2))
    expected = oracle(arguments, causal=causal)
    errors = {}
    for method in METHODS:
        loss, found = loss_and_gradients(arguments, causal=causal, method=method)
        assert loss >= 0
        errors[method] = (
            abs(loss.double() / expected[0] - 1).item(),
            max(relative_error(found[name], expected[1][name]) for name in STUDENT),
        )
    if epsilon >= 1e-2:
        assert all(loss < 1e-3 for loss, _ in errors.values())
    # What a float32 score loses: its unit against epsilon. Gram matrices lose a little more.
    assert all(gradient < 3e-6 + 3e-6 / epsilon for _, gradient in errors.values())
    assert errors["auto"][0] < 3e-4
    if not rotated:
        # Nothing cancels: every method is as good as far from the teacher.
        assert all(loss < 1e-6 and gradient < 2e-6 for loss, gradient in errors.values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-4, 1e2])
def test_a_student_smaller_than_its_teacher(size, causal, method):
    arguments = smaller(size, length=400, batch=2, heads=(4, 4), key_heads=(2, 4))
    check(arguments, causal=causal, method=method, **masks(2, 400))
    # Its queries alone.
    arguments["student_key"] = torch.randn_like(arguments["student_key"])
    check(arguments, causal=causal, method=method)


def test_auto_starts_over_where_gram_matrices_cancel(backend):
    arguments = copied(1e-4, rotated=True, length=640, batch=3, heads=(2, 2))
    # One sample of three is far from its teacher.
    arguments["student_query"][1] = torch.randn_like(arguments["student_query"][1])
    found = loss_and_gradients(arguments, torch.ones(3), reduction="none")
    assert_same(found, oracle(arguments, torch.ones(3), reduction="none"), torch.float32)
    arguments = {name: tensor[:1] for name, tensor in arguments.items()}
    expected = oracle(arguments)
    # Else this would be a test of nothing.
    gram, _ = loss_and_gradients(arguments, method="gram")
    assert abs(gram.double() / expected[0] - 1) > 1e-2
    assert_same(loss_and_gradients(arguments), expected, torch.float32)


def test_never_negative(backend):
    arguments = copied(0, rotated=True, length=640)
    for method in METHODS:
        for causal in (False, True):
            loss = kdfast.attention_mse(**arguments, reduction="none", method=method, causal=causal)
            assert (loss >= 0).all()


def test_a_copy_of_the_teacher_has_no_loss(method):
    loss, found = loss_and_gradients(copied(0), method=method)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_of_full_precision(precision, method):
    arguments = attention(length=300, widths=(64, 64))
    expected = loss_and_gradients(arguments, method=method)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = loss_and_gradients(arguments, method=method)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in STUDENT)


@pytest.fixture
def rounded_products():
    """A process whose products are allowed to round, by the setting of all of them."""
    products = torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision, products.fp32_precision
    products.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
    yield products
    torch.backends.fp32_precision, products.fp32_precision = before


def test_threads_share_full_precision(rounded_products):
    device = torch.device("cpu")
    first, second = _full_precision(device), _full_precision(device)
    assert rounded_products.fp32_precision == "tf32"
    first.__enter__()
    second.__enter__()
    assert rounded_products.fp32_precision == "ieee"
    first.__exit__(None, None, None)
    # The second one still multiplies.
    assert rounded_products.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert rounded_products.fp32_precision == "tf32"
    # It was the setting of all products, and still is.
    torch.backends.fp32_precision = "ieee"
    assert rounded_products.fp32_precision == "ieee"


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_small_and_large_scores(scale, method):
    arguments = {name: scale * tensor for name, tensor in attention(length=300).items()}
    check(arguments, method=method)


def test_a_loss_scale_is_inside_the_rounding(method):
    arguments, incoming = attention(dtype=torch.float16, length=300), torch.tensor(65536.0)
    # The unscaled gradient is below float16's smallest number.
    arguments = {name: 0.05 * tensor for name, tensor in arguments.items()}
    found = loss_and_gradients(arguments, incoming, method=method)
    assert_same(found, oracle(arguments, incoming), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [(), ("student_query",), ("student_key",)])
def test_half_precision_gradients_are_rounded_once(mixed, dtype, method):
    arguments, incoming = attention(dtype=dtype, length=300), torch.tensor(0.7)
    arguments |= {name: arguments[name].float() for name in mixed}
    found = loss_and_gradients(arguments, incoming, method=method)[1]
    expected = oracle(arguments, incoming)[1]
    for name in STUDENT:
        assert found[name].dtype == arguments[name].dtype
        assert_gradient_close(found[name], expected[name])


# In what memory, and how long.


class NoTensorOf(TorchDispatchMode):
    """Refuses every tensor with `elements` elements or more."""

    def __init__(self, elements):
        super().__init__()
        self.elements = elements

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.kdfast.attention_mse_forward.default:
            # A mode does not see what an operator does inside, so this one's body is called here.
            with self:
                outputs = _attention_mse_forward(*args, **kwargs)
        else:
            outputs = operator(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, outputs)):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.elements:
                raise AssertionError(f"{operator} has a tensor of {tuple(tensor.shape)}")
        return outputs


def test_the_guard_against_maps_sees_one(monkeypatch):
    monkeypatch.setenv("KDFAST_BACKEND", "torch")
    arguments = attention(batch=1, length=500, heads=(1, 1))
    with NoTensorOf(500**2):
        kdfast.attention_mse(**arguments, method="tiled")
    monkeypatch.setattr("kdfast.ops.attention_mse.TILE", 500)
    for compare in (partial(kdfast.attention_mse, method="tiled"), reference.attention_mse_sums):
        with pytest.raises(AssertionError, match=r"\(1, 500, 500\)"), NoTensorOf(500**2):
            compare(**arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_no_map_is_built(mapped, causal, method, monkeypatch):
    length = 2048
    arguments = leaves(attention(batch=1, length=length, heads=(2, 2), widths=(8, 8)))
    options = {"causal": causal, "method": method, **masks(1, length)}
    options["head_map"] = torch.rand(2, 2) if mapped else None
    with NoTensorOf(length**2):
        kdfast.attention_mse(**arguments, **options).backward()
    # Nor is anything else quadratic: a tile's size does not depend on the sequence.
    largest = max(tensor.numel() for tensor in arguments.values())
    with NoTensorOf(max(2 * largest, 2 * 256**2) + 1):
        kdfast.attention_mse(**arguments, **options).backward()


def peak_bytes(compare, length, **options):
    """Of a step in which no tensor's rows take as much as a map of scores."""
    arguments = leaves(attention(batch=1, length=length, heads=(1, 1), widths=(8, 8)))

    def step():
        compare(**arguments, **options).sum().backward()

    step()
    return measure.peak_bytes(step)


@needs_cpp
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_map_is_built_in_cpp(method, causal):
    assert peak_bytes(kdfast.attention_mse, 4096, method=method, causal=causal) < 4096**2


def test_the_peak_of_memory_sees_a_map():
    assert peak_bytes(reference.attention_mse_sums, 4096) > 4 * 4096**2


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(causal, backend):
    arguments = leaves(attention(batch=1, length=65536, heads=(1, 1), widths=(4, 6)))
    with NoTensorOf(65536 * 12):
        loss = kdfast.attention_mse(**arguments, causal=causal)
        loss.backward()
    # Some of the rows, against all the columns.
    some = torch.tensor([0, 1, 4095, 30000, 65535])
    student, teacher = (
        [arguments[f"{owner}_{part}"].detach()[0, 0].double() for part in ("query", "key")]
        for owner in ("student", "teacher")
    )
    scores = student[0][some] @ student[1].T / 2 - teacher[0][some] @ teacher[1].T / 6**0.5
    cells = 65536**2
    if causal:
        scores[torch.arange(65536) > some[:, None]] = 0
        cells = 65536 * 65537 // 2
    expected = 2 * scores @ student[1] / 2 / cells
    assert_gradient_close(arguments["student_query"].grad[0, 0, some], expected)
    # The whole loss, by its gradient: a quadratic form of the queries of both models.
    doubled = {name: tensor.detach().double() for name, tensor in arguments.items()}
    exact = kdfast.attention_mse(**doubled, causal=causal)
    assert_loss_close(loss.detach(), exact, torch.float32)


def test_transposed_views_are_not_copied(method):
    length, heads, width = 2048, 4, 8
    arguments = {
        name: torch.randn(1, length, heads * width).view(1, length, heads, width).transpose(1, 2)
        for name in ("student_query", "student_key", "teacher_query", "teacher_key")
    }
    expected = loss_and_gradients(
        {name: tensor.contiguous() for name, tensor in arguments.items()}, method=method
    )
    found = loss_and_gradients(arguments, method=method)
    assert torch.equal(found[0], expected[0])
    for name in STUDENT:
        assert torch.equal(found[1][name], expected[1][name])
        # The projection's backward pass sees its own layout again.
        assert found[1][name].transpose(1, 2).is_contiguous()


def test_other_strides(method):
    arguments = attention(heads=(4, 4))
    strided = {
        "student_query": arguments["student_query"].mT.contiguous().mT,
        "student_key": arguments["student_key"]
        .permute(2, 1, 0, 3)
        .contiguous()
        .permute(2, 1, 0, 3),
        "teacher_query": arguments["teacher_query"].repeat_interleave(2, -1)[..., ::2],
        "teacher_key": arguments["teacher_key"][:, :1].expand(-1, 4, -1, -1),
    }
    same = {**arguments, "teacher_key": strided["teacher_key"].contiguous()}
    assert_same(loss_and_gradients(strided, method=method), oracle(same), torch.float32)


def operations(length, method, width, **options):
    """Of the matrix products of a step in plain PyTorch."""
    arguments = leaves(attention(1, length, heads=(2, 2), widths=(width, width)))
    with kdfast.backend("torch"), torch.profiler.profile(with_flops=True) as profile:
        kdfast.attention_mse(**arguments, method=method, **options).backward()
    products = ("aten::bmm", "aten::baddbmm_")
    return sum(event.flops for event in profile.key_averages() if event.key in products)


def test_auto_takes_the_cheaper_method():
    for length, cheaper, other in ((64, "tiled", "gram"), (1024, "gram", "tiled")):
        for causal in (False, True):
            auto = operations(length, "auto", 64, causal=causal)
            assert auto == operations(length, cheaper, 64, causal=causal)
            assert auto < operations(length, other, 64, causal=causal)


@needs_cpp
@pytest.mark.parametrize("causal", [False, True])
def test_auto_takes_the_cheaper_method_in_cpp(causal):
    for length, cheaper, other in ((100, "tiled", "gram"), (1024, "gram", "tiled")):
        arguments = attention(1, length, heads=(2, 2), widths=(64, 64))
        auto, same, different = (
            loss_and_gradients(arguments, method=method, causal=causal)[1]
            for method in ("auto", cheaper, other)
        )
        assert all(torch.equal(auto[name], same[name]) for name in STUDENT)
        assert not any(torch.equal(auto[name], different[name]) for name in STUDENT)


def test_gram_operations_are_linear():
    # Two Gram matrices of 32², three quarters of each, half of one for the products with Q_s, and
    # two products of the rows with half of them.
    for length in (256, 4096):
        assert operations(length, "gram", 16) == 2 * length * 2 * (2 * 3 * 16 * 16 + 3 * 32 * 16)


def test_same_bits_every_run(method):
    arguments = attention(length=600)
    first = loss_and_gradients(arguments, method=method)
    for _ in range(3):
        again = loss_and_gradients(arguments, method=method)
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(again[1][name], first[1][name]) for name in STUDENT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_on_any_number_of_threads(method, causal):
    arguments, found = attention(length=300), []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(loss_and_gradients(arguments, method=method, causal=causal))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert all(torch.equal(other[1][name], found[0][1][name]) for name in STUDENT)


def test_more_threads_than_heads():
    arguments, threads = attention(batch=1, heads=(1, 1), length=300), torch.get_num_threads()
    torch.set_num_threads(4)
    found = loss_and_gradients(arguments)
    torch.set_num_threads(threads)
    assert_same(found, oracle(arguments), torch.float32)


# With the rest of PyTorch.


@pytest.mark.parametrize("wanted", STUDENT)
def test_gradients_that_nobody_wants_are_none(wanted, method):
    expected = oracle(attention_arguments := attention())[1][wanted]
    arguments = {n: t.detach().requires_grad_(n == wanted) for n, t in attention_arguments.items()}
    kdfast.attention_mse(**arguments, method=method).backward()
    assert [name for name in arguments if arguments[name].grad is not None] == [wanted]
    assert_gradient_close(arguments[wanted].grad, expected)


def test_without_grad_mode(method):
    arguments = leaves(attention())
    with torch.no_grad():
        loss = kdfast.attention_mse(**arguments, method=method)
    assert not loss.requires_grad
    assert_loss_close(loss, oracle(arguments)[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_backward_through_a_retained_graph(dtype):
    arguments = leaves(attention(dtype=dtype))
    students = [arguments[name] for name in STUDENT]
    loss = 3 * kdfast.attention_mse(**arguments)
    first = torch.autograd.grad(loss, students, retain_graph=True)
    second = torch.autograd.grad(loss, students)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused():
    arguments = leaves(attention())
    with pytest.raises(RuntimeError, match="attention_mse has no second derivative"):
        torch.autograd.grad(
            kdfast.attention_mse(**arguments), arguments["student_query"], create_graph=True
        )


def test_mixed_precisions(method):
    arguments = attention(widths=(8, 8))
    arguments["student_key"] = arguments["student_key"].bfloat16()
    arguments["teacher_query"] = arguments["teacher_query"].double()
    arguments["teacher_key"] = arguments["teacher_key"].half()
    found, expected = loss_and_gradients(arguments, method=method), oracle(arguments)
    assert_loss_close(found[0], expected[0], torch.float32)
    for name in STUDENT:
        assert found[1][name].dtype == arguments[name].dtype
        assert_gradient_close(found[1][name], expected[1][name])


def test_autocast_does_not_round(method):
    arguments = attention()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradients(arguments, method=method)
    assert_same(found, oracle(arguments), torch.float32)


def test_checkpointing():
    arguments = leaves(attention())
    recomputed = torch.utils.checkpoint.checkpoint(
        lambda query: kdfast.attention_mse(**{**arguments, "student_query": query}),
        arguments["student_query"],
        use_reentrant=False,
    )
    students = [arguments[name] for name in STUDENT]
    expected = torch.autograd.grad(kdfast.attention_mse(**arguments), students)
    found = torch.autograd.grad(recomputed, students)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiles_whole_with_dynamic_shapes(dtype, reduction):
    torch.compiler.reset()

    def loss(arguments, key_mask):
        projected = {
            name: tensor.transpose(1, 2) if name in STUDENT else tensor
            for name, tensor in arguments.items()
        }
        options = {"key_mask": key_mask, "causal": True, "reduction": reduction}
        return (2 * kdfast.attention_mse(**projected, **options)).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for length in (4, 6, 9):
        arguments = attention(length=length, dtype=dtype)
        arguments |= {name: arguments[name].transpose(1, 2).contiguous() for name in STUDENT}
        mask = masks(2, length)["key_mask"]
        found, expected = leaves(arguments), leaves(arguments)
        result, eager = compiled(found, mask), loss(expected, mask)
        result.backward()
        eager.backward()
        torch.testing.assert_close(result, eager)
        for name in STUDENT:
            torch.testing.assert_close(found[name].grad, expected[name].grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    arguments = attention(heads=(4, 2))
    tensors = tuple(arguments.values())
    settings = {
        "causal": True,
        "student_scale": None,
        "teacher_scale": 0.3,
        "reduction": reduction,
        "method": "auto",
    }
    given, head_map = masks(2, 19), torch.rand(4, 2)
    loss = torch.empty(2) if reduction == "none" else torch.empty(())
    gradients = [torch.empty_like(tensor) for tensor in tensors[:2]]
    for buffers in ([loss, *gradients], [None, *gradients], [loss, None, None]):
        torch.library.opcheck(
            torch.ops.kdfast.attention_mse_forward.default,
            (*tensors, given["key_mask"], given["query_mask"], head_map, None, *buffers),
            settings,
        )


def test_module_is_the_function():
    arguments, given = attention(), masks(2, 19)
    options = {"causal": True, "reduction": "sum", "teacher_scale": 0.4, "method": "tiled"}
    module = kdfast.AttentionMSE(**options)
    expected = kdfast.attention_mse(**arguments, **given, **options)
    for face in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(face(**arguments, **given), expected)
    assert "reduction='sum'" in repr(module)


def test_module_keeps_its_head_map():
    arguments, head_map = attention(heads=(2, 4)), torch.rand(2, 4)
    module = kdfast.AttentionMSE(head_map=head_map)
    assert torch.equal(module(**arguments), kdfast.attention_mse(**arguments, head_map=head_map))
    assert module.double().head_map.dtype == torch.float64
    assert "head_map" not in module.state_dict()


def test_module_knows_every_keyword_of_the_function():
    function = inspect.signature(kdfast.attention_mse).parameters
    settings = inspect.signature(kdfast.AttentionMSE).parameters
    call = inspect.signature(kdfast.AttentionMSE.forward).parameters
    assert set(function) == set(settings) | set(call) - {"self"}
    for name, parameter in settings.items():
        assert parameter.default == function[name].default


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_query": [1.0]}, TypeError, "student_query must be a tensor, got list"),
        ({"student_query": torch.zeros(2, 5, 8)}, ValueError, r"student_query must be \[batch"),
        ({"student_key": torch.zeros(2, 4, 5, 8).long()}, TypeError, "student_key must be one of"),
        ({"student_key": torch.zeros(2, 3, 5, 8)}, ValueError, "student_key must be .*divides 4"),
        ({"student_key": torch.zeros(2, 4, 6, 8)}, ValueError, "student_key must be .*6, 8"),
        ({"teacher_key": torch.zeros(2, 4, 5, 8)}, ValueError, "teacher_key must be .*5, 12"),
        ({"teacher_query": torch.zeros(3, 4, 5, 12), "teacher_key": torch.zeros(3, 4, 5, 12)},
         ValueError, r"teacher_query must have .*\(2, 5\), got \(3, 5\)"),
        ({"teacher_query": torch.zeros(2, 6, 5, 12), "teacher_key": torch.zeros(2, 6, 5, 12)},
         ValueError, r"4 heads and teacher_query 6: pass head_map, \[4, 6\]"),
        ({"teacher_key": torch.zeros(2, 4, 5, 12, requires_grad=True)}, ValueError, "teacher_key"),
        ({"teacher_query": torch.zeros(2, 4, 5, 12, device="meta")}, ValueError, "teacher_query m"),
        ({"head_map": torch.zeros(4, 3)}, ValueError, r"head_map must have .*\(4, 4\), got \(4, 3"),
        ({"head_map": torch.zeros(4, 4).long()}, TypeError, "head_map must be one of"),
        ({"head_map": torch.zeros(4, 4, requires_grad=True)}, ValueError, "head_map requires grad"),
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be torch.bool.*float32"),
        ({"key_mask": [True]}, TypeError, "key_mask must be a tensor, got list"),
        ({"query_mask": torch.ones(2, 4).bool()}, ValueError, r"query_mask must have .*\(2, 5\)"),
        ({"query_mask": torch.ones(2, 5, device="meta").bool()}, ValueError, "query_mask must be"),
        ({"student_scale": 0}, ValueError, "student_scale must be finite and above 0, got 0"),
        ({"teacher_scale": "1"}, TypeError, "teacher_scale must be a number, got str"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"method": "flash"}, ValueError, "method must be one of .*'flash'"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        kdfast.attention_mse(**(attention(length=5) | change))
