import copy
import inspect
import math
import pickle

import pytest
import torch
from measure import peak_bytes
from products import CHOICES, products
from tolerances import assert_gradient_close, assert_loss_close

import kdfast
from kdfast import TruncatedSoftmax, reference
from kdfast.reference import TAIL_DIVERGENCES, TAILS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in ("cpp", "torch") if name in kdfast.available_backends()]
NAMES = ("student_hidden", "student_weight", "student_bias")
FORMS = [(tail, divergence) for tail in TAILS for divergence in TAIL_DIVERGENCES[tail]]
every_form = pytest.mark.parametrize(("tail", "divergence"), FORMS)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kdfast.backend(request.param):
        yield request.param


def head(*leading, vocab=101, width=16, k=5, dtype=torch.float32, bias=False):
    """The student's head, and a teacher's entries in no order."""
    arguments = {
        "student_hidden": torch.randn(*leading, width).to(dtype),
        "student_weight": (3 * width**-0.5 * torch.randn(vocab, width)).to(dtype),
    }
    if bias:
        arguments["student_bias"] = torch.randn(vocab).to(dtype)
    top = kdfast.truncated_softmax(3 * torch.randn(*leading, vocab), k)
    order = torch.rand(top.indices.shape).argsort(-1)
    return {**arguments, "teacher": TruncatedSoftmax(*(x.gather(-1, order) for x in top))}


def leaves(arguments):
    return {
        name: value.detach().clone().requires_grad_() if name in NAMES else value
        for name, value in arguments.items()
    }


def gradients(arguments):
    return {name: arguments[name].grad for name in NAMES if name in arguments}


def loss_and_gradients(arguments, labels=None, incoming=None, **options):
    arguments = leaves(arguments)
    loss = kdfast.linear_topk_kd_loss(labels=labels, **arguments, **options)
    loss.backward(incoming)
    return loss.detach(), gradients(arguments)


def oracle(arguments, labels=None, incoming=None, *, reduction="mean", **options):
    """In float64, by differentiating the specification."""
    teacher = arguments["teacher"]
    scale, softcap = (
        options.pop(f"student_{x}", y) for x, y in (("logit_scale", 1), ("softcap", None))
    )
    arguments = leaves({n: x.double() for n, x in arguments.items() if n in NAMES})
    logits = reference.head_logits(*(arguments.get(n) for n in NAMES), scale, softcap)
    rows = reference.topk_kd_loss_rows(
        logits, teacher.log_probs.double(), teacher.indices, labels, **options
    )[0]
    loss = rows
    if reduction != "none":
        counted = rows.numel() if labels is None else (labels != -100).sum()
        loss = rows.sum() / (counted if reduction == "mean" else 1)
    loss.backward(incoming)
    return loss.detach(), gradients(arguments)


def assert_same(result, expected, dtype):
    assert_loss_close(result[0], expected[0], dtype)
    assert result[1].keys() == expected[1].keys()
    for name, gradient in result[1].items():
        assert gradient.dtype == dtype
        assert_gradient_close(gradient, expected[1][name])


# Against the specification.


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_matches_reference(tail, divergence, dtype, alpha, backend):
    arguments = head(3, 7, dtype=dtype, bias=True)
    labels = torch.randint(101, (3, 7))
    labels[0, 2] = labels[2] = -100
    options = {"tail": tail, "divergence": divergence, "temperature": 2.0, "alpha": alpha}
    assert_same(
        loss_and_gradients(arguments, labels, **options),
        oracle(arguments, labels, **options),
        dtype,
    )


