"""How far a result may be from the float64 reference on the same inputs, ‖error‖ / ‖reference‖."""

import torch
from torch import Tensor

# Losses are accumulated in float32 chunks and float64 rows whatever the logits' precision.
LOSS = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}

# A half-precision gradient may cost what rounding the exact one costs, and 5 % for the entries that
# float32 arithmetic moves across a rounding boundary.
ROUNDINGS = 1.05
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-6}


def relative_error(result: Tensor, reference: Tensor) -> float:
    error = (result.double() - reference.double()).norm()
    return (error / reference.double().norm().clamp_min(1e-300)).item()


def assert_loss_close(loss: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        loss.double(), reference.double(), rtol=LOSS[dtype], atol=1e-300, equal_nan=True
    )


def assert_gradient_close(gradient: Tensor, reference: Tensor) -> None:
    assert torch.isfinite(gradient).all()
    dtype = gradient.dtype
    allowed = GRADIENT.get(dtype)
    if allowed is None:
        allowed = ROUNDINGS * relative_error(reference.to(dtype), reference) + 1e-6
    assert relative_error(gradient, reference) <= allowed
