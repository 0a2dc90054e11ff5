"""Distillation between hidden states: `hidden_mse` and `hidden_cosine`.

Read from the bottom: the public functions check their arguments, the autograd function keeps the
gradients that the forward pass computed, the operators take care of the projection and of the
reduction, and a backend sweeps the rows.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdfast.ops import registry
from kdfast.ops.arguments import (
    check_choice,
    check_detached,
    check_floating,
    check_same_device,
    check_shape,
)
from kdfast.ops.gradient import (
    distinct,
    refuse_double_backward,
    save_for_backward,
    saved,
    scale_gradient,
)
from kdfast.ops.head import (
    HALF,
    Head,
    HeadGradients,
    chunk_budget,
    chunks_of,
    product_dtype,
    rows_of,
    rows_within,
    sweep,
    wide_dtype,
)
from kdfast.ops.memory import fresh
from kdfast.ops.rows import Addresses, as_rows, cpp_kernel
from kdfast.ops.tokens import REDUCTIONS, gradient_scale, reduce, token_share
from kdfast.reference import COSINE_EPS

# What a chunk takes on a CPU, if KDFAST_CHUNK_BYTES does not make it less: in plain PyTorch it
# stays in the cache of a core, and of projected states it fills the matrix products.
CACHED_BYTES = 2 << 20
PROJECTED_BYTES = 16 << 20

# A mask stands where the losses over a vocabulary have labels, and this is what it ignores.
MASKED = False


def _chunk_bytes(device: torch.device, on_cpu: int) -> int:
    budget = chunk_budget(device)
    return min(budget, on_cpu) if device.type == "cpu" else budget


def _cpp_rows(
    name: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    tensors: Addresses,
    **last: float,
) -> Tensor:
    real = wide_dtype(student.dtype)
    losses = student.new_empty(student.shape[:2].numel(), dtype=real)
    if (teacher.dtype == torch.float64) != (real == torch.float64):
        teacher = teacher.to(real)
    cpp_kernel(name, real)(
        student=tensors.matrix(student),
        teacher=tensors.matrix(teacher),
        gradient=tensors.matrix(gradient),
        outer_rows=student.shape[0],
        inner_rows=student.shape[1],
        width=student.shape[2],
        mask=tensors.per_row(mask, torch.bool),
        grad_scale=tensors.per_row(grad_scale, real),
        losses=losses.data_ptr(),
        **last,
    )
    return losses


def _cpp_mse_rows(
    student: Tensor, teacher: Tensor, bias: Tensor | None, *per_row_and_gradient: Tensor | None
) -> Tensor:
    # The kernel sees addresses, which `tensors` keeps alive until it has returned.
    tensors = Addresses()
    address = 0 if bias is None else tensors.contiguous(bias, wide_dtype(student.dtype))
    rows = (student, teacher, *per_row_and_gradient)
    return _cpp_rows("hidden_mse_rows", *rows, tensors, bias=address)


def _cpp_cosine_rows(*rows: Tensor | None) -> Tensor:
    return _cpp_rows("hidden_cosine_rows", *rows, Addresses(), epsilon=COSINE_EPS)


def _triton_mse_rows(*rows: Tensor | None) -> Tensor:
    from kdfast.kernels.hidden import hidden_mse_rows

    return hidden_mse_rows(*rows)


def _triton_cosine_rows(*rows: Tensor | None) -> Tensor:
    from kdfast.kernels.hidden import hidden_cosine_rows

    return hidden_cosine_rows(*rows, epsilon=COSINE_EPS)


def _cached_chunks(
    student: Tensor, teacher: Tensor, mask: Tensor | None, tensors: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of both at a time, in wide precision, with zeros in those that do not count."""
    wide = wide_dtype(student.dtype)
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    budget = _chunk_bytes(student.device, CACHED_BYTES)
    size = rows_within(budget, student.shape[1], wide, tensors)
    for begin in range(0, len(student), size):
        chunk = slice(begin, begin + size)
        pair = student[chunk].to(wide), teacher[chunk].to(wide)
        if mask is not None:
            pair = (rows.masked_fill(~mask[chunk, None], 0) for rows in pair)
        yield chunk, *pair


def _of(scale: Tensor | None, chunk: slice, dtype: torch.dtype) -> float | Tensor:
    """A chunk's part of a scale that is 0-d or `[rows]`, to multiply `[rows, width]` with."""
    if scale is None:
        return 1.0
    return (scale if scale.dim() == 0 else scale[chunk, None]).to(dtype)


