"""What a CUDA device asks of every operation: a training step that never waits for it, that a graph
holds, on any stream and any device, and beyond 2**31 elements."""

import pytest
import torch
from steps import STEPS, assert_same, needs_memory
from tolerances import relative_error

import kdfast
from kdfast.ops import registry

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CASES = [(name, backend) for name, make in STEPS.items() for backend in make().backends]
every_step = pytest.mark.parametrize(("name", "backend"), CASES)

# Long enough for the host to be far ahead.
CYCLES = 50_000_000


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture
def by(request):
    """The backend of a case, where it works here."""
    backend = request.node.callspec.params["backend"]
    if (reason := registry.missing(backend)) is not None:
        pytest.skip(reason)
    with kdfast.backend(backend):
        yield


def on(device, step):
    return {
        name: tensor.detach().to(device).requires_grad_(tensor.requires_grad)
        for name, tensor in step.inputs.items()
    }


def results_of(step, inputs):
    """Drawn from the same numbers, where there are draws."""
    torch.cuda.manual_seed_all(0)
    return [result.clone() for result in step.run(inputs)]


def without_waiting(run):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_seen():
    values = torch.ones(3, device="cuda")
    for wait in (values.sum().item, values.nonzero, values.cpu, lambda: torch.ones(3).cuda()):
        with pytest.raises(RuntimeError, match="synchronizing"):
            without_waiting(wait)


@every_step
def test_nothing_waits_for_the_device(name, backend, by):
    step = STEPS[name]()
    inputs = on("cuda", step)
    # The first call compiles.
    step.run(inputs)
    without_waiting(lambda: step.run(inputs))


def test_a_number_of_items_of_the_host_is_not_waited_for():
    step = STEPS["kd_loss, bfloat16"]()
    inputs, items = on("cuda", step), torch.tensor(17)
    step.loss(**inputs, num_items=items)
    found = without_waiting(lambda: step.loss(**inputs, num_items=items))
    assert_same([found], [step.loss(**inputs, num_items=17)])


