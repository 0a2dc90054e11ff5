import copy
import inspect
import pickle

import products
import pytest
import torch
import torch.nn.functional as F
from measure import peak_bytes
from tolerances import assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import reference
from kdfast.ops.head import HeadGradients, float16_headroom
from kdfast.reference import DIVERGENCES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in ("cpp", "torch") if name in kdfast.available_backends()]
NAMES = ("student_hidden", "student_weight", "student_bias")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kdfast.backend(request.param):
        yield request.param


def heads(*tokens, vocab=101, student=16, teacher=24, dtype=torch.float32, bias=False):
    """The tensor arguments of two models: logits have a standard deviation of 3."""
    arguments = {}
    for owner, width in (("student", student), ("teacher", teacher)):
        arguments[f"{owner}_hidden"] = torch.randn(*tokens, width).to(dtype)
        arguments[f"{owner}_weight"] = (3 * width**-0.5 * torch.randn(vocab, width)).to(dtype)
        if bias:
            arguments[f"{owner}_bias"] = torch.randn(vocab).to(dtype)
    return arguments


def leaves(arguments):
    return {
        name: value.detach().clone().requires_grad_() if name in NAMES else value
        for name, value in arguments.items()
    }


def gradients(arguments):
    return {name: arguments[name].grad for name in NAMES if name in arguments}


def loss_and_gradients(arguments, labels=None, incoming=None, **options):
    arguments = leaves(arguments)
    loss = kdfast.linear_kd_loss(labels=labels, **arguments, **options)
    loss.backward(incoming)
    return loss.detach(), gradients(arguments)


def oracle(arguments, labels=None, *, reduction="mean", incoming=None, **options):
    """Loss and gradients in float64, by differentiating the specification on whole logits."""
    head_options = {
        owner: {
            "scale": options.pop(f"{owner}_logit_scale", 1.0),
            "softcap": options.pop(f"{owner}_softcap", None),
        }
        for owner in ("student", "teacher")
    }
    arguments = leaves({name: value.double() for name, value in arguments.items()})
    student, teacher = (
        reference.head_logits(
            *(arguments.get(f"{owner}_{part}") for part in ("hidden", "weight", "bias")),
            **head_options[owner],
        )
        for owner in ("student", "teacher")
    )
    loss = reference.kd_loss_rows(student, teacher, labels, **options)[0]
    counted = loss.numel() if labels is None else (labels != -100).sum()
    if reduction != "none":
        loss = loss.sum() / (counted if reduction == "mean" else 1)
    loss.backward(incoming)
    return loss.detach(), gradients(arguments)


def assert_same(result, expected, dtype):
    assert_loss_close(result[0], expected[0], dtype)
    assert result[1].keys() == expected[1].keys()
    for name, gradient in result[1].items():
        assert gradient.dtype == dtype
        assert_gradient_close(gradient, expected[1][name])


# Against the specification.


def test_reference_is_the_naive_head():
    arguments = heads(5, bias=True)
    logits = reference.head_logits(
        arguments["student_hidden"], arguments["student_weight"], arguments["student_bias"]
    )
    linear = F.linear(*(arguments[name] for name in NAMES))
    torch.testing.assert_close(logits, linear)
    hidden, weight = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    capped = reference.head_logits(hidden, weight, torch.ones(1), 0.5, 2.0)
    torch.testing.assert_close(capped, 2 * torch.tensor([[(0.5 * 7) / 2]]).tanh())


