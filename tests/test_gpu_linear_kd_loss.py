"""linear_kd_loss on a CUDA device, through the public function, against float64."""

import pytest
import torch
from tolerances import GRADIENT, LOSS, relative_error

import kdfast
from kdfast import reference
from kdfast.reference import DIVERGENCES

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("student_hidden", "student_weight", "student_bias")

# The logits' gradient is rounded once on its way into the tensor cores, and the result once more;
# float32 products are exact but for their order.
PRODUCTS = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def heads(rows, vocab, student=256, teacher=320, dtype=torch.bfloat16):
    arguments = {}
    for owner, width in (("student", student), ("teacher", teacher)):
        arguments[f"{owner}_hidden"] = torch.randn(rows, width, device="cuda").to(dtype)
        weight = 3 * width**-0.5 * torch.randn(vocab, width, device="cuda")
        arguments[f"{owner}_weight"] = weight.to(dtype)
        arguments[f"{owner}_bias"] = torch.randn(vocab, device="cuda").to(dtype)
    return arguments


def leaves(arguments):
    return {
        name: value.detach().clone().requires_grad_() if name in NAMES else value
        for name, value in arguments.items()
    }


def loss_and_gradients(arguments, labels=None, incoming=None, **options):
    arguments = leaves(arguments)
    loss = kdfast.linear_kd_loss(labels=labels, **arguments, **options)
    loss.backward(incoming)
    return loss.detach(), {name: arguments[name].grad for name in NAMES}


def oracle(arguments, labels=None, *, softcap=None, **options):
    arguments = leaves({name: value.double() for name, value in arguments.items()})
    student, teacher = (
        reference.head_logits(
            *(arguments[f"{owner}_{part}"] for part in ("hidden", "weight", "bias")),
            softcap=softcap,
        )
        for owner in ("student", "teacher")
    )
    rows = reference.kd_loss_rows(student, teacher, labels, **options)[0]
    loss = rows.sum() / (len(rows) if labels is None else (labels != -100).sum())
    loss.backward()
    return loss.detach(), {name: arguments[name].grad for name in NAMES}


def assert_same(result, expected, dtype):
    assert relative_error(result[0], expected[0]) < 10 * LOSS[dtype]
    for name, gradient in result[1].items():
        assert gradient.dtype == dtype
        allowed = max(PRODUCTS[dtype], GRADIENT.get(dtype, 0))
        assert relative_error(gradient, expected[1][name]) < allowed, name


@pytest.fixture(autouse=True)
def _exact_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# Each pair once or nearly so: a kernel takes a second to compile.
MATCHED = [
    (divergence, DTYPES[(i + j) % 3], (1000, 32003)[(i + j) % 2])
    for i, divergence in enumerate(DIVERGENCES)
    for j in range(2)
]


@pytest.mark.parametrize(("divergence", "dtype", "vocab"), MATCHED)
def test_matches_reference(divergence, dtype, vocab):
    arguments = heads(67, vocab, dtype=dtype)
    labels = torch.randint(vocab, (67,), device="cuda")
    labels[::5] = -100
    options = {"divergence": divergence, "beta": 0.3, "temperature": 2.0, "alpha": 0.4}
    result = loss_and_gradients(arguments, labels, chunk_size=24, **options)
    assert_same(result, oracle(arguments, labels, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(dtype):
    arguments = heads(40, 5003, dtype=dtype)
    options = {"student_softcap": 5.0, "teacher_softcap": 5.0}
    result = loss_and_gradients(arguments, chunk_size=16, **options)
    assert_same(result, oracle(arguments, softcap=5.0), dtype)


def test_float16_gradients_do_not_underflow():
    arguments = heads(40, 32003, dtype=torch.float16)
    scale, divisor = torch.tensor(65536.0, device="cuda"), 1e8
    result = loss_and_gradients(arguments, None, scale, num_items=divisor)
    expected = oracle(arguments)
    factor = 40 / divisor * 65536
    for name, gradient in result[1].items():
        assert relative_error(gradient, factor * expected[1][name]) < PRODUCTS[torch.float16]


def test_ignored_rows_may_hold_nan():
    arguments, labels = heads(40, 1000), torch.randint(1000, (40,), device="cuda")
    labels[7:9] = -100
    expected = loss_and_gradients(arguments, labels)
    for side in ("student_hidden", "teacher_hidden"):
        arguments[side][7:9] = torch.nan
    result = loss_and_gradients(arguments, labels)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1]["student_weight"], expected[1]["student_weight"])
    assert (result[1]["student_hidden"][7:9] == 0).all()


def test_autocast_keeps_master_weights_gradient_in_float32():
    arguments = heads(64, 5003, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(arguments)
    rounded = {name: value.bfloat16().float() for name, value in arguments.items()}
    rounded |= {name: arguments[name] for name in ("student_bias", "teacher_bias")}
    expected = oracle(rounded)
    assert relative_error(loss, expected[0]) < 1e-5
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, expected[1][name]) < PRODUCTS[torch.bfloat16]


def test_memory_is_a_chunk_and_the_gradients():
    rows, vocab, width = 8192, 128256, 512
    arguments = leaves(heads(rows, vocab, width, width))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = kdfast.linear_kd_loss(**arguments)
    # Weight and hidden gradients in float32, and in bfloat16 when they are handed over.
    gradients = (rows + vocab) * width * 6
    assert torch.cuda.max_memory_allocated() - before < 2**30 + gradients + 64 * 2**20
    loss.backward()


def test_compiles_whole():
    arguments, labels = heads(64, 1000), torch.randint(1000, (64,), device="cuda")
    compiled = torch.compile(kdfast.linear_kd_loss, fullgraph=True)
    tensors = leaves(arguments)
    loss = compiled(labels=labels, **tensors, alpha=0.5)
    loss.backward()
    expected = loss_and_gradients(arguments, labels, alpha=0.5)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(tensors[name].grad, gradient)
