"""The gradient that a forward pass computes, and the incoming one that is applied to it."""

import torch
from torch import Tensor

from kdfast.ops import registry
from kdfast.ops.head import wide_dtype
from kdfast.ops.memory import fresh
from kdfast.ops.rows import as_rows

# What a product of half precision and float32 may have in float32, beside what it is written to.
SCALED_ENTRIES = 1 << 18

registry.library.define("scale_gradient_(Tensor(a!) gradient, Tensor incoming) -> ()")


def _scale_on_cpu(gradient: Tensor, incoming: Tensor) -> None:
    if incoming.dim() == 0:
        if incoming.item() != 1.0:
            gradient.mul_(incoming)
        return
    # Some rows at a time in the gradient's own storage: a mixed-precision product of the whole
    # would build a float32 copy.
    rows = as_rows(gradient)
    step = max(1, SCALED_ENTRIES // max(1, rows.shape[2]))
    for part, scales in zip(rows, incoming.reshape(rows.shape[:2]), strict=True):
        for some, factors in zip(part.split(step), scales.split(step), strict=True):
            some.mul_(factors.unsqueeze(1))


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
    if torch.compiler.is_compiling():
        factor = incoming if incoming.dim() == 0 else incoming.unsqueeze(-1)
        return (gradient * factor).to(gradient.dtype)
    if graph_is_retained():
        gradient = gradient.clone()
    torch.ops.kdfast.scale_gradient_(gradient, incoming)
    return gradient


def save_for_backward(ctx, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, which takes no inference tensors: those stay with the context.

    A teacher that ran under `torch.inference_mode` makes such tensors.
    """
    compiling = torch.compiler.is_compiling()
    ctx.inference = {
        place: tensor
        for place, tensor in enumerate(tensors)
        if not compiling and tensor is not None and tensor.is_inference()
    }
    ctx.save_for_backward(
        *(None if place in ctx.inference else tensor for place, tensor in enumerate(tensors))
    )


def saved(ctx) -> tuple[Tensor | None, ...]:
    """What `save_for_backward` was given. Checkpointing lets it be asked for once."""
    tensors = enumerate(ctx.saved_tensors)
    return tuple(ctx.inference.get(place, tensor) for place, tensor in tensors)


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors, none of them twice: torch.compile passes none twice to a function."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if again else tensor)
    return found


class LossWithGradient(torch.autograd.Function):
    """An operation whose operator `kdfast::OPERATION_forward` gives a loss and fills its gradient.

    Called with the operation's name, the student's logits `[..., V]`, the operator's other tensors
    up to `incoming`, whether a gradient is wanted, whether it overwrites the logits, and the
    operator's settings by name. The operator takes `incoming` and `gradient` behind the tensors.
    """

    @staticmethod
    def forward(ctx, operation, student_logits, *inputs_and_settings):
        *inputs, need_grad, overwrite, settings = inputs_and_settings
        ctx.operation, ctx.overwrite, ctx.settings = operation, overwrite, settings
        # A float16 gradient waits for the backward pass: a loss scale of 65536 must reach it before
        # it is rounded.
        ctx.deferred = student_logits.dtype == torch.float16
        gradient = None
        if need_grad and not ctx.deferred:
            gradient = _gradient_buffer(student_logits, overwrite)
        operator = getattr(torch.ops.kdfast, f"{operation}_forward")
        outputs = operator(student_logits, *inputs, None, gradient, **settings)
        if gradient is not None and overwrite:
            _tell_owners(student_logits)
        save_for_backward(ctx, *((student_logits, *inputs) if ctx.deferred else (gradient,)))
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.inputs = len(inputs)
        return outputs

    @staticmethod
    def backward(ctx, incoming, *_):
        refuse_double_backward(ctx.operation)
        if ctx.deferred:
            student_logits, *inputs = saved(ctx)
            overwrite = ctx.overwrite and not graph_is_retained()
            gradient = _gradient_buffer(student_logits, overwrite)
            operator = getattr(torch.ops.kdfast, f"{ctx.operation}_forward")
            operator(student_logits, *inputs, incoming, gradient, **ctx.settings)
            if overwrite:
                _tell_owners(student_logits)
        else:
            (gradient,) = saved(ctx)
            gradient = scale_gradient(gradient, incoming)
        # For the operation's name before it, and the three settings behind the inputs.
        return None, gradient, *[None] * (ctx.inputs + 3)


def _gradient_buffer(student_logits: Tensor, overwrite: bool) -> Tensor:
    if not overwrite:
        return torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    return student_logits.detach()


def _tell_owners(student_logits: Tensor) -> None:
    """Whoever saved the logits for a backward pass of its own must be told that they are gone."""
    torch.autograd.graph.increment_version(student_logits)


class LinearLossWithGradients(torch.autograd.Function):
    """The same of an output head: `kdfast::OPERATION_forward` fills the gradients that are needed.

    Called with the operation's name, the student's hidden states `[..., H]`, its head's weight
    `[V, H]` and bias, the operator's other tensors up to `incoming`, which of the three gradients
    are needed, and the operator's settings by name. A setting `weight_rows`, columns of the logits
    in ascending order, says which rows of the weight have a gradient, which then is sparse.
    """

    @staticmethod
    def forward(ctx, operation, student_hidden, student_weight, student_bias, *inputs_and_settings):
        *inputs, needed, settings = inputs_and_settings
        student = (student_hidden, student_weight, student_bias)
        ctx.operation, ctx.needed, ctx.settings = operation, needed, settings
        # Without a reduction every token has an incoming gradient of its own, which a sum over
        # tokens must wait for.
        ctx.deferred = settings["reduction"] == "none" and any(needed[1:])
        gradients = [None] * 3
        if not ctx.deferred:
            gradients = _gradient_buffers(student, needed, settings.get("weight_rows"))
        operator = getattr(torch.ops.kdfast, f"{operation}_forward")
        outputs = operator(*student, *inputs, None, *gradients, **settings)
        ctx.student = [None if x is None else (x.shape, x.dtype) for x in student]
        save_for_backward(ctx, *((*student, *inputs) if ctx.deferred else gradients))
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.inputs = len(inputs)
        return outputs

    @staticmethod
    def backward(ctx, incoming, *_):
        refuse_double_backward(ctx.operation)
        weight_rows = ctx.settings.get("weight_rows")
        if ctx.deferred:
            tensors = saved(ctx)
            student, inputs = tensors[:3], tensors[3:]
            gradients = _gradient_buffers(student, ctx.needed, weight_rows)
            operator = getattr(torch.ops.kdfast, f"{ctx.operation}_forward")
            operator(*student, *inputs, incoming, *gradients, **ctx.settings)
        else:
            gradients = [
                None if gradient is None else scale_gradient(gradient, incoming)
                for gradient in saved(ctx)
            ]
        # Half precision is rounded to once, with the incoming scale inside.
        gradients = [
            None if gradient is None else gradient.to(of[1])
            for gradient, of in zip(gradients, ctx.student, strict=True)
        ]
        if weight_rows is not None and gradients[1] is not None:
            gradients[1] = torch.sparse_coo_tensor(
                weight_rows[None],
                gradients[1],
                ctx.student[1][0],
                is_coalesced=True,
                check_invariants=False,
            )
        # For the operation's name before them, and the two settings behind the inputs.
        return None, *gradients, *[None] * (ctx.inputs + 2)


def _gradient_buffers(
    student: tuple[Tensor | None, ...], needed: tuple[bool, ...], weight_rows: Tensor | None
) -> list[Tensor | None]:
    wide = wide_dtype(student[0].dtype, student[1].dtype)
    shapes = [None if tensor is None else tensor.shape for tensor in student]
    if weight_rows is not None:
        shapes[1] = (len(weight_rows), shapes[1][1])
    return [
        fresh(*shape, dtype=wide, device=student[0].device) if need else None
        for shape, need in zip(shapes, needed, strict=True)
    ]
