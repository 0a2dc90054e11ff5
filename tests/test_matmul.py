"""The CPU's own matrix product against float64, and who takes it when."""

import subprocess
import sys

import pytest
import torch
from products import products
from tolerances import relative_error

import kdfast
from kdfast.ops import matmul
from kdfast.ops.head import Head
from kdfast.ops.matmul import multiply, takes_half

pytestmark = pytest.mark.skipif(
    "cpp" not in kdfast.available_backends(), reason="the C++ extension is not built"
)

HALF = (torch.bfloat16, torch.float16)
# Rows, depth and columns: around the edges of tiles, panels, blocks and spans.
SHAPES = (
    (1, 1, 1),
    (1, 7, 33),
    (2, 16, 32),
    (3, 513, 5),
    (8, 512, 64),
    (9, 31, 31),
    (17, 1025, 259),
    (65, 3, 300),
    (129, 40, 257),
    (1030, 17, 35),
)
LAYOUTS = ("rows", "columns", "strided", "padded")


@pytest.fixture(autouse=True)
def _own_product(monkeypatch):
    monkeypatch.setenv("KDFAST_MATMUL", "cpp")


def laid_out(values, layout):
    """The same values with other strides."""
    if layout == "columns":
        return values.T.contiguous().T
    if layout == "strided":
        return values.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    if layout == "padded":
        # What stands beside a matrix is none of its business.
        wider = values.new_full((values.shape[0] + 2, values.shape[1] + 5), torch.nan)
        wider[1:-1, 3:-2] = values
        return wider[1:-1, 3:-2]
    return values


def factors(rows, depth, columns, dtypes=(torch.float32, torch.float32)):
    return torch.randn(rows, depth).to(dtypes[0]), torch.randn(depth, columns).to(dtypes[1])


def product(left, right, **options):
    out = torch.full((left.shape[0], right.shape[1]), torch.nan)
    multiply(left, right, out, **options)
    return out


def assert_is_product(found, left, right, added=0.0):
    left, right = left.double(), right.double()
    error = (found.double() - (left @ right + added)).abs()
    # Every term is rounded into a sum of the size of √n terms, and their errors add up like √n
    # more: to a few ulps of the sum of sizes, in an entry of very many.
    scale = left.abs() @ right.abs() + torch.as_tensor(added).abs()
    assert (error <= 8 * 2.0**-24 * scale).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("of_left", LAYOUTS)
@pytest.mark.parametrize("of_right", LAYOUTS)
def test_matches_float64(shape, of_left, of_right):
    left, right = factors(*shape)
    found = product(laid_out(left, of_left), laid_out(right, of_right))
    assert_is_product(found, left, right)


def test_a_depth_of_very_many_blocks():
    left, right = factors(5, 300_001, 3)
    assert_is_product(product(left, right), left, right)


@pytest.mark.parametrize("of_out", ["rows", "columns", "padded"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(33, 600, 45), (130, 20, 64), (2, 3, 300)], ids=str)
def test_out(shape, accumulate, of_out):
    left, right = factors(*shape)
    before = torch.randn(shape[0], shape[2])
    around = torch.randn(shape[0] + 2, shape[2] + 5)
    if of_out == "padded":
        out = around[1:-1, 3:-2]
    else:
        out = laid_out(torch.empty(shape[0], shape[2]), of_out)
    out.copy_(before if accumulate else torch.tensor(torch.nan))
    border = around.clone()
    multiply(left, right, out, accumulate=accumulate)
    assert_is_product(out, left, right, before.double() if accumulate else 0.0)
    if of_out == "padded":
        # Tiles are whole; what they are written to is not.
        border[1:-1, 3:-2] = out
        assert torch.equal(around, border)