@every_step
def test_a_graph_holds_it(name, backend, by):
    step, other = STEPS[name](), STEPS[name]()
    inputs = on("cuda", step)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.run(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run(inputs)
    with torch.no_grad():
        for mine, new in zip(inputs.values(), other.inputs.values(), strict=True):
            mine.copy_(new)
    for _ in range(2):
        torch.cuda.manual_seed_all(0)
        graph.replay()
        replayed = [result.clone() for result in captured]
        assert_same(replayed, results_of(step, inputs))


@every_step
def test_two_streams(name, backend, by):
    """Steps that overlap, and memory that the caller's stream reuses while theirs is behind."""
    step, other = STEPS[name](), STEPS[name]()
    given = [on("cuda", step), on("cuda", other)]
    expected = [results_of(step, inputs) for inputs in given]
    streams, results, seen = [torch.cuda.Stream() for _ in given], [], []
    torch.cuda.synchronize()
    for stream, inputs in zip(streams, given, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            results.append(results_of(step, inputs))
        # Whatever a step has freed may not be what this gets.
        seen.append([torch.full((2**20,), torch.nan, device="cuda") for _ in range(8)])
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert_same(found, right)
    assert all(values.isnan().all() for part in seen for values in part)


@every_step
def test_a_backward_pass_from_another_stream(name, backend, by):
    step = STEPS[name]()
    inputs = on("cuda", step)
    expected = results_of(step, inputs)
    trained = [tensor for tensor in inputs.values() if tensor.requires_grad]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.manual_seed_all(0)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        loss = step.loss(**inputs)
        weighted = 3 * (loss if loss.dim() == 0 else loss * loss.detach()).sum()
    gradients = torch.autograd.grad(weighted, trained)
    del weighted
    poison = [torch.full_like(gradient, torch.nan) for gradient in gradients]
    stream.synchronize()
    assert_same([loss.detach(), *gradients], expected)
    assert all(values.isnan().all() for values in poison)


@every_step
def test_another_device_than_the_current_one(name, backend, by):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    if (reason := registry._cannot_serve(backend, torch.empty(1, device="cuda:1"))) is not None:
        pytest.skip(reason)
    step = STEPS[name]()
    with torch.cuda.device(0):
        results = results_of(step, on("cuda:1", step))
    assert {result.device for result in results} == {torch.device("cuda:1")}
    with torch.cuda.device(1):
        assert_same(results, results_of(step, on("cuda:1", step)))


# Beyond 2**31 elements: what no other test of a device has.


def test_weights_past_two_to_the_31_elements():
    vocab, width, rows, last = 2**31 // 8192 + 64, 8192, 3, 64
    # Two weights, a gradient in float32 and as it is handed over, logits and what a product takes.
    needs_memory(28)
    student, teacher = (
        torch.zeros(vocab, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    with torch.no_grad():
        for weight in (student, teacher):
            weight[-last:] = width**-0.5 * torch.randn(last, width, device="cuda")
    hidden = torch.randn(rows, width, device="cuda").bfloat16()
    student.requires_grad_()
    labels = torch.full((rows,), vocab - 1, device="cuda")
    options = {"alpha": 0.5, "reduction": "sum"}
    loss = kdfast.linear_kd_loss(hidden, student, hidden, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(loss, student)

    # The rows of zeros have logits of 0, all of them.
    own = student.detach()[-last:].double().requires_grad_()
    others = torch.zeros(rows, vocab - last, dtype=torch.float64, device="cuda")
    logits = [
        torch.cat([others, hidden.double() @ weight.mT], 1)
        for weight in (own, teacher[-last:].double())
    ]
    expected = kdfast.kd_loss(*logits, labels, **options)
    (right,) = torch.autograd.grad(expected, own)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(gradient[-last:], right) < 2.0**-8
    # All rows of zeros have one gradient.
    assert relative_error(gradient[-last - 1], gradient[0]) <= 2.0**-8


def test_projected_states_past_two_to_the_31_elements():
    rows, width, last = 2**31 // 4096 + 9, 4096, 3
    # States and their gradient: the student's, half as wide, in float32 too.
    needs_memory(24)
    student = torch.zeros(rows, width // 2, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    student[-last:] = torch.randn(last, width // 2, device="cuda")
    teacher[-last:] = torch.randn(last, width, device="cuda")
    weight = width**-0.5 * torch.randn(width, width // 2, device="cuda")
    weight = weight.bfloat16().requires_grad_()
    student.requires_grad_()
    loss = kdfast.hidden_mse(student, teacher, weight=weight, reduction="sum")
    found = torch.autograd.grad(loss, (student, weight))
    ends = [student.detach()[-last:].double(), weight.detach().double()]
    ends = [tensor.requires_grad_() for tensor in ends]
    expected = kdfast.hidden_mse(ends[0], teacher[-last:], weight=ends[1], reduction="sum")
    right = torch.autograd.grad(expected, ends)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(found[0][-last:], right[0]) < 2.0**-7
    assert relative_error(found[1], right[1]) < 2.0**-7
    assert found[0][:-last].count_nonzero() == 0


def test_hidden_states_past_two_to_the_31_elements_meet_a_small_support():
    rows, width, vocab, last = 2**31 // 4096 + 9, 4096, 1000, 3
    # Hidden states, their gradient in float32 and as it is handed over.
    needs_memory(24)
    hidden = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    hidden[-last:] = torch.randn(last, width, device="cuda")
    weight = (width**-0.5 * torch.randn(vocab, width, device="cuda")).bfloat16()
    indices = torch.randint(vocab // 4, (rows, 4), device="cuda")
    indices += torch.arange(4, device="cuda") * (vocab // 4)
    teacher = kdfast.TruncatedSoftmax(
        torch.randn(rows, 4, device="cuda").log_softmax(-1) - 0.1, indices
    )
    hidden.requires_grad_()
    options = {"tail": "support", "reduction": "none"}
    losses = kdfast.linear_topk_kd_loss(hidden, weight, teacher, **options)
    (gradient,) = torch.autograd.grad(losses[-last:].sum(), hidden)
    ends = hidden.detach()[-last:].double().requires_grad_()
    top = kdfast.TruncatedSoftmax(*(part[-last:] for part in teacher))
    expected = kdfast.linear_topk_kd_loss(ends, weight.double(), top, **options)
    (right,) = torch.autograd.grad(expected.sum(), ends)
    assert relative_error(losses[-last:], expected) < 1e-5
    assert relative_error(gradient[-last:], right) < 2.0**-8
    assert gradient[:-last].count_nonzero() == 0
