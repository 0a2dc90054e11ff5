"""attention_mse on a CUDA device, through the public function, against float64."""

import pytest
import torch
from steps import needs_memory
from test_attention_mse import STUDENT, attention, copied, leaves, loss_and_gradients, masks
from tolerances import assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import reference

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import kdfast.kernels.attention_mse as kernels

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [("gram", False), ("gram", True), ("tiled", False), ("tiled", True)]
every_form = pytest.mark.parametrize(("method", "causal"), FORMS)


@pytest.fixture(autouse=True)
def _triton():
    with kdfast.backend("triton"):
        yield
    torch.cuda.empty_cache()


def on_device(tensors):
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def sums(arguments, **options):
    """One sum per sample, and the gradients of all of them together."""
    ones = torch.ones(arguments["student_query"].shape[0], device="cuda")
    return loss_and_gradients(arguments, ones, reduction="none", **options)


def oracle(arguments, *, method=None, **options):
    """The same by differentiating the specification in float64."""
    arguments = leaves({name: tensor.double() for name, tensor in arguments.items()})
    losses = reference.attention_mse_sums(**arguments, **options)
    losses.sum().backward()
    return losses.detach(), {name: arguments[name].grad for name in STUDENT}


def assert_sums_close(found, expected, dtype):
    if dtype == torch.float32:
        assert_loss_close(found, expected, dtype)
    else:
        # Tensor cores truncate their sums of half precision: by simulation 1e-6.
        assert ((found - expected).abs() <= 4e-6 * expected).all()


def check(arguments, **options):
    dtype = arguments["student_query"].dtype
    found, expected = sums(arguments, **options), oracle(arguments, **options)
    assert_sums_close(found[0], expected[0], dtype)
    for name in STUDENT:
        assert found[1][name].dtype == dtype
        assert_gradient_close(found[1][name], expected[1][name])


# Each form with each dtype, and every pair of widths: kernels take seconds to compile, of which a
# call has up to four.
WIDTHS = [(64, 64), (64, 128), (128, 128), (40, 72), (1, 5)]
MATCHED = [
    (*form, dtype, WIDTHS[(i + 2 * j) % 5], (i + j) % 2 == 0)
    for i, form in enumerate(FORMS)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("method", "causal", "dtype", "widths", "masked"), MATCHED)
def test_matches_reference(method, causal, dtype, widths, masked):
    for length in (1, 100, 513):
        arguments = on_device(attention(2, length, (3, 3), widths=widths, dtype=dtype))
        options = on_device(masks(2, length)) if masked else {}
        check(arguments, method=method, causal=causal, **options)


@every_form
@pytest.mark.parametrize("key_heads", [(4, 4), (4, 6), (1, 12), (12, 3)])
def test_shared_key_heads(key_heads, method, causal):
    dtype = torch.float32 if causal else torch.bfloat16
    sizes = {"heads": (12, 12), "key_heads": key_heads, "widths": (64, 64)}
    arguments = on_device(attention(2, 300, **sizes, dtype=dtype))
    check(arguments, method=method, causal=causal, **on_device(masks(2, 300)))


@pytest.mark.parametrize(
    ("method", "causal", "dtype"),
    [(*form, dtype) for form, dtype in zip(FORMS, (*DTYPES[1:], *DTYPES[1:]), strict=True)],
)
def test_views_and_types(method, causal, dtype):
    arguments = attention(2, 200, (4, 4), widths=(64, 64), dtype=dtype)
    for name in ("teacher_query", "teacher_key"):
        arguments[name] = arguments[name].float()
    arguments = on_device(arguments)
    tokens_first = {
        name: tensor.transpose(1, 2).contiguous().transpose(1, 2)
        for name, tensor in arguments.items()
    }
    check(tokens_first, method=method, causal=causal)
    found, expected = (sums(given, method=method) for given in (tokens_first, arguments))
    assert torch.equal(found[0], expected[0])
    for name in STUDENT:
        assert torch.equal(found[1][name], expected[1][name])