def _torch_mse_rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    losses = student.new_empty(student.shape[:2].numel(), dtype=wide_dtype(student.dtype))
    width = max(1, student.shape[2])
    for chunk, s, t in _cached_chunks(student, teacher, mask, tensors=2):
        difference = s - t
        if bias is not None:
            difference += bias
        if mask is not None:
            difference.masked_fill_(~mask[chunk, None], 0)
        losses[chunk] = difference.square().sum(1) / width
        if gradient is not None:
            # ∂ mean (s − t)² / ∂s = 2 (s − t) / D.
            factor = _of(grad_scale, chunk, losses.dtype) * (2 / width)
            gradient.flatten(0, 1)[chunk] = difference.mul_(factor)
    return losses


def _torch_cosine_rows(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """1 − cos of every token, and its gradient.

    With a = s / max(‖s‖, ε) and b likewise, 1 − a·b = ½‖a − b‖² + ½(1 − ‖a‖²) + ½(1 − ‖b‖²). The
    last two are 0 unless a norm is below ε, and the first is small where student and teacher
    agree: no digit of it is lost, and it is never negative.
    """
    losses = student.new_empty(student.shape[:2].numel(), dtype=wide_dtype(student.dtype))
    for chunk, *pair in _cached_chunks(student, teacher, mask, tensors=3):
        directions, norms, missing = [], [], []
        for rows in pair:
            # Not vector_norm, which adds up long rows less exactly.
            norm = rows.square().sum(1, keepdim=True).sqrt_()
            norms.append(norm.clamp_min(COSINE_EPS))
            directions.append(rows / norms[-1])
            # 1 − ‖a‖² would be rounding where a is of length 1.
            shortfall = 1 - (norm / norms[-1]).square()
            missing.append(torch.where(norm < COSINE_EPS, shortfall, 0.0))
        difference = torch.sub(*directions)
        loss = (difference.square().sum(1, keepdim=True) + missing[0] + missing[1]) / 2
        losses[chunk] = loss.squeeze(1)
        if gradient is not None:
            # ∂L/∂s = (cos · a − b) / ‖s‖ = (a − b − L · a) / ‖s‖; a norm below ε is a constant.
            shrink = torch.where(missing[0] > 0, 1.0, loss)
            by_student = difference.sub_(directions[0].mul_(shrink))
            factor = _of(grad_scale, chunk, losses.dtype) / norms[0]
            gradient.flatten(0, 1)[chunk] = by_student.mul_(factor)
    # Two rows of zeros, as those that do not count are, have a loss of 1.
    return losses if mask is None else losses.masked_fill_(~mask, 0)


# Of `[outer, inner, D]` with unit stride along D, the loss of every row, `[rows]`, and its gradient
# times grad_scale: (student, teacher, bias, mask, grad_scale, gradient), without bias for a cosine.
MSE_BACKENDS = {"cpp": _cpp_mse_rows, "triton": _triton_mse_rows, "torch": _torch_mse_rows}
COSINE_BACKENDS = {
    "cpp": _cpp_cosine_rows,
    "triton": _triton_cosine_rows,
    "torch": _torch_cosine_rows,
}


# The loss is written into a buffer, like the gradients: the backward pass that wants no loss passes
# none. (torch.compile also trips over an operator that writes to arguments and returns one tensor,
# where nobody takes the tensor: torch 2.13.)
registry.library.define(
    "hidden_mse_forward(Tensor student, Tensor? weight, Tensor? bias, Tensor teacher, Tensor? mask,"
    " Tensor? incoming, Tensor(a!)? loss, Tensor(b!)? student_gradient, "
    "Tensor(c!)? weight_gradient, Tensor(d!)? bias_gradient, *, str reduction, SymInt chunk_bytes, "
    "ScalarType? autocast) -> ()"
)
registry.library.define(
    "hidden_cosine_forward(Tensor student, Tensor teacher, Tensor? mask, Tensor? incoming, "
    "Tensor(a!)? loss, Tensor(b!)? student_gradient, *, str reduction) -> ()"
)


@torch.library.impl(registry.library, "hidden_mse_forward", "CompositeExplicitAutograd")
def _hidden_mse_forward(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: Tensor,
    mask: Tensor | None,
    incoming: Tensor | None,
    loss: Tensor | None,
    student_gradient: Tensor | None,
    weight_gradient: Tensor | None,
    bias_gradient: Tensor | None,
    *,
    reduction: str,
    chunk_bytes: int,
    autocast: torch.dtype | None,
) -> None:
    tokens = student.shape[:-1]
    mask = None if mask is None else mask.flatten()
    share = token_share(reduction, None, mask, MASKED, tokens, student.device)
    scale = gradient_scale(share, incoming)
    if weight is None:
        mse_rows = registry.select("hidden_mse", MSE_BACKENDS, student)
        losses = _of_pairs(
            mse_rows, student, teacher, None, mask=mask, scale=scale, gradient=student_gradient
        )
    else:
        dtype = product_dtype(student, weight, autocast)
        # A projection is an output head whose logits are hidden states.
        projection = Head(_rows(student), weight, None, 1.0, None, dtype)
        gradients = HeadGradients(student_gradient, weight_gradient, bias_gradient, len(weight))
        with torch.autocast(student.device.type, enabled=False):
            losses = _of_projected(
                projection, bias, _rows(teacher), mask, scale, gradients, chunk_bytes
            )
    if loss is not None:
        loss.copy_(reduce(losses[None], share, tokens, need_parts=False)[0])


@torch.library.register_fake("kdfast::hidden_mse_forward", lib=registry.library)
def _(*args: object, **settings: object) -> None:
    return None


@torch.library.impl(registry.library, "hidden_cosine_forward", "CompositeExplicitAutograd")
def _hidden_cosine_forward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    incoming: Tensor | None,
    loss: Tensor | None,
    student_gradient: Tensor | None,
    *,
    reduction: str,
) -> None:
    tokens = student.shape[:-1]
    mask = None if mask is None else mask.flatten()
    share = token_share(reduction, None, mask, MASKED, tokens, student.device)
    losses = _of_pairs(
        registry.select("hidden_cosine", COSINE_BACKENDS, student),
        student,
        teacher,
        mask=mask,
        scale=gradient_scale(share, incoming),
        gradient=student_gradient,
    )
    if loss is not None:
        loss.copy_(reduce(losses[None], share, tokens, need_parts=False)[0])