@pytest.mark.parametrize("vocab", [1, 7, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_reference(divergence, dtype, vocab, backend):
    arguments = heads(3, 7, vocab=vocab, dtype=dtype)
    labels = torch.randint(vocab, (3, 7))
    labels[0, 2] = labels[2] = -100
    options = {"divergence": divergence, "beta": 0.3, "temperature": 2.0, "alpha": 0.4}
    result = loss_and_gradients(arguments, labels, chunk_size=4, **options)
    if vocab == 1:
        assert abs(result[0].item()) < 1e-12
        return
    assert_same(result, oracle(arguments, labels, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcaps", [(None, None), (4.0, 5.0), (None, 5.0), (4.0, None)])
def test_what_a_head_may_have(softcaps, dtype, backend):
    arguments = heads(19, dtype=dtype, bias=True)
    options = {
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 2.0,
        "student_softcap": softcaps[0],
        "teacher_softcap": softcaps[1],
    }
    result = loss_and_gradients(arguments, chunk_size=8, **options)
    assert_same(result, oracle(arguments, **options), dtype)


@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1000, None])
def test_every_chunk_gives_the_same(chunk_size, backend):
    arguments = heads(65, bias=True)
    labels = torch.randint(101, (65,))
    result = loss_and_gradients(arguments, labels, alpha=0.5, chunk_size=chunk_size)
    assert_same(result, oracle(arguments, labels, alpha=0.5), torch.float32)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (2, 3, 4)])
def test_leading_shapes(leading, backend):
    arguments = heads(*leading)
    loss, found = loss_and_gradients(arguments, reduction="sum")
    expected = oracle(arguments, reduction="sum")
    torch.testing.assert_close(loss.double(), expected[0])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[1][name], rtol=1e-4, atol=1e-6)


def test_gradcheck(backend):
    arguments = leaves(heads(2, 3, vocab=7, student=4, teacher=5, dtype=torch.float64, bias=True))
    labels = torch.tensor([[0, -100, 2], [3, 4, 5]])

    def loss(hidden, weight, bias):
        student = dict(zip(NAMES, (hidden, weight, bias), strict=True))
        options = {"alpha": 0.4, "temperature": 2.0, "student_softcap": 3.0, "reduction": "none"}
        return kdfast.linear_kd_loss(labels=labels, **{**arguments, **student}, **options)

    assert torch.autograd.gradcheck(loss, [arguments[name] for name in NAMES])