@pytest.mark.parametrize(("width", "dtype"), list(zip([64, 128, 64], DTYPES, strict=True)))
def test_one_program_per_head(width, dtype, monkeypatch):
    arguments = on_device(attention(2, 600, (4, 4), (2, 2), widths=(width, width), dtype=dtype))
    options = {"method": "gram", **on_device(masks(2, 600))}
    check(arguments, **options)
    apart = sums(arguments, **options)
    monkeypatch.setattr(kernels, "FEWEST_FUSED_PROGRAMS", 1)
    check(arguments, **options)
    fused = sums(arguments, **options)
    # Their blocks differ, and so may the order within a chunk.
    assert_sums_close(fused[0], apart[0], dtype)
    for name in STUDENT:
        assert relative_error(fused[1][name], apart[1][name]) < (
            1e-6 if dtype.itemsize == 4 else 2e-3
        )


def test_many_heads_are_fused(monkeypatch):
    """As many as the table asks for, and with a kernel that must not be launched taken away."""
    monkeypatch.setattr(kernels, "gram_kernel", None)
    arguments = on_device(attention(44, 300, (12, 12), widths=(64, 64), dtype=torch.bfloat16))
    check(arguments, method="gram")


@every_form
def test_the_same_bits_every_run(method, causal):
    arguments = on_device(attention(4, 1000, (8, 8), (4, 4), widths=(64, 64)))
    given = {name: tensor.bfloat16() for name, tensor in arguments.items()}
    first, second = (sums(given, method=method, causal=causal) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for name in STUDENT:
        assert torch.equal(first[1][name], second[1][name])


@every_form
@pytest.mark.parametrize("rotated", [False, True], ids=["same basis", "rotated"])
@pytest.mark.parametrize("epsilon", [1, 1e-1, 1e-2, 1e-3, 1e-4])
def test_precision_as_the_student_approaches_the_teacher(epsilon, rotated, method, causal):
    arguments = on_device(copied(epsilon, rotated, length=640, batch=1, heads=(2, 2)))
    (loss,), found = sums(arguments, method=method, causal=causal)
    expected = oracle(arguments, causal=causal)
    loss_error = abs(loss.double() / expected[0] - 1).item()
    assert loss >= 0
    if epsilon >= 1e-2:
        assert loss_error < 1e-3
    allowed = 2e-6 if not rotated else 3e-6 + 3e-6 / epsilon
    assert all(relative_error(found[name], expected[1][name]) < allowed for name in STUDENT)
    if not rotated:
        assert loss_error < 1e-6


@every_form
def test_a_copy_of_the_teacher_has_no_loss(method, causal):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = copied(0, length=300, batch=1, heads=(2, 2))
        arguments = on_device({name: tensor.to(dtype) for name, tensor in arguments.items()})
        losses, found = sums(arguments, method=method, causal=causal)
        assert (losses == 0).all()
        if dtype == torch.float32:
            assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_sequence(causal):
    extra = []
    for length in (4096, 16384):
        arguments = on_device(attention(1, length, (4, 4), widths=(64, 64), dtype=torch.bfloat16))
        for tensor in (arguments[name] for name in STUDENT):
            tensor.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kdfast.attention_mse(**arguments, method="gram", causal=causal).backward()
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] < 4.2 * extra[0]
    # Both gradients, twice what the inputs take, and as much again for causal Gram matrices.
    assert extra[1] < (8 if causal else 2) * 16384 * 4 * 64 * 2 * 4


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(causal):
    arguments = on_device(attention(1, 65536, (2, 2), widths=(64, 64), dtype=torch.bfloat16))
    found = sums(arguments, causal=causal)
    with kdfast.backend("torch"):
        precise = {name: tensor.double() for name, tensor in arguments.items()}
        expected = sums(precise, method="gram", causal=causal)
    assert_sums_close(found[0], expected[0], torch.bfloat16)
    for name in STUDENT:
        assert_gradient_close(found[1][name], expected[1][name])


@every_form
def test_rows_behind_2_to_the_31_elements(method, causal):
    far = 2**30 + 64
    needs_memory(6)
    small = attention(3, 70, (2, 2), widths=(64, 64), dtype=torch.bfloat16)
    memory = torch.empty(2 * far + 4 * 70 * 2 * 64, dtype=torch.bfloat16, device="cuda")
    arguments = {}
    for index, (name, tensor) in enumerate(small.items()):
        strides, offset = (far, 70 * 64, 64, 1), index * 70 * 2 * 64
        view = memory.as_strided(tensor.shape, strides, offset)
        arguments[name] = view.copy_(tensor)
    check(arguments, method=method, causal=causal)
