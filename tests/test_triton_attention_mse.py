"""The Triton kernels of attention_mse in Triton's interpreter, against float64."""

import os

import pytest
import torch
from test_attention_mse import (
    STUDENT,
    assert_same,
    attention,
    copied,
    loss_and_gradients,
    masks,
    oracle,
    smaller,
)
from tolerances import assert_loss_close, relative_error

import kdfast

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 from the start of the process, as `make test` sets it",
        allow_module_level=True,
    )

import kdfast.kernels.attention_mse as kernels
from kdfast.kernels import tuning

# The interpreter computes in numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BLOCK = 16
KERNELS = ("gram_kernel", "join_kernel", "query_kernel", "key_kernel", "fused_gram_kernel")
FORMS = [("gram", False), ("gram", True), ("tiled", False), ("tiled", True)]
every_form = pytest.mark.parametrize(("method", "causal"), FORMS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks and chunks of a few tokens, so that a short sequence takes many of them."""
    launch = {"BLOCK": BLOCK, "num_warps": 1}
    small = {
        "grams": launch | {"SLAB": 16},
        "products": launch | {"STEP": 16},
        "scores": launch | {"STEP": 16},
        "fused": launch | {"STEP": 16, "SLAB": 64},
    }
    for element_size in tuning.ATTENTION_MSE:
        monkeypatch.setitem(tuning.ATTENTION_MSE, element_size, ((float("inf"), small),))
    monkeypatch.setattr(kernels, "CHUNK", 2 * BLOCK)


@pytest.fixture(autouse=True)
def _triton():
    with kdfast.backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that a call launches."""
    names = []

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorded(name, getattr(kernels, name)))
    return names


def small(batch=2, length=37, heads=(2, 2), **sizes):
    return attention(batch, length, heads, **sizes)


def check(arguments, **options):
    assert_same(
        loss_and_gradients(arguments, **options), oracle(arguments, **options), torch.float32
    )


@every_form
@pytest.mark.parametrize("widths", [(16, 16), (5, 5), (5, 20)])
def test_matches_reference(widths, method, causal):
    check(small(widths=widths), method=method, causal=causal, **masks(2, 37))


@every_form
@pytest.mark.parametrize("length", [1, 2, 16, 33, 70])
def test_lengths(length, method, causal):
    check(small(1, length, (1, 1)), method=method, causal=causal, **masks(1, length))


@every_form
@pytest.mark.parametrize(
    ("heads", "key_heads"),
    [
        # Groups; and matrices that share a key head, of the student, of the teacher, of each.
        (4, (2, 2)),
        (4, (1, 4)),
        (4, (4, 2)),
        (6, (2, 3)),
    ],
)
def test_shared_key_heads(heads, key_heads, method, causal):
    arguments = small(1, 19, (heads, heads), key_heads=key_heads, widths=(8, 8))
    check(arguments, method=method, causal=causal, **masks(1, 19))


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, method, causal):
    arguments = small(1, widths=(16, 16), dtype=dtype)
    loss, found = loss_and_gradients(arguments, method=method, causal=causal)
    expected = oracle(arguments, method=method, causal=causal)
    assert_loss_close(loss, expected[0], dtype)
    for name in STUDENT:
        assert found[name].dtype == dtype
        # The interpreter truncates to bfloat16, where a GPU rounds to nearest.
        allowed = 2 ** (-7 if dtype == torch.bfloat16 else -11)
        assert relative_error(found[name], expected[1][name]) <= allowed


@every_form
def test_types_may_differ(method, causal):
    arguments = small(widths=(8, 8))
    for name in ("teacher_query", "teacher_key"):
        arguments[name] = arguments[name].bfloat16()
    check(arguments, method=method, causal=causal)


@every_form
def test_scales(method, causal):
    for widths in ((8, 8), (8, 12)):
        options = {"student_scale": 0.3, "teacher_scale": 0.7, "method": method}
        check(small(1, 20, widths=widths), causal=causal, **options)


@every_form
def test_masked_tokens_are_not_read(method, causal):
    arguments, given = small(), masks(2, 37)
    options = {"method": method, "causal": causal, **given}
    clean = loss_and_gradients(arguments, **options)
    for name in arguments:
        left_out = ~given[f"{name.split('_')[1]}_mask"][:, None, :, None]
        arguments[name] = arguments[name].masked_fill(left_out, torch.nan)
    found = loss_and_gradients(arguments, **options)
    assert torch.equal(found[0], clean[0])
    for name in STUDENT:
        assert torch.equal(found[1][name], clean[1][name])