@pytest.mark.parametrize("tail", ["support", "bucket"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_what_a_head_may_have(tail, softcap, backend):
    arguments = head(9, bias=True)
    options = {"tail": tail, "student_logit_scale": 0.5, "student_softcap": softcap}
    result = loss_and_gradients(arguments, **options)
    assert_same(result, oracle(arguments, **options), torch.float32)


@pytest.mark.parametrize(
    ("vocab", "width", "k"), [(1, 1, 1), (7, 3, 7), (5000, 65, 64), (2049, 1, 3)]
)
def test_sizes(vocab, width, k, backend):
    arguments = head(33, vocab=vocab, width=width, k=k, bias=True)
    result = loss_and_gradients(arguments, tail="support")
    expected = oracle(arguments, tail="support")
    torch.testing.assert_close(result[0].double(), expected[0], rtol=1e-6, atol=1e-9)
    for name, gradient in result[1].items():
        error = (gradient - expected[1][name]).norm()
        assert error <= 2e-6 * expected[1][name].norm() + 1e-9, name


@pytest.mark.parametrize("tail", TAILS)
def test_is_the_loss_of_the_logits(tail, backend):
    arguments = head(2, 5, bias=True)
    logits = reference.head_logits(*(arguments[name] for name in NAMES))
    options = {"tail": tail, "temperature": 2.0, "return_parts": True}
    result = kdfast.linear_topk_kd_loss(**arguments, **options)
    expected = kdfast.topk_kd_loss(logits, arguments["teacher"], **options)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_every_chunk_gives_the_same(chunk_size, backend):
    arguments, labels = head(9, bias=True), torch.randint(101, (9,))
    options = {"alpha": 0.5, "chunk_size": chunk_size}
    result = loss_and_gradients(arguments, labels, **options)
    assert_same(result, oracle(arguments, labels, alpha=0.5), torch.float32)


@pytest.mark.parametrize("tail", ["support", "bucket"])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3)])
def test_leading_shapes(leading, tail, backend):
    arguments = head(*leading, bias=True)
    loss, found = loss_and_gradients(arguments, tail=tail, reduction="sum")
    if not math.prod(leading):
        assert loss == 0
        assert all((gradient == 0).all() for gradient in found.values())
    else:
        assert_same((loss, found), oracle(arguments, tail=tail, reduction="sum"), torch.float32)


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_gradcheck(tail, backend):
    arguments = head(3, vocab=9, width=4, dtype=torch.float64, bias=True)
    teacher = arguments["teacher"]
    inputs = [arguments[name].requires_grad_() for name in NAMES]

    def loss(hidden, weight, bias):
        options = {"tail": tail, "student_bias": bias, "student_softcap": 2.0, "temperature": 3.0}
        return kdfast.linear_topk_kd_loss(hidden, weight, teacher, **options)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_per_token_keywords(tail, backend):
    arguments, labels = head(3, 4), torch.randint(101, (3, 4))
    labels[1, 2] = -100
    options = {
        "tail": tail,
        "token_weight": torch.rand(3, 4) + 0.5,
        "temperature": torch.rand(3, 4) + 0.5,
    }
    result = loss_and_gradients(arguments, labels, **options)
    assert_same(result, oracle(arguments, labels, **options), torch.float32)