@torch.library.register_fake("kdfast::hidden_cosine_forward", lib=registry.library)
def _(*args: object, **settings: object) -> None:
    return None


def _rows(states: Tensor) -> Tensor:
    return states.reshape(states.shape[:-1].numel(), states.shape[-1])


def _of_pairs(
    row_losses: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *bias: None,
    mask: Tensor | None,
    scale: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """A backend's losses of states that are compared as they are."""
    gradient = None if gradient is None else as_rows(gradient)
    return row_losses(as_rows(student), as_rows(teacher), *bias, mask, scale, gradient)


def _masked(mask: Tensor | None) -> Tensor | None:
    """The mask, where chunks hold tokens that do not count: `chunks_of` has none on the CPU."""
    return None if mask is None or mask.device.type == "cpu" else mask


def _of_projected(
    projection: Head,
    bias: Tensor | None,
    teacher: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    gradients: HeadGradients,
    chunk_bytes: int,
) -> Tensor:
    """The losses of a projected student, and the gradients of it and of what projects it."""
    width = teacher.shape[1]
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    counted = _masked(mask)
    headroom = None
    if projection.dtype == torch.float16 and scale is not None and scale.numel() > 0:
        # The products take the difference in float16: near its own size, whatever the number of
        # tokens, so that neither small ones are lost nor large ones overflow.
        largest = scale.abs().amax().float() * (2 / max(1, width))
        headroom = torch.exp2(-largest.clamp_min(torch.finfo(torch.float32).tiny).log2().ceil())
        scale = scale * headroom

    like = projection.weight if projection.dtype == torch.float64 else projection.hidden
    mse_rows = registry.select("hidden_mse", MSE_BACKENDS, like)

    def chunk_losses(chunk: slice | Tensor, projected: Tensor, gradient: Tensor | None) -> Tensor:
        per_row = rows_of((counted, scale), chunk)
        return mse_rows(projected, teacher[chunk][None], bias, *per_row, gradient)

    size = rows_within(chunk_bytes, width, projection.dtype, tensors=1)
    chunks = chunks_of(len(teacher), size, mask, MASKED)
    losses = sweep(projection, chunk_losses, gradients, chunks, counted)[0]
    if headroom is not None:
        for gradient in gradients.wanted():
            gradient.div_(headroom)
    return losses


class _HiddenLoss(torch.autograd.Function):
    """The operator `kdfast::OPERATION_forward` fills the loss and the gradients that it is given.

    Called with the operation's name, which of the leading tensors need a gradient, the operator's
    settings by name, and its tensors up to `incoming`.
    """

    @staticmethod
    def forward(ctx, operation, needed, settings, *tensors):
        ctx.operation, ctx.needed, ctx.settings = operation, needed, settings
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        # Without a reduction every token has an incoming gradient of its own: it is applied where
        # the token is at hand, which a sum over tokens must wait for anyway. And a half-precision
        # gradient is rounded where it is computed, once, with the incoming scale inside.
        per_token = settings["reduction"] == "none"
        rounded = not _is_projected(tensors, needed) and tensors[0].dtype in HALF
        ctx.deferred = any(needed) and (per_token or rounded)
        gradients = [None] * len(needed)
        if not ctx.deferred:
            gradients = _gradient_buffers(tensors, needed)
        shape = tensors[0].shape[:-1] if per_token else ()
        loss = tensors[0].new_empty(shape, dtype=_accumulated_in(tensors[: len(needed)]))
        operator = getattr(torch.ops.kdfast, f"{operation}_forward")
        operator(*tensors, None, loss, *gradients, **settings)
        save_for_backward(ctx, *(tensors if ctx.deferred else gradients))
        return loss

    @staticmethod
    def backward(ctx, incoming):
        refuse_double_backward(ctx.operation)
        if ctx.deferred:
            tensors = saved(ctx)
            gradients = _gradient_buffers(tensors, ctx.needed)
            operator = getattr(torch.ops.kdfast, f"{ctx.operation}_forward")
            operator(*tensors, incoming, None, *gradients, **ctx.settings)
        else:
            gradients = [
                None if gradient is None else scale_gradient(gradient, incoming)
                for gradient in saved(ctx)
            ]
        # A projection's gradients are sums over tokens in wide precision, and rounded now.
        gradients = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=False)
        ]
        others = len(ctx.dtypes) - len(gradients)
        # For the three arguments before the tensors, and the tensors that are never differentiated.
        return None, None, None, *gradients, *[None] * others