@every_form
def test_a_nan_stays_in_its_sample(method, causal):
    arguments = small(3, 20)
    options = {"reduction": "none", "method": method, "causal": causal}
    clean = loss_and_gradients(arguments, torch.ones(3), **options)
    arguments["student_query"][1, 0, 3, 2] = torch.nan
    found = loss_and_gradients(arguments, torch.ones(3), **options)
    assert found[0].isnan().tolist() == [False, True, False]
    for name in STUDENT:
        assert torch.equal(found[1][name][::2], clean[1][name][::2])


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_incoming_gradient_per_sample(dtype, method, causal):
    arguments, incoming = small(3, 20, dtype=dtype), torch.tensor([2.0, 0.0, -0.5])
    options = {"reduction": "none", "method": method, "causal": causal}
    found = loss_and_gradients(arguments, incoming, **options)
    assert_same(found, oracle(arguments, incoming, **options), dtype)


@every_form
def test_views_are_taken_as_they_are(method, causal, launched):
    arguments = small(key_heads=(1, 1))
    options = {"method": method, "causal": causal}
    expected = loss_and_gradients(arguments, **options)
    contiguous = list(launched)
    tokens_first = {
        # Every second row of a tensor with room between the heads.
        name: torch.full((2, 74, 3, 32), torch.nan)[:, ::2, : tensor.shape[1], : tensor.shape[-1]]
        .copy_(tensor.transpose(1, 2))
        .transpose(1, 2)
        for name, tensor in arguments.items()
    }
    found = loss_and_gradients(tokens_first, **options)
    assert launched[len(contiguous) :] == contiguous
    assert torch.equal(found[0], expected[0])
    for name in STUDENT:
        assert torch.equal(found[1][name], expected[1][name])
    # Channels that are not neighbours are copied.
    strided = {name: tensor.mT.contiguous().mT for name, tensor in arguments.items()}
    assert torch.equal(loss_and_gradients(strided, **options)[0], expected[0])


@every_form
@pytest.mark.parametrize("wanted", [(), *((name,) for name in STUDENT)])
def test_only_what_is_wanted(wanted, method, causal, launched):
    arguments = small(1)
    expected = oracle(arguments, causal=causal)
    for name in wanted:
        arguments[name].requires_grad_()
    loss = kdfast.attention_mse(**arguments, method=method, causal=causal)
    assert_loss_close(loss, expected[0], torch.float32)
    # Scores make the loss, so somebody has to form them.
    of_query = "student_query" in wanted or causal or method == "tiled"
    assert ("query_kernel" in launched) == of_query
    assert ("key_kernel" in launched) == ("student_key" in wanted)
    if wanted:
        loss.backward()
        (name,) = wanted
        assert relative_error(arguments[name].grad, expected[1][name]) < 2e-6


@pytest.mark.parametrize("key_heads", [(4, 4), (2, 4), (2, 2)])
@pytest.mark.parametrize("widths", [(8, 8), (8, 12)])
def test_one_program_per_head_gives_the_same_bits(widths, key_heads, monkeypatch, launched):
    arguments = small(1, heads=(4, 4), key_heads=key_heads, widths=widths)
    options = {"method": "gram", **masks(1, 37)}
    apart = loss_and_gradients(arguments, **options)
    assert "fused_gram_kernel" not in launched
    launched.clear()
    monkeypatch.setattr(kernels, "FEWEST_FUSED_PROGRAMS", 1)
    fused = loss_and_gradients(arguments, **options)
    # A key head of the student that two matrices share is the sum of two programs' work.
    alone = key_heads != (2, 4)
    assert (launched == ["fused_gram_kernel"]) == alone
    assert torch.equal(fused[0], apart[0])
    for name in STUDENT:
        assert torch.equal(fused[1][name], apart[1][name])
    with torch.no_grad():
        assert torch.equal(kdfast.attention_mse(**arguments, **options), apart[0])


