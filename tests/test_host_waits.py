"""That no operation makes the host wait for a GPU, as far as Python can show it without one.

A value that is read is what a device is waited for, and what no CUDA graph can hold.
tests/test_gpu_steps.py has the same steps on a device, and what happens below Python.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not launched on a device", allow_module_level=True)

from pretended import CURRENT_DEVICE, DEVICE, HostWaits, device, on_device
from steps import STEPS
from training import LENGTH, VOCAB, bert, trainer_of

import kdfast
from kdfast.trainer import recipes


def pretended(inputs):
    return {name: on_device(tensor) for name, tensor in inputs.items()}


BACKENDS = [(name, b) for name, make in STEPS.items() for b in (*make().backends, "torch")]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_nothing_waits_for_the_device(name, backend):
    step = STEPS[name]()
    with device() as launches, kdfast.backend(backend):
        loss, *gradients = step.run(pretended(step.inputs))
    assert loss.device == DEVICE
    assert len(gradients) == sum(tensor.requires_grad for tensor in step.inputs.values())
    # Whatever device is current, kernels run on that of the tensors.
    assert all(index == DEVICE.index for _, index in launches)
    if backend == "cuda":
        assert "kd_loss_rows_cuda" in {kernel for kernel, _ in launches}
    elif backend == "torch":
        assert {kernel for kernel, _ in launches} <= {"scale_gradient_kernel"}


def test_a_number_of_items_of_the_host_is_not_waited_for():
    step = STEPS["kd_loss, bfloat16"]()
    with device():
        step.loss(**pretended(step.inputs), num_items=torch.tensor(17))


# What would be seen.

WAITS = {
    "a value": lambda tensor: tensor.sum().item(),
    "values": lambda tensor: tensor.tolist(),
    "a condition": lambda tensor: bool((tensor > 0).any()),
    "a comparison": lambda tensor: torch.equal(tensor, tensor),
    "what there is": lambda tensor: tensor[tensor > 0],
    "where it is": lambda tensor: tensor.nonzero(),
    "a selection": lambda tensor: tensor.masked_select(tensor > 0),
    "different ones": lambda tensor: tensor.unique(),
    "repetitions": lambda tensor: tensor.repeat_interleave(tensor.long()),
    "assigned to a selection": lambda tensor: tensor.__setitem__(tensor > 0, tensor),
    "to the host": lambda tensor: tensor.cpu(),
    "to the host by name": lambda tensor: tensor.to("cpu"),
    "from a list": lambda tensor: torch.tensor([1.0], device=tensor.device),
    "from the host": lambda tensor: torch.ones(3).to(tensor.device),
    "copied from the host": lambda tensor: tensor.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_seen(what):
    with device(), pytest.raises(HostWaits):
        WAITS[what](on_device(torch.ones(3)))


@pytest.mark.parametrize("name", ["kd_loss, bfloat16", "topk_kd_loss, bucket"])
def test_checks_of_values_wait_and_are_left_out(name, monkeypatch):
    monkeypatch.setenv("KDFAST_DEBUG", "1")
    step = STEPS[name]()
    with device(), pytest.raises(HostWaits):
        step.run(pretended(step.inputs))


def test_a_wait_in_a_backward_pass_is_seen():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.sum()

        @staticmethod
        def backward(ctx, incoming):
            return torch.full((3,), incoming.item())

    with device(), pytest.raises(HostWaits):
        Waits.apply(on_device(torch.ones(3, requires_grad=True))).backward()


def test_a_launch_on_another_device_is_seen():
    from kdfast.kernels.gradient import scale_gradient_kernel

    with device() as launches:
        scale_gradient_kernel[(1,)](on_device(torch.ones(3)))
    assert launches == [("scale_gradient_kernel", CURRENT_DEVICE)]


# Training.


def moved(model):
    """Parameters and buffers on the device; what the model remembers of itself stays."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = on_device(tensor)


KERNELS = {
    "hinton": {"kd_loss_rows_cuda"},
    "tinybert_general": {"query_kernel", "key_kernel", "hidden_mse_kernel"},
}


@pytest.mark.parametrize("recipe", KERNELS)
def test_a_training_step_waits_for_nothing(recipe, tmp_path):
    """A batch without padding: transformers itself looks whether a mask hides anything."""
    objective = getattr(recipes, recipe)().objective
    teacher, student = bert(16, 4), bert(8, 2)
    trainer = trainer_of(tmp_path, student, teacher.eval(), objective)
    batch = {"input_ids": torch.randint(VOCAB, (2, LENGTH))}
    if recipe == "hinton":
        batch["labels"] = torch.randint(VOCAB, (2, LENGTH))
    trainer.model.train()
    # The first batch finds the output heads, for which it looks at logits.
    trainer.compute_loss(trainer.model, dict(batch))
    moved(trainer.model)
    moved(teacher)
    trainer._step._device = DEVICE
    with device() as launches:
        loss = trainer.compute_loss(
            trainer.model, pretended(batch), num_items_in_batch=on_device(torch.tensor(20))
        )
        loss.backward()
    assert loss.device == DEVICE
    assert {kernel for kernel, _ in launches} >= KERNELS[recipe]