def test_strided_inputs(backend):
    arguments = heads(4, 9, bias=True)
    expected = loss_and_gradients(arguments, chunk_size=8)
    strided = {
        name: value.t().contiguous().t()
        if value.dim() == 2
        else value.repeat_interleave(2, -1)[..., ::2]
        for name, value in arguments.items()
    }
    strided["student_hidden"] = (
        strided["student_hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    )
    result = loss_and_gradients(strided, chunk_size=8)
    assert_same(result, expected, torch.float32)


# The keywords.


def test_per_token_keywords(backend):
    arguments, labels = heads(5, 4), torch.randint(101, (5, 4), dtype=torch.int32)
    options = {
        "temperature": torch.rand(5, 4) + 0.5,
        "teacher_temperature": torch.rand(5, 4) + 0.5,
        "token_weight": torch.rand(5, 4),
        "alpha": 0.5,
    }
    labels[1] = -100
    result = loss_and_gradients(arguments, labels, chunk_size=3, **options)
    assert_same(result, oracle(arguments, labels.long(), **options), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_tokens_count_for_nothing(dtype, backend):
    arguments, labels = heads(6, 3, dtype=dtype), torch.randint(101, (6, 3))
    labels[1:4, 1] = -100
    clean = loss_and_gradients(arguments, labels, alpha=0.5, chunk_size=4)
    for side in ("student_hidden", "teacher_hidden"):
        arguments[side][1:4, 1] = torch.nan
    result = loss_and_gradients(arguments, labels, alpha=0.5, chunk_size=4)
    assert torch.equal(result[0], clean[0])
    for name, gradient in result[1].items():
        assert torch.equal(gradient, clean[1][name])
    assert (result[1]["student_hidden"][1:4, 1] == 0).all()


@pytest.mark.parametrize("multiplier", products.CHOICES)
def test_ignored_tokens_take_part_in_no_product(multiplier, monkeypatch):
    monkeypatch.setenv("KDFAST_MATMUL", multiplier)
    arguments, labels = heads(64), torch.full((64,), -100)
    labels[10:12] = 5
    counted = loss_and_gradients(
        {n: v[10:12] if "hidden" in n else v for n, v in arguments.items()}, labels[10:12]
    )
    flops = products.product_flops(lambda: loss_and_gradients(arguments, labels))
    assert flops == 2 * 2 * 101 * (3 * 16 + 24)
    result = loss_and_gradients(arguments, labels)
    torch.testing.assert_close(result[1]["student_weight"], counted[1]["student_weight"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_counted_token_is_a_loss_of_zero(reduction, backend):
    arguments, labels = heads(4, bias=True), torch.full((4,), -100)
    incoming = torch.ones(4) if reduction == "none" else None
    loss, found = loss_and_gradients(arguments, labels, incoming, reduction=reduction)
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in found.values())


def test_padding_rows_of_the_weights_do_not_exist(backend):
    arguments = heads(9, vocab=90, bias=True)
    expected = loss_and_gradients(arguments)
    padded = {
        name: value
        if "hidden" in name
        else torch.cat(
            [value, value.new_full((7 if "student" in name else 30, *value.shape[1:]), torch.nan)]
        )
        for name, value in arguments.items()
    }
    loss, found = loss_and_gradients(padded, vocab_size=90)
    assert torch.equal(loss, expected[0])
    assert (found["student_weight"][90:] == 0).all()
    assert (found["student_bias"][90:] == 0).all()
    assert torch.equal(found["student_weight"][:90], expected[1]["student_weight"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_reduction(dtype, backend):
    arguments, labels = heads(4, 5, dtype=dtype, bias=True), torch.randint(101, (4, 5))
    incoming = torch.randn(4, 5).to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"alpha": 0.5, "reduction": "none"}
    result = loss_and_gradients(arguments, labels, incoming, chunk_size=7, **options)
    assert result[0].shape == (4, 5)
    assert_same(result, oracle(arguments, labels, incoming=incoming.double(), **options), dtype)
    # A frozen head waits for nothing: its hidden states' gradient is scaled token by token.
    hidden = arguments["student_hidden"].clone().requires_grad_()
    loss = kdfast.linear_kd_loss(
        labels=labels, **{**arguments, "student_hidden": hidden}, **options
    )
    loss.backward(incoming)
    assert_gradient_close(hidden.grad, result[1]["student_hidden"].double())


def test_num_items_and_parts(backend):
    arguments, labels = heads(8), torch.randint(101, (8,))
    total, soft, hard = kdfast.linear_kd_loss(
        labels=labels, **arguments, alpha=0.3, temperature=2.0, num_items=11, return_parts=True
    )
    torch.testing.assert_close(total, 0.3 * 4 * soft + 0.7 * hard)
    expected = oracle(arguments, labels, reduction="sum", alpha=0.3, temperature=2.0)[0] / 11
    torch.testing.assert_close(total.double(), expected)


# What is computed, and in what memory.


@pytest.mark.parametrize("multiplier", products.CHOICES)
@pytest.mark.parametrize("chunk_size", [5, 16, 64])
def test_a_step_is_four_products(chunk_size, multiplier, monkeypatch):
    monkeypatch.setenv("KDFAST_MATMUL", multiplier)
    rows, vocab, student, teacher = 64, 211, 16, 24
    arguments = heads(rows, vocab=vocab, student=student, teacher=teacher)
    one = 2 * rows * vocab
    options = {"chunk_size": chunk_size, "temperature": 2.0, "divergence": "jsd"}

    def flops(*differentiable, grad=True):
        tensors = {
            name: value.requires_grad_(name in differentiable) for name, value in arguments.items()
        }

        def step():
            with torch.set_grad_enabled(grad):
                loss = kdfast.linear_kd_loss(**tensors, **options)
            if grad:
                loss.backward()

        return products.product_flops(step)

    assert flops(*NAMES) == one * (3 * student + teacher)
    assert flops("student_hidden") == one * (2 * student + teacher)
    assert flops("student_weight") == one * (2 * student + teacher)
    assert flops(*NAMES, grad=False) == one * (student + teacher)


def test_gradients_that_nobody_wants_are_none():
    arguments = heads(6, bias=True)
    for wanted in NAMES:
        tensors = {n: v.detach().requires_grad_(n == wanted) for n, v in arguments.items()}
        kdfast.linear_kd_loss(**tensors).backward()
        assert [n for n in tensors if tensors[n].grad is not None] == [wanted]


@pytest.mark.skipif("cpp" not in BACKENDS, reason="plain PyTorch builds temporaries of a chunk")
@pytest.mark.parametrize("budget", [None, 16 * 2**20])
def test_memory_is_one_chunk(budget, monkeypatch):
    # 2 GiB of float32 logits on either side.
    arguments = leaves(heads(16384, vocab=32768, student=16, teacher=16))
    if budget is not None:
        monkeypatch.setenv("KDFAST_CHUNK_BYTES", str(budget))

    def step():
        loss = kdfast.linear_kd_loss(**arguments)
        return torch.autograd.grad(loss, [arguments["student_hidden"], arguments["student_weight"]])

    kept = sum(arguments[name].nbytes for name in NAMES[:2])
    slack = 12 * 2**20
    assert peak_bytes(step) < (budget or 128 * 2**20) + kept + slack


def test_memory_for_long_contexts_and_large_vocabularies():
    from kdfast.ops.head import CHUNK_BYTES, HALF_CHUNKS, rows_within

    # 16k tokens of two models' float32 logits would be 19.9 GB.
    rows = rows_within(CHUNK_BYTES["cuda"], 152064, torch.bfloat16, tensors=2)
    assert rows == 384
    assert rows * 152064 * (4 + 4 + 2 * HALF_CHUNKS) <= CHUNK_BYTES["cuda"]


def test_bfloat16_beats_logits_that_are_rounded():
    arguments = heads(256, vocab=2000, student=64, teacher=96, dtype=torch.bfloat16)
    expected = oracle(arguments, temperature=2.0)[1]["student_weight"]
    ours = loss_and_gradients(arguments, temperature=2.0)[1]["student_weight"]
    tensors = leaves(arguments)
    student = F.linear(tensors["student_hidden"], tensors["student_weight"])
    teacher = F.linear(arguments["teacher_hidden"], arguments["teacher_weight"])
    kdfast.kd_loss(student.float(), teacher.float(), temperature=2.0).backward()
    rounded = relative_error(tensors["student_weight"].grad, expected)
    assert relative_error(ours, expected) <= rounded / 3


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_half_precision_take_several_chunks_at_a_time(dtype, softcap, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from pretended import device, on_device

    arguments = heads(29, dtype=dtype, bias=True)
    labels = torch.randint(101, (29,))
    labels[[2, 3, 17, 28]] = -100
    options = {"alpha": 0.4, "temperature": 2.0, "student_softcap": softcap}
    expected = oracle(arguments, labels, **options)
    arguments["student_hidden"][labels == -100] = torch.nan
    rows = []
    add = HeadGradients.add
    monkeypatch.setattr(
        HeadGradients,
        "add",
        lambda self, head, chunk, *products: (
            rows.append(chunk) or add(self, head, chunk, *products)
        ),
    )
    arguments, labels = {name: on_device(x) for name, x in arguments.items()}, on_device(labels)
    with device(), kdfast.backend("torch"):
        found = loss_and_gradients(arguments, labels, chunk_size=3, **options)

    assert rows == [slice(0, 12), slice(12, 24), slice(24, 29)]
    assert_loss_close(found[0], expected[0], dtype)
    # The logits' gradient is rounded on its way into the products, and the result once more.
    rounding = torch.finfo(dtype).eps
    for name, gradient in found[1].items():
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected[1][name]) < rounding, name
    assert not found[1]["student_hidden"][[2, 3, 17, 28]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_scale_is_inside_the_rounding(dtype):
    arguments, scale = heads(5, dtype=dtype), torch.tensor(65536.0)
    # So many tokens that the unscaled gradients are below float16's smallest number.
    result = loss_and_gradients(arguments, None, scale, num_items=1e9)
    expected = oracle(arguments, reduction="sum")[1]
    for name, gradient in result[1].items():
        assert_gradient_close(gradient, expected[name] * 65536 / 1e9)


def test_float16_headroom():
    for temperature, weight in (
        (1.0, None),
        (20.0, None),
        (torch.tensor([1.0, 8.0]), torch.rand(2)),
    ):
        scale = torch.tensor(1e-6, dtype=torch.float64)
        factor = float16_headroom(scale, weight, temperature, True, 1.0)
        largest = (1 if weight is None else weight) * torch.as_tensor(temperature) * scale * factor
        assert 2**7 <= largest.max() <= 2**8
        assert factor.log2() == factor.log2().round()


def test_same_bits_every_run():
    arguments = heads(77, vocab=5003, bias=True)
    first = loss_and_gradients(arguments, divergence="jsd", chunk_size=32)
    for _ in range(3):
        again = loss_and_gradients(arguments, divergence="jsd", chunk_size=32)
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(again[1][name], first[1][name]) for name in first[1])


# With the rest of PyTorch.


def test_second_backward_through_a_retained_graph(backend):
    arguments = leaves(heads(6, bias=True))
    loss = kdfast.linear_kd_loss(**arguments)
    students = [arguments[name] for name in NAMES]
    first = torch.autograd.grad(3 * loss, students, retain_graph=True)
    second = torch.autograd.grad(3 * loss, students)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused():
    arguments = leaves(heads(6))
    with pytest.raises(RuntimeError, match="linear_kd_loss has no second derivative"):
        torch.autograd.grad(
            kdfast.linear_kd_loss(**arguments), arguments["student_hidden"], create_graph=True
        )


def test_tied_embeddings():
    table = torch.nn.Embedding(101, 16)
    ids, arguments = torch.randint(101, (9,)), heads(9)
    del arguments["student_hidden"], arguments["student_weight"]
    kdfast.linear_kd_loss(table(ids).tanh(), table.weight, **arguments).backward()
    result, table.weight.grad = table.weight.grad, None
    logits = table(ids).tanh() @ table.weight.T
    teacher = arguments["teacher_hidden"] @ arguments["teacher_weight"].T
    kdfast.kd_loss(logits, teacher).backward()
    torch.testing.assert_close(result, table.weight.grad)


def test_checkpointing():
    arguments = leaves(heads(9))
    loss = kdfast.linear_kd_loss(**arguments)
    recomputed = torch.utils.checkpoint.checkpoint(
        lambda hidden: kdfast.linear_kd_loss(**{**arguments, "student_hidden": hidden}),
        arguments["student_hidden"],
        use_reentrant=False,
    )
    expected, result = (
        torch.autograd.grad(x, [arguments[name] for name in NAMES[:2]]) for x in (loss, recomputed)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_autocast_mixes_precisions(backend):
    arguments = heads(9, bias=True)
    arguments["student_hidden"] = arguments["student_hidden"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = loss_and_gradients(arguments)
    expected = oracle(arguments)
    assert_loss_close(loss, expected[0], torch.float32)
    assert found["student_hidden"].dtype == torch.bfloat16
    # Master weights have a gradient that was never rounded.
    assert found["student_weight"].dtype == torch.float32
    assert_gradient_close(found["student_weight"], expected[1]["student_weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole_with_dynamic_shapes(dtype):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(arguments, labels):
        options = {"temperature": 2.0, "alpha": 0.3, "student_softcap": 20.0}
        return 2 * kdfast.linear_kd_loss(labels=labels, **arguments, **options)

    for rows in (4, 6, 9):
        arguments, labels = heads(rows, dtype=dtype, bias=True), torch.randint(101, (rows,))
        compiled = leaves(arguments)
        loss = step(compiled, labels)
        loss.backward()
        options = {"temperature": 2.0, "alpha": 0.3, "student_softcap": 20.0}
        expected, found = loss_and_gradients(arguments, labels, torch.tensor(2.0), **options)
        torch.testing.assert_close(loss, 2 * expected)
        for name, gradient in gradients(compiled).items():
            torch.testing.assert_close(gradient, found[name])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    arguments, labels = heads(3, 4, bias=True), torch.randint(101, (3, 4))
    tensors = [
        arguments[f"{o}_{p}"] for o in ("student", "teacher") for p in ("hidden", "weight", "bias")
    ]
    per_token = (labels, torch.rand(3, 4), torch.rand(3, 4) + 1, None, None, None)
    settings = {
        "divergence": "jsd",
        "beta": 0.5,
        "temperature": 1.0,
        "teacher_temperature": 2.0,
        "scale_t2": True,
        "alpha": 0.5,
        "ignore_index": -100,
        "vocab_size": 101,
        "reduction": reduction,
        "need_parts": True,
        "student_logit_scale": 1.0,
        "teacher_logit_scale": 1.0,
        "student_softcap": None,
        "teacher_softcap": 3.0,
        "chunk_size": 5,
        "chunk_bytes": 2**20,
        "autocast": None,
        "widest_shard": 101,
        "group": None,
        "vocab_offset": 0,
    }
    for buffers in ([torch.empty_like(x) for x in tensors[:3]], [None] * 3):
        torch.library.opcheck(
            torch.ops.kdfast.linear_kd_loss_forward.default,
            (*tensors, *per_token, *buffers),
            settings,
        )


def test_module_is_the_function():
    arguments, labels = heads(4, bias=True), torch.randint(101, (4,))
    options = {"divergence": "jsd", "temperature": 2.0, "alpha": 0.3, "teacher_softcap": 9.0}
    module = kdfast.LinearKDLoss(**options)
    expected = kdfast.linear_kd_loss(labels=labels, **arguments, **options)
    for face in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(face(labels=labels, **arguments), expected)
    assert "teacher_softcap=9.0" in repr(module)


def test_module_knows_every_keyword_of_the_function():
    function = inspect.signature(kdfast.linear_kd_loss).parameters
    settings = inspect.signature(kdfast.LinearKDLoss).parameters
    call = inspect.signature(kdfast.LinearKDLoss.forward).parameters
    assert set(function) == set(settings) | set(call) - {"self"}
    for name, parameter in settings.items():
        assert parameter.default == function[name].default


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a tensor, got list"),
        ({"student_weight": torch.zeros(9, 3)}, ValueError, r"student_weight must be \[vocab, 4\]"),
        ({"student_weight": torch.zeros(4)}, ValueError, "student_weight must be"),
        ({"teacher_weight": torch.zeros(9, 5).long()}, TypeError, "teacher_weight must be one of"),
        ({"teacher_weight": torch.zeros(8, 6)}, ValueError, "pass vocab_size"),
        ({"teacher_weight": torch.zeros(9, 6, requires_grad=True)}, ValueError, "teacher_weight r"),
        ({"teacher_hidden": torch.zeros(5, 6)}, ValueError, "teacher_hidden must have .*got .5,."),
        ({"teacher_hidden": torch.zeros(4, 6, device="meta")}, ValueError, "teacher_hidden m"),
        ({"student_bias": torch.zeros(8)}, ValueError, "student_bias must have .*9.*got .8,."),
        ({"student_logit_scale": 0}, ValueError, "student_logit_scale must be"),
        ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size must be a whole number"),
        ({"vocab_size": 10}, ValueError, "vocab_size must be .* got 10"),
        ({"alpha": 0.5}, ValueError, "labels are needed"),
        ({"labels": torch.tensor([0, 1, 9, 2])}, ValueError, r"labels must be in \[0, 9\).*got 9"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of"),
        ({"temperature": torch.zeros(4)}, ValueError, "temperature must be finite and above 0"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    arguments = heads(4, vocab=9, student=4, teacher=6) | change
    with pytest.raises(error, match=message):
        kdfast.linear_kd_loss(**arguments)


def test_bad_budget(monkeypatch):
    for value in ("much", "0", "-3"):
        monkeypatch.setenv("KDFAST_CHUNK_BYTES", value)
        with pytest.raises(ValueError, match=f"KDFAST_CHUNK_BYTES must be .*{value}"):
            kdfast.linear_kd_loss(**heads(4))