def _is_projected(tensors: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> bool:
    return any(tensor is not None for tensor in tensors[1 : len(needed)])


def _accumulated_in(tensors: tuple[Tensor | None, ...]) -> torch.dtype:
    """The precision of the loss of a student and what projects it, and of their gradients."""
    return wide_dtype(*(tensor.dtype for tensor in tensors if tensor is not None))


def _gradient_buffers(
    tensors: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """One for each of the leading tensors that needs a gradient.

    In the student's own precision where nothing is added up in it.
    """
    students = tensors[: len(needed)]
    dtype = students[0].dtype
    if _is_projected(tensors, needed):
        dtype = _accumulated_in(students)
    return [
        fresh(*tensor.shape, dtype=dtype, device=tensor.device) if need else None
        for tensor, need in zip(students, needed, strict=True)
    ]


def _check_states(student: Tensor, teacher: Tensor, mask: Tensor | None, reduction: str) -> None:
    check_floating("student", student)
    check_floating("teacher", teacher)
    check_detached("teacher", teacher)
    check_choice("reduction", reduction, REDUCTIONS)
    check_same_device("teacher", teacher, student.device)
    if student.dim() == 0 or teacher.dim() == 0:
        raise ValueError("student and teacher must have a feature dimension, got a 0-d tensor")
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher must have the student's leading shape {tuple(student.shape[:-1])}, "
            f"got {tuple(teacher.shape[:-1])}"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be torch.bool, True for the tokens that count, got {mask.dtype}: "
            "pass attention_mask.bool()"
        )
    check_shape("mask", mask, student.shape[:-1], "the student's leading shape")
    check_same_device("mask", mask, student.device)


def _check_projection(
    student: Tensor, teacher: Tensor, weight: Tensor | None, bias: Tensor | None
) -> None:
    widths = teacher.shape[-1], student.shape[-1]
    if weight is None:
        if bias is not None:
            raise ValueError("bias is added to a projection: pass weight too, or leave it out")
        if widths[0] != widths[1]:
            raise ValueError(
                f"teacher has {widths[0]} features and student {widths[1]}: pass weight "
                f"{list(widths)}, a projection of the student's onto the teacher's"
            )
        return
    check_floating("weight", weight)
    check_shape("weight", weight, widths, "the teacher's and the student's features")
    check_same_device("weight", weight, student.device)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, widths[:1], "the teacher's features")
        check_same_device("bias", bias, student.device)