@pytest.mark.parametrize(
    "change",
    [
        {"head_map": torch.eye(2)},
        {"teacher_query": torch.randn(2, 2, 37, 12, dtype=torch.float64)},
        {
            "teacher_query": torch.randn(2, 2, 37, 130),
            "teacher_key": torch.randn(2, 2, 37, 130),
        },
    ],
    ids=["head_map", "float64", "wide heads"],
)
def test_what_stays_matrix_products(change, launched):
    arguments = small() | change
    options = {"head_map": arguments.pop("head_map", None)}
    check(arguments, **options)
    assert launched == []


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}])
@every_form
def test_nothing_to_compare(method, causal, sizes):
    loss, found = loss_and_gradients(small(**sizes), method=method, causal=causal)
    assert loss == 0
    assert all(gradient.numel() == 0 for gradient in found.values())


# Near convergence.


@every_form
@pytest.mark.parametrize("rotated", [False, True], ids=["same basis", "rotated"])
@pytest.mark.parametrize("epsilon", [1e-2, 1e-4])
def test_precision_as_the_student_approaches_the_teacher(epsilon, rotated, method, causal):
    arguments = copied(epsilon, rotated, length=80, batch=1, heads=(1, 1))
    options = {"method": method, "causal": causal}
    loss, found = loss_and_gradients(arguments, **options)
    expected = oracle(arguments, **options)
    loss_error = abs(loss.double() / expected[0] - 1).item()
    gradient_error = max(relative_error(found[name], expected[1][name]) for name in STUDENT)
    assert loss >= 0
    if not rotated:
        assert loss_error < 1e-6
        assert gradient_error < 2e-6
    elif epsilon == 1e-2:
        assert loss_error < 1e-3
    assert gradient_error < 3e-6 + 3e-6 / epsilon


@every_form
@pytest.mark.parametrize("size", [1e-2, 1e-4])
@pytest.mark.parametrize("fused", [False, True])
def test_a_student_smaller_than_its_teacher(fused, size, method, causal, monkeypatch):
    if fused:
        monkeypatch.setattr(kernels, "FEWEST_FUSED_PROGRAMS", 1)
    arguments = smaller(size, length=70, batch=1, heads=(2, 2), key_heads=(1, 1))
    check(arguments, method=method, causal=causal, **masks(1, 70))


@every_form
def test_a_copy_of_the_teacher_has_no_loss(method, causal):
    arguments = copied(0, length=40, batch=1, heads=(1, 1))
    for dtype in (torch.float32, torch.bfloat16):
        same = {name: tensor.to(dtype) for name, tensor in arguments.items()}
        loss, found = loss_and_gradients(same, method=method, causal=causal)
        assert loss == 0
        if dtype == torch.float32 or method == "tiled":
            assert all((gradient == 0).all() for gradient in found.values())


def test_never_negative():
    arguments = copied(0, rotated=True, length=40, batch=4, heads=(2, 2))
    for method, causal in FORMS:
        options = {"method": method, "causal": causal, "reduction": "none"}
        assert (kdfast.attention_mse(**arguments, **options) >= 0).all()


# What `auto` takes.


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_auto_is_tiled_up_to_some_length(causal, wanted, monkeypatch):
    monkeypatch.undo()

    def chosen(length, width=64, key_heads=12):
        queries = (torch.empty(1, 12, length, width, device="meta"),) * 2
        keys = (torch.empty(1, key_heads, length, width, device="meta"),) * 2
        gradients = queries[0] if wanted else None, keys[0] if wanted else None
        return kernels.cheaper_method(queries, keys, gradients, causal=causal)

    for width in (16, 64, 128):
        lengths = [2**power for power in range(15)]
        methods = [chosen(length, width) for length in lengths]
        assert methods == sorted(methods, reverse=True)
        assert methods[0] == "tiled"
        assert methods[-1] == "gram"
    # The turning point: 4 S² d of scores, or 8 and a half with gradients, against Gram matrices.
    turn = max(length for length in range(1, 2000) if chosen(length) == "tiled")
    assert (64 <= turn <= 192) if not causal else (192 < turn < 1024)


def test_auto_takes_the_cheaper(launched):
    for length, kernel in ((16, "key_kernel"), (150, "gram_kernel")):
        launched.clear()
        check(small(1, length, (1, 1), widths=(16, 16)))
        assert ("gram_kernel" in launched) == (kernel == "gram_kernel")
