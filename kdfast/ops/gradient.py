"""The incoming gradient, applied to a gradient that the forward pass already computed."""

import torch
from torch import Tensor

from kdfast.ops import registry

registry.library.define("scale_gradient_(Tensor(a!) gradient, Tensor incoming) -> ()")


def _scale_on_cpu(gradient: Tensor, incoming: Tensor) -> None:
    if incoming.dim() == 0:
        if incoming.item() != 1.0:
            gradient.mul_(incoming)
        return
    # Row by row in the gradient's own storage: a mixed-precision product of the whole would build a
    # float32 copy.
    for row, scale in zip(gradient.flatten(0, -2), incoming.flatten(), strict=True):
        row.mul_(scale)


def _scale_by_triton(gradient: Tensor, incoming: Tensor) -> None:
    from kdfast.kernels.gradient import scale_gradient_

    scale_gradient_(gradient, incoming)


@torch.library.impl(registry.library, "scale_gradient_", "CompositeExplicitAutograd")
def _scale_gradient(gradient: Tensor, incoming: Tensor) -> None:
    if gradient.device.type == "cpu":
        _scale_on_cpu(gradient, incoming)
    elif (
        gradient.device.type == "cuda"
        and gradient.dtype != torch.float64
        and registry.missing("triton") is None
    ):
        _scale_by_triton(gradient, incoming)
    else:
        gradient.mul_(incoming if incoming.dim() == 0 else incoming.unsqueeze(-1))


@torch.library.register_fake("kdfast::scale_gradient_", lib=registry.library)
def _(gradient: Tensor, incoming: Tensor) -> None:
    return None


def refuse_double_backward(operation: str) -> None:
    """To call in a backward pass, where grad mode is on if a graph of the gradient is wanted."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operation} has no second derivative: its gradient is computed in the forward pass. "
            f"Call backward without create_graph=True"
        )


def graph_is_retained() -> bool:
    """Whether the running backward pass may be repeated, so that what it saved must survive it."""
    # A traced backward must be functional, and so must one that runs again.
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def scale_gradient(gradient: Tensor, incoming: Tensor) -> Tensor:
    """incoming · gradient, written over the gradient unless the graph is retained.

    Args:
        gradient: `[..., V]`, saved in the forward pass.
        incoming: a 0-d tensor, or one value per row `[...]`. Nothing is read from a GPU, and 1
            costs no sweep.
    """
    if graph_is_retained():
        return (gradient * (incoming if incoming.dim() == 0 else incoming.unsqueeze(-1))).to(
            gradient.dtype
        )
    torch.ops.kdfast.scale_gradient_(gradient, incoming)
    return gradient
