"""What autograd asks of every operation."""

import pytest
import torch
from steps import STEPS
from torch.utils.checkpoint import checkpoint

import kdfast

# They run a teacher in the step, whose logits are no input.
LIVE_TEACHERS = ("truncated_softmax", "sampled_softmax")


@pytest.mark.parametrize("name", [name for name in STEPS if name not in LIVE_TEACHERS])
def test_what_inference_mode_made_is_taken(name):
    """Teachers run in it, whatever waits for the backward pass."""
    step = STEPS[name]()
    expected = step.run(step.inputs)
    with torch.inference_mode():
        made = {n: x.clone() for n, x in step.inputs.items() if not x.requires_grad}
    found = step.run({**step.inputs, **made})
    for result, other in zip(found, expected, strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in STEPS if name != "kd_loss, overwritten"])
def test_activation_checkpointing(name, reentrant):
    step = STEPS[name]()
    if name == "sampled_softmax":
        pytest.skip("it draws anew when it is run again")
    expected = step.run(step.inputs)
    names = [*step.inputs]

    def loss(*tensors):
        return step.loss(**dict(zip(names, tensors, strict=True)))

    trained = [x for x in step.inputs.values() if x.requires_grad]
    for tensor in trained:
        tensor.grad = None
    total = checkpoint(loss, *step.inputs.values(), use_reentrant=reentrant)
    (3 * (total if total.dim() == 0 else total * total.detach()).sum()).backward()
    for result, other in zip([total, *(x.grad for x in trained)], expected, strict=True):
        assert torch.equal(result, other)


def test_retained_graphs_give_the_same_gradient_again_without_a_second_copy_of_it():
    logits, teacher = torch.randn(24, 101).bfloat16().requires_grad_(), torch.randn(24, 101)
    loss = kdfast.kd_loss(logits, teacher, reduction="none")
    weights = torch.rand(24)
    first, second, last = (
        torch.autograd.grad(loss, logits, weights, retain_graph=retain)[0]
        for retain in (True, True, False)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    assert first.data_ptr() != second.data_ptr()


def test_tensors_that_are_passed_twice_compile():
    logits, teacher = torch.randn(6, 101), torch.randn(6, 101)
    temperature = torch.rand(6) + 1
    query, mask = torch.randn(2, 3, 7, 4), torch.rand(2, 7) < 0.7

    def dense(logits, teacher, temperature):
        return kdfast.kd_loss(logits, teacher, temperature=temperature, token_weight=temperature)

    def scores(query, other, mask):
        return kdfast.attention_mse(query, query, other, other, key_mask=mask, query_mask=mask)

    def states(student):
        return kdfast.hidden_mse(student, student.detach() + 1)

    for function, trained, *others in (
        (dense, logits, teacher, temperature),
        (scores, query, torch.randn(2, 3, 7, 4), mask),
        (states, logits),
    ):
        trained.requires_grad_()
        results = []
        for run in (function, torch.compile(function, fullgraph=True)):
            loss = run(trained, *others)
            results.append((loss.detach(), *torch.autograd.grad(loss, trained)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


def test_a_refused_call_leaves_the_logits_to_their_owner():
    leaf = torch.randn(3, 9, requires_grad=True)
    logits = leaf.exp()
    with pytest.raises(ValueError, match="labels must be in"):
        kdfast.kd_loss(
            logits, torch.randn(3, 9), torch.tensor([99, 1, 2]), overwrite_student_logits=True
        )
    logits.sum().backward()
    assert torch.equal(leaf.grad, leaf.detach().exp())