def _needed(*tensors: Tensor | None) -> tuple[bool, ...]:
    grad = torch.is_grad_enabled()
    return tuple(grad and tensor is not None and tensor.requires_grad for tensor in tensors)


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error between hidden states, the student's projected onto the teacher's width.

    Each token's loss is

        ‖student Wᵀ + bias − teacher‖² / D_t

    after Jiao et al. 2020, "TinyBERT" (equation 8; equation 9 for embeddings), and of the student
    itself without a weight. Tokens are taken in chunks, and gradients are computed in the forward
    pass: neither the projected states nor their difference exist as a whole, and a training step is
    the projection's three matrix products.

    Args:
        student: `[..., D_s]`, float32, bfloat16, float16 or float64. Gradients flow to it, to
            `weight` and to `bias`, to each if it requires grad.
        teacher: `[..., D_t]`, the same leading shape and device; its dtype may differ.
        weight: `[D_t, D_s]`, as in `nn.Linear`. Needed when D_s and D_t differ.
        bias: `[D_t]`.
        mask: `[...]` bool, True for the tokens that count. The others have no loss and no gradient,
            whatever they hold, NaN included.
        reduction: "mean" over the tokens that count, "sum" over them, or "none" for each token's
            loss, 0 where it does not count. All three are of the loss above, a mean over the
            features: "mean" is `nn.MSELoss()` of the tokens that count, while the sum of
            `nn.MSELoss(reduction="sum")` is D_t times as large. With "none" the gradients are
            computed in the backward pass, which takes the tokens again.

    Returns:
        The loss, float32 (float64 for float64 states or weight): 0-d, or `[...]` for
        reduction="none". No token that counts: 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> loss = kdfast.hidden_mse(student_hidden, teacher_hidden, weight=projection.weight)
        >>> loss.backward()
    """
    _check_states(student, teacher, mask, reduction)
    _check_projection(student, teacher, weight, bias)
    device = student.device
    autocast = None
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
    settings = {
        "reduction": reduction,
        "chunk_bytes": _chunk_bytes(device, PROJECTED_BYTES),
        "autocast": autocast,
    }
    needed = _needed(student, weight, bias)
    tensors = distinct(student, weight, bias, teacher, mask)
    return _HiddenLoss.apply("hidden_mse", needed, settings, *tensors)


def hidden_cosine(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """One minus the cosine between hidden states.

    Each token's loss is

        1 − s·t / (max(‖s‖, ε) · max(‖t‖, ε)),   ε = 1e-8

    as `nn.functional.cosine_similarity` has it; the mean is `nn.CosineEmbeddingLoss` with a target
    of 1, which Sanh et al. 2019, "DistilBERT", take on the last layer. So a vector of zeros, on
    either side, has a loss of 1. If it is the student's, its gradient is −t / (ε · ‖t‖), a large
    one; if it is the teacher's, the gradient is 0. Unlike those two the loss keeps its digits where
    student and teacher agree, and is never negative.

    Args:
        student: `[..., D]`, float32, bfloat16, float16 or float64. Gradients flow here alone.
        teacher: `[..., D]`, the same shape and device; its dtype may differ.
        mask: `[...]` bool, True for the tokens that count. The others have no loss and no gradient,
            whatever they hold, NaN included.
        reduction: "mean" over the tokens that count, "sum" over them, or "none" for each token's
            loss, 0 where it does not count.

    Returns:
        The loss, float32 (float64 for float64 states): 0-d, or `[...]` for reduction="none". No
        token that counts: 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> loss = kdfast.hidden_cosine(student_hidden, teacher_hidden, mask=attention_mask.bool())
        >>> loss.backward()
    """
    _check_states(student, teacher, mask, reduction)
    check_shape("teacher", teacher, student.shape, "the student's shape")
    settings = {"reduction": reduction}
    tensors = distinct(student, teacher, mask)
    return _HiddenLoss.apply("hidden_cosine", _needed(student), settings, *tensors)