@pytest.mark.parametrize("tail", ["support", "bucket"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_reduction(dtype, tail, backend):
    arguments, labels = head(3, 4, dtype=dtype, bias=True), torch.randint(101, (3, 4))
    labels[1, 2] = -100
    incoming = torch.rand(3, 4)
    options = {"tail": tail, "reduction": "none"}
    result = loss_and_gradients(arguments, labels, incoming, **options)
    assert_same(result, oracle(arguments, labels, incoming.double(), **options), dtype)


# What does not count.


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_tokens_count_for_nothing(dtype, tail, backend):
    arguments, labels = head(8, dtype=dtype, bias=True), torch.randint(101, (8,))
    labels[::3] = -100
    kept = labels != -100
    arguments["student_hidden"][~kept] = math.nan
    loss, found = loss_and_gradients(arguments, labels, tail=tail)
    assert (found["student_hidden"][~kept] == 0).all()
    found["student_hidden"] = found["student_hidden"][kept]
    arguments["student_hidden"] = arguments["student_hidden"][kept]
    arguments["teacher"] = TruncatedSoftmax(*(x[kept] for x in arguments["teacher"]))
    assert_same((loss, found), oracle(arguments, tail=tail), dtype)


@pytest.mark.parametrize("sparse", [False, True])
def test_no_counted_token_is_a_loss_of_zero(sparse, backend):
    arguments, labels = head(4, bias=True), torch.full((4,), -100)
    loss, found = loss_and_gradients(arguments, labels, tail="support", sparse_weight_grad=sparse)
    assert loss == 0
    assert found["student_weight"].is_sparse == sparse
    assert all((gradient.to_dense() == 0).all() for gradient in found.values())


@pytest.mark.parametrize("tail", TAILS)
def test_padding_entries_do_not_exist(tail, backend):
    arguments = head(6, k=4, bias=True)
    teacher = arguments["teacher"]
    expected = loss_and_gradients(arguments, tail=tail)
    padding = torch.full((6, 3), -1)
    arguments["teacher"] = TruncatedSoftmax(
        torch.cat([torch.full((6, 3), math.nan), teacher.log_probs], -1),
        torch.cat([padding, teacher.indices], -1),
    )
    loss, found = loss_and_gradients(arguments, tail=tail)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(found, expected[1])


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_padding_rows_of_the_weight_do_not_exist(tail, backend):
    arguments = head(6, bias=True)
    expected = loss_and_gradients(arguments, tail=tail)
    for name in NAMES[1:]:
        padding = torch.full_like(arguments[name][:7], math.nan)
        arguments[name] = torch.cat([arguments[name], padding])
    loss, found = loss_and_gradients(arguments, tail=tail, vocab_size=101)
    torch.testing.assert_close(loss, expected[0])
    for name in NAMES[1:]:
        assert (found[name][101:] == 0).all()
        found[name] = found[name][:101]
    torch.testing.assert_close(found, expected[1])


# The support alone.


@pytest.mark.parametrize("multiplier", CHOICES)
def test_the_support_takes_no_product_of_the_heads_size(multiplier, monkeypatch):
    monkeypatch.setenv("KDFAST_MATMUL", multiplier)
    arguments, labels = leaves(head(9)), torch.randint(101, (9,))

    def step(**options):
        return lambda: kdfast.linear_topk_kd_loss(**arguments, **options).backward()

    def count(step):
        return len([*products(step)])

    assert count(step(tail="support")) == 0
    # A training step of the other tails: the logits, and two of the gradient.
    assert count(step(tail="bucket")) == 3
    assert count(step(tail="support", labels=labels, alpha=0.5)) == 3


def test_the_support_does_not_look_elsewhere(backend):
    arguments = head(9, vocab=500, bias=True)
    named = torch.zeros(500, dtype=torch.bool)
    named[arguments["teacher"].indices.flatten()] = True
    for name in NAMES[1:]:
        arguments[name][~named] = math.nan
    loss, found = loss_and_gradients(arguments, tail="support")
    assert loss.isfinite()
    for name in NAMES[1:]:
        assert (found[name][~named] == 0).all()
        assert found[name].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sparse_gradient_is_the_dense_one(dtype, reduction, backend):
    arguments, labels = head(4, 6, dtype=dtype, bias=True), torch.randint(101, (4, 6))
    labels[0] = -100
    options = {"tail": "support", "reduction": reduction}
    incoming = torch.rand(4, 6) if reduction == "none" else torch.tensor(3.0)
    _, dense = loss_and_gradients(arguments, labels, incoming, **options)
    _, sparse = loss_and_gradients(arguments, labels, incoming, sparse_weight_grad=True, **options)
    gradient = sparse["student_weight"]
    assert gradient.is_sparse
    assert gradient.dtype == dtype
    assert torch.equal(gradient.to_dense(), dense["student_weight"])
    listed = arguments["teacher"].indices[1:].unique()
    # Each row once.
    assert gradient._nnz() == len(listed)
    assert torch.equal(gradient.coalesce().indices()[0], listed)
    assert torch.equal(sparse["student_hidden"], dense["student_hidden"])
    assert torch.equal(sparse["student_bias"], dense["student_bias"])


def test_a_sparse_gradient_trains():
    arguments = leaves(head(9))
    weight = arguments["student_weight"]
    dense = leaves(arguments)
    for step in (arguments, dense):
        optimizer = torch.optim.SGD([step["student_weight"]], lr=0.1)
        options = {"tail": "support", "sparse_weight_grad": step is arguments}
        kdfast.linear_topk_kd_loss(**step, **options).backward()
        optimizer.step()
    torch.testing.assert_close(weight, dense["student_weight"])
    torch.optim.SparseAdam([weight]).step()


def test_gradients_that_nobody_wants_are_none():
    for wanted in NAMES:
        arguments = head(9, bias=True)
        arguments[wanted].requires_grad_()
        for tail in ("support", "bucket"):
            expected = leaves(arguments)
            arguments[wanted].grad = None
            kdfast.linear_topk_kd_loss(**arguments, tail=tail).backward()
            kdfast.linear_topk_kd_loss(**expected, tail=tail).backward()
            torch.testing.assert_close(arguments[wanted].grad, expected[wanted].grad)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="plain PyTorch gathers the rows")
def test_the_support_adds_its_gradients_and_nothing_else():
    arguments = leaves(head(512, vocab=20000, width=256, k=64))

    def step(sparse):
        loss = kdfast.linear_topk_kd_loss(**arguments, tail="support", sparse_weight_grad=sparse)
        torch.autograd.grad(loss, [arguments[name] for name in NAMES[:2]])

    step(False)
    hidden, weight = (arguments[name].nbytes for name in NAMES[:2])
    # A few numbers for each of 512 x 64 entries; the rows of the weight would be 32 MiB.
    slack = 8 * 2**20
    assert peak_bytes(lambda: step(False)) < hidden + weight + slack
    rows = arguments["teacher"].indices.unique().numel()
    assert peak_bytes(lambda: step(True)) < hidden + rows * 256 * 4 + slack


def test_same_bits_every_run_and_for_any_number_of_threads():
    arguments = head(513, vocab=3001, width=64, k=32, bias=True)
    first = loss_and_gradients(arguments, tail="support")
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            again = loss_and_gradients(arguments, tail="support")
            for name in NAMES:
                assert torch.equal(again[1][name], first[1][name])
    finally:
        torch.set_num_threads(threads)


# The boundary.


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_second_backward_through_a_retained_graph(tail, backend):
    arguments = leaves(head(9))
    loss = kdfast.linear_topk_kd_loss(**arguments, tail=tail)
    leaf = arguments["student_weight"]
    first = torch.autograd.grad(loss, leaf, torch.tensor(2.0), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf, torch.tensor(2.0))[0], first)