@pytest.mark.parametrize("of_left", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("of_right", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_half_precision_factors(of_left, of_right, layout):
    left, right = factors(37, 530, 70, (of_left, of_right))
    # Subnormal and large numbers of both formats, last: what follows is rounded to their size.
    left[0, -4:] = torch.tensor([6e-8, -3e-6, 6e4, -6e4])
    right[-4:, 0] = torch.tensor([-6e4, 6e4, 6e-8, 3e-6])
    found = product(laid_out(left, layout), laid_out(right, layout))
    assert_is_product(found, left, right)
    assert torch.equal(found, product(left.float(), right.float()))


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 3, 0), (0, 0, 0), (5, 0, 33)], ids=str)
def test_nothing_to_add_up(shape):
    assert torch.equal(product(*factors(*shape)), torch.zeros(shape[0], shape[2]))
    out = torch.ones(shape[0], shape[2])
    multiply(*factors(*shape), out, accumulate=True)
    assert torch.equal(out, torch.ones(shape[0], shape[2]))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_what_is_not_finite_spreads_as_in_pytorch(special, dtype):
    left, right = factors(35, 90, 70, (dtype, dtype))
    left[34, 5] = right[7, 69] = special
    right[5, 3] = 0
    found, expected = product(left, right), left.float() @ right.float()
    assert torch.equal(found.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(found[infinite], expected[infinite])
    assert found[:34, :69].isfinite().all()


def test_no_sum_depends_on_what_is_beside_it(monkeypatch):
    left, right = factors(143, 1100, 290)
    whole = product(left, right)
    for threads in (1, 2, 3, 4, 7, 200):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(product(left, right), whole)
    assert torch.equal(product(left[5:12], right[:, 40:271]), whole[5:12, 40:271])
    transposed = torch.empty(290, 143).T
    multiply(left, right, transposed)
    torch.testing.assert_close(transposed, whole)


# Who multiplies.


def multipliers(step):
    return [name for name, _ in products(step)]


@pytest.mark.parametrize("faster", [False, True])
def test_the_rule(monkeypatch, faster):
    monkeypatch.delenv("KDFAST_MATMUL")
    monkeypatch.setattr(matmul, "_faster_here", lambda: faster)
    own = ["kdfast::matmul"] if faster else ["aten::mm"]
    edge = matmul.SMALLEST
    for shape in ((edge, edge, edge), (edge, 2 * edge, 500)):
        assert multipliers(lambda shape=shape: product(*factors(*shape))) == own
    for shape in ((edge - 1, 500, 500), (500, edge - 1, 500), (500, 500, edge - 1)):
        assert multipliers(lambda shape=shape: product(*factors(*shape))) == ["aten::mm"]
    half = torch.empty(1, dtype=torch.bfloat16)
    assert takes_half(half, torch.float32) == faster
    assert not takes_half(half, torch.float64)


def test_float64_and_other_backends_are_pytorchs():
    left, right = factors(70, 80, 90)
    out = torch.empty(70, 90, dtype=torch.float64)
    step = multipliers(lambda: multiply(left.double(), right.double(), out, accumulate=False))
    assert step == ["aten::mm"]
    assert torch.equal(out, left.double() @ right.double())
    with kdfast.backend("torch"):
        assert multipliers(lambda: product(left, right)) == ["aten::mm"]
        assert not takes_half(left, torch.float32)


def test_a_weight_in_half_precision_is_not_copied(monkeypatch):
    rows, weight = torch.randn(70, 80), torch.randn(30_000, 80).bfloat16()
    head = Head(rows, weight, None, 1.0, None, torch.float32)
    assert [block.dtype for _, block in head.blocks()] == [torch.bfloat16]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        logits = head.logits(rows, torch.empty(70, 30_000))
        return logits, head.hidden_gradient(torch.ones(70, 30_000), torch.empty(70, 80))

    own = both()
    monkeypatch.setenv("KDFAST_MATMUL", "torch")
    monkeypatch.setattr("kdfast.ops.head.BLOCK_BYTES", 1 << 20)
    assert {block.dtype for _, block in head.blocks()} == {torch.float32}
    for found, expected in zip(own, both(), strict=True):
        assert relative_error(found, expected) < 1e-6


def test_a_choice_that_is_none(monkeypatch):
    monkeypatch.setenv("KDFAST_MATMUL", "mkl")
    with pytest.raises(ValueError, match=r"KDFAST_MATMUL must be one of .*, got 'mkl'"):
        product(*factors(2, 3, 4))


WITHOUT_EXTENSION = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "kdfast._C" else find(name, *rest)
import os, torch
from kdfast.ops.matmul import multiply, takes_half
left, right, out = torch.randn(70, 80), torch.randn(80, 90), torch.empty(70, 90)
os.environ["KDFAST_MATMUL"] = "auto"
multiply(left, right, out)
assert torch.equal(out, left @ right) and not takes_half(out, torch.float32)
os.environ["KDFAST_MATMUL"] = "cpp"
try:
    multiply(left, right, out)
except RuntimeError as error:
    assert "KDFAST_MATMUL asks for 'cpp', which does not work here" in str(error), error
else:
    raise AssertionError("the extension that is missing was not missed")
"""


def test_without_the_extension():
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_EXTENSION], check=True)