def test_double_backward_is_refused():
    arguments = leaves(head(9))
    loss = kdfast.linear_topk_kd_loss(**arguments, tail="support")
    with pytest.raises(RuntimeError, match="linear_topk_kd_loss has no second derivative"):
        torch.autograd.grad(loss, arguments["student_hidden"], create_graph=True)


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_a_loss_scale_is_inside_the_rounding(tail):
    arguments = head(9, dtype=torch.float16)
    expected = oracle(arguments, tail=tail)[1]
    _, scaled = loss_and_gradients(arguments, incoming=torch.tensor(1024.0), tail=tail)
    for name, gradient in scaled.items():
        assert_gradient_close(gradient, 1024 * expected[name])


def test_tied_embeddings():
    table, ids = torch.nn.Embedding(101, 16), torch.randint(101, (9,))
    teacher = head(9)["teacher"]
    for tail, sparse in (("support", False), ("support", True), ("bucket", False)):
        table.weight.grad = None
        options = {"tail": tail, "sparse_weight_grad": sparse}
        kdfast.linear_topk_kd_loss(table(ids).tanh(), table.weight, teacher, **options).backward()
        result, table.weight.grad = table.weight.grad.to_dense(), None
        logits = table(ids).tanh() @ table.weight.T
        kdfast.topk_kd_loss(logits, teacher, tail=tail).backward()
        torch.testing.assert_close(result, table.weight.grad)


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_autocast_and_mixed_dtypes(tail, backend):
    arguments = head(9, bias=True)
    arguments["student_hidden"] = arguments["student_hidden"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = loss_and_gradients(arguments, tail=tail)
    expected = oracle(arguments, tail=tail)
    assert_loss_close(loss, expected[0], torch.float32)
    for name in NAMES:
        assert found[name].dtype == arguments[name].dtype
        assert_gradient_close(found[name], expected[1][name])


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_checkpointing(tail):
    arguments = leaves(head(9))
    step = {"tail": tail}
    loss = kdfast.linear_topk_kd_loss(**arguments, **step)
    recomputed = torch.utils.checkpoint.checkpoint(
        lambda hidden: kdfast.linear_topk_kd_loss(
            **{**arguments, "student_hidden": hidden}, **step
        ),
        arguments["student_hidden"],
        use_reentrant=False,
    )
    expected, result = (
        torch.autograd.grad(x, [arguments[name] for name in NAMES[:2]]) for x in (loss, recomputed)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


@pytest.mark.parametrize("tail", ["support", "bucket"])
def test_compiles_whole_with_dynamic_shapes(tail):
    torch.compiler.reset()
    options = {"tail": tail, "temperature": 2.0, "student_softcap": 20.0}

    @torch.compile(fullgraph=True, dynamic=True)
    def step(hidden, weight, bias, log_probs, indices):
        teacher = TruncatedSoftmax(log_probs, indices)
        return 2 * kdfast.linear_topk_kd_loss(hidden, weight, teacher, student_bias=bias, **options)

    for rows in (4, 6, 9):
        arguments = head(rows, bias=True)
        compiled = leaves(arguments)
        loss = step(*(compiled[name] for name in NAMES), *arguments["teacher"])
        loss.backward()
        expected, found = loss_and_gradients(arguments, None, torch.tensor(2.0), **options)
        torch.testing.assert_close(loss, 2 * expected)
        torch.testing.assert_close(gradients(compiled), found)


@pytest.mark.parametrize("tail", ["support", "bucket"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, tail):
    arguments, labels = head(3, 4, bias=True), torch.randint(101, (3, 4))
    tensors = [arguments[name] for name in NAMES]
    per_token = (*arguments["teacher"], labels, torch.rand(3, 4), torch.rand(3, 4) + 1, None, None)
    settings = {
        "weight_rows": None,
        "tail": tail,
        "divergence": "forward_kl",
        "beta": 0.5,
        "temperature": 1.0,
        "scale_t2": True,
        "alpha": 1.0,
        "ignore_index": -100,
        "vocab_size": 101,
        "reduction": reduction,
        "need_parts": False,
        "student_logit_scale": 1.0,
        "student_softcap": 3.0,
        "chunk_size": 5,
        "chunk_bytes": 2**20,
        "autocast": None,
    }
    for buffers in ([torch.empty_like(x) for x in tensors], [None] * 3):
        torch.library.opcheck(
            torch.ops.kdfast.linear_topk_kd_loss_forward.default,
            (*tensors, *per_token, *buffers),
            settings,
        )


def test_module_is_the_function():
    arguments, labels = head(4, bias=True), torch.randint(101, (4,))
    options = {"divergence": "jsd", "temperature": 2.0, "alpha": 0.3, "student_softcap": 9.0}
    module = kdfast.LinearTopKKDLoss(**options)
    expected = kdfast.linear_topk_kd_loss(labels=labels, **arguments, **options)
    for face in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(face(labels=labels, **arguments), expected)
    assert "student_softcap=9.0" in repr(module)


def test_module_knows_every_keyword_of_the_function():
    function = inspect.signature(kdfast.linear_topk_kd_loss).parameters
    settings = inspect.signature(kdfast.LinearTopKKDLoss).parameters
    call = inspect.signature(kdfast.LinearTopKKDLoss.forward).parameters
    assert set(function) == set(settings) | set(call) - {"self"}
    for name, parameter in settings.items():
        assert parameter.default == function[name].default


def test_keywords_are_those_of_topk_kd_loss():
    ours = inspect.signature(kdfast.linear_topk_kd_loss).parameters
    theirs = inspect.signature(kdfast.topk_kd_loss).parameters
    assert set(theirs) - set(ours) == {"student_logits", "overwrite_student_logits"}
    for name in set(ours) & set(theirs):
        assert ours[name] == theirs[name]


PAIR = TruncatedSoftmax(torch.zeros(4, 2), torch.tensor([0, 1]).expand(4, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a tensor, got list"),
        ({"student_weight": torch.zeros(9, 3)}, ValueError, r"student_weight must be \[vocab, 4\]"),
        ({"student_bias": torch.zeros(8)}, ValueError, "student_bias must have .*9.*got .8,."),
        ({"student_softcap": -1.0}, ValueError, "student_softcap must be"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"teacher": tuple(PAIR)}, TypeError, "teacher must be a TruncatedSoftmax, got tuple"),
        ({"teacher": TruncatedSoftmax(*(x[:3] for x in PAIR))}, ValueError,
         r"teacher.log_probs must have the leading shape of student_hidden \(4,\), got \(3,\)"),
        ({"teacher": PAIR._replace(indices=torch.tensor([0, 9]).expand(4, 2))}, ValueError,
         r"teacher.indices must be in \[0, 9\), or −1, got 9"),
        ({"vocab_size": 10}, ValueError, "vocab_size must be .* rows of student_weight.* got 10"),
        ({"tail": "rest"}, ValueError, "tail must be one of .*'rest'"),
        ({"divergence": "reverse_kl", "tail": "none"}, ValueError, "divergence must be one of"),
        ({"alpha": 0.5}, ValueError, "labels are needed"),
        ({"sparse_weight_grad": True}, ValueError, "sparse_weight_grad needs tail='support'"),
        ({"sparse_weight_grad": True, "tail": "support", "alpha": 0.5,
          "labels": torch.zeros(4).long()}, ValueError, "sparse_weight_grad needs .*alpha=0.5"),
        ({"labels": torch.tensor([0, 1, 9, 2])}, ValueError, r"labels must be in \[0, 9\).*got 9"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"student_hidden": torch.zeros(4, 4), "student_weight": torch.zeros(9, 4)}
    with pytest.raises(error, match=message):
        kdfast.linear_topk_kd_loss(**{**arguments, "teacher": PAIR, **change})
