"""Distillation straight from hidden states: `linear_kd_loss`.

Read from the bottom: the public function checks its arguments, the autograd function keeps the
gradients that the forward pass computed, and the operator takes the rows in chunks: the logits of
both heads, the row kernel of `kd_loss` in place, the two products of the gradient.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import registry, vocab_parallel
from kdfast.ops.arguments import (
    check_count,
    check_detached,
    check_floating,
    check_number,
    check_same_device,
    check_shape,
    checked_vocab_size,
    values_are_checked,
)
from kdfast.ops.gradient import refuse_double_backward, scale_gradient
from kdfast.ops.kd_loss import BACKENDS
from kdfast.ops.memory import fresh
from kdfast.ops.tokens import (
    check_values,
    checked_keywords,
    gradient_scale,
    reduce,
    reduced_like,
    token_share,
)
from kdfast.reference import canonical_divergence

# What one chunk may take, where KDFAST_CHUNK_BYTES does not say. A CPU's caches are long outgrown,
# and the matrix products are as fast as they get from 200 rows on; a GPU wants more rows.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}

# A weight that the products want wider is converted by blocks, which cost time and not memory.
BLOCK_BYTES = 16 << 20

HALF = (torch.bfloat16, torch.float16)


class _Head:
    """One model's output head: logits = softcap(scale · (hidden Wᵀ + bias)).

    Products of half-precision operands are accumulated and returned in float32. On the CPU, whose
    products return what they take, the operands are widened instead.
    """

    def __init__(
        self,
        hidden: Tensor,  # (rows, hidden)
        weight: Tensor,  # (vocab, hidden)
        bias: Tensor | None,  # (vocab,)
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.bias, self.scale, self.softcap = hidden, bias, scale, softcap
        self.dtype = dtype
        narrows = weight.dtype.itemsize > dtype.itemsize
        self.weight = weight.to(dtype) if narrows else weight

    def rows(self, chunk: slice | Tensor) -> Tensor:
        return self.hidden[chunk].to(self.dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the products' dtype, some columns of the logits at a time."""
        vocab, width = self.weight.shape
        size = vocab if self.weight.dtype == self.dtype else BLOCK_BYTES // (4 * width)
        for begin in range(0, vocab, max(1, size)):
            columns = slice(begin, min(begin + max(1, size), vocab))
            yield columns, self.weight[columns].to(self.dtype)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        for columns, weight in self.blocks():
            _multiply(rows, weight.T, out[:, columns])
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def uncap(self, gradient: Tensor, logits: Tensor) -> None:
        """From the gradient of the capped logits to that of what was capped; logits are lost."""
        gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1))

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        out = gradient.new_empty(len(gradient), self.weight.shape[1], dtype=_wide(self.dtype))
        for columns, weight in self.blocks():
            _multiply(gradient[:, columns], weight, out, accumulate=columns.start > 0)
        return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = left right, or out += left right, accumulated in the precision of `out`."""
    widening = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, left, right, **widening, out=out)
    else:
        torch.mm(left, right, **widening, out=out)


def _product_dtype(
    student_hidden: Tensor, student_weight: Tensor, autocast: torch.dtype | None
) -> torch.dtype:
    dtype = torch.promote_types(student_hidden.dtype, student_weight.dtype)
    if dtype == torch.float64:
        return dtype
    if student_hidden.device.type != "cuda":
        return torch.float32
    return dtype if autocast is None else autocast


def _chunk_bytes(device: torch.device) -> int:
    text = os.environ.get("KDFAST_CHUNK_BYTES")
    if text is None:
        return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"KDFAST_CHUNK_BYTES must be a whole number above 0, got {text!r}")
    return int(text)


def _chunk_rows(chunk_bytes: int, vocab: int, dtype: torch.dtype, sharded: bool) -> int:
    """How many rows fit into the budget: at least one, and multiples of 64 from there on."""
    # Both sets of logits, and the gradient where the products want it narrower.
    per_logit = 2 * _wide(dtype).itemsize + (dtype.itemsize if dtype in HALF else 0)
    # Besides them, the plain PyTorch of a sharded vocabulary holds its temporaries.
    rows = chunk_bytes // max(1, vocab * per_logit * (4 if sharded else 1))
    return max(1, rows // 64 * 64 if rows >= 64 else rows)


def _buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Rows start on a boundary: a matrix product whose rows do not is a slow one on a GPU.
    return fresh(rows, -(-vocab // 64) * 64, dtype=dtype, device=device)[:, :vocab]


def _chunks(
    rows: int, size: int, labels: Tensor | None, ignore_index: int
) -> tuple[slice | Tensor, ...]:
    """The rows of each chunk; on the CPU only those that count, few in a masked language model.

    Elsewhere counting them would wait for the device.
    """
    if labels is not None and labels.device.type == "cpu":
        counted = (labels != ignore_index).nonzero().squeeze(1)
        if len(counted) < rows:
            return counted.split(size) if len(counted) else ()
    return tuple(slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))


def _float16_headroom(
    scale: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    scale_t2: bool,
    alpha: float,
    device: torch.device,
) -> Tensor:
    """A power of two that brings the entries of a float16 gradient near 2⁸.

    There is room above for the logarithms of a reverse KL, and below for probabilities of 1e-10.
    """
    largest = torch.ones((), device=device)
    largest = largest * (alpha * (temperature if scale_t2 else 1 / temperature) + (1 - alpha))
    for factor in (scale, token_weight):
        largest = largest if factor is None else largest * factor.abs()
    largest = largest.amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(8 - largest.log2().ceil())


registry.library.define(
    "linear_kd_loss_forward(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels, "
    "Tensor? token_weight, Tensor? temperature_per_token, Tensor? teacher_temperature_per_token, "
    "Tensor? num_items, Tensor? incoming, Tensor(a!)? hidden_gradient, Tensor(b!)? weight_gradient,"
    " Tensor(c!)? bias_gradient, *, str divergence, float beta, float temperature, "
    "float teacher_temperature, bool scale_t2, float alpha, int ignore_index, SymInt vocab_size, "
    "str reduction, bool need_parts, float student_logit_scale, float teacher_logit_scale, "
    "float? student_softcap, float? teacher_softcap, SymInt? chunk_size, SymInt chunk_bytes, "
    "ScalarType? autocast, str? group, SymInt vocab_offset, SymInt widest_shard"
    ") -> (Tensor total, Tensor soft, Tensor hard)"
)


@torch.library.impl(registry.library, "linear_kd_loss_forward", "CompositeExplicitAutograd")
def _linear_kd_loss_forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature_per_token: Tensor | None,
    teacher_temperature_per_token: Tensor | None,
    num_items: Tensor | None,
    incoming: Tensor | None,
    hidden_gradient: Tensor | None,
    weight_gradient: Tensor | None,
    bias_gradient: Tensor | None,
    *,
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    reduction: str,
    need_parts: bool,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    chunk_size: int | None,
    chunk_bytes: int,
    autocast: torch.dtype | None,
    group: str | None,
    vocab_offset: int,
    widest_shard: int,
) -> tuple[Tensor, Tensor, Tensor]:
    device, tokens = student_hidden.device, student_hidden.shape[:-1]
    if values_are_checked(device):
        temperatures = {
            "temperature": temperature_per_token,
            "teacher_temperature": teacher_temperature_per_token,
        }
        check_values(labels, temperatures, ignore_index, vocab_size)
    dtype = _product_dtype(student_hidden, student_weight, autocast)
    wide = _wide(dtype)
    # The columns that exist, of this shard if the vocabulary is one.
    vocab = max(0, min(len(student_weight), vocab_size - vocab_offset))

    def head(hidden, weight, bias, scale, softcap):
        bias = None if bias is None else bias[:vocab]
        hidden = hidden.reshape(tokens.numel(), hidden.shape[-1])
        return _Head(hidden, weight[:vocab], bias, scale, softcap, dtype)

    student = head(
        student_hidden, student_weight, student_bias, student_logit_scale, student_softcap
    )
    teacher = head(
        teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap
    )
    labels, token_weight, temperature_per_token, teacher_temperature_per_token = (
        None if per_token is None else per_token.flatten()
        for per_token in (
            labels,
            token_weight,
            temperature_per_token,
            teacher_temperature_per_token,
        )
    )
    if temperature_per_token is not None:
        temperature = temperature_per_token
    if teacher_temperature_per_token is not None:
        teacher_temperature = teacher_temperature_per_token
    gradients = [g for g in (hidden_gradient, weight_gradient, bias_gradient) if g is not None]
    share = token_share(reduction, num_items, labels, ignore_index, tokens, device)
    grad_scale = gradient_scale(share, incoming)
    if student_logit_scale != 1:
        grad_scale = (
            torch.full((), student_logit_scale, dtype=wide, device=device)
            if grad_scale is None
            else grad_scale * student_logit_scale
        )
    headroom = None
    if gradients and dtype == torch.float16:
        headroom = _float16_headroom(grad_scale, token_weight, temperature, scale_t2, alpha, device)
        grad_scale = headroom if grad_scale is None else grad_scale * headroom
    grad_scale = None if grad_scale is None else grad_scale.to(wide)

    if group is None:
        row_losses = registry.select("linear_kd_loss", BACKENDS, student_hidden)
    else:
        row_losses = partial(vocab_parallel.kd_loss_rows, group=group, vocab_offset=vocab_offset)
    row_losses = partial(
        row_losses,
        divergence=canonical_divergence(divergence, beta),
        beta=beta,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        vocab_size=vocab,
        need_hard=need_parts,
    )

    rows = len(student.hidden)
    # Ranks whose shards differ in size take the same chunks: they meet in each.
    size = chunk_size or _chunk_rows(chunk_bytes, widest_shard, dtype, group is not None)
    losses = torch.zeros(3, rows, dtype=wide, device=device)
    for gradient in (hidden_gradient, bias_gradient):
        if gradient is not None:
            gradient.zero_()
    size = max(1, min(size, rows))
    student_buffer, teacher_buffer = (_buffer(size, vocab, wide, device) for _ in range(2))
    # The gradient takes the place of the student's logits, unless they are still needed or it is
    # narrower.
    gradient_buffer = None
    if gradients:
        gradient_buffer = student_buffer if student.softcap is None else teacher_buffer
        if dtype in HALF:
            gradient_buffer = _buffer(size, vocab, dtype, device)

    chunks = _chunks(rows, size, labels, ignore_index)
    with torch.autocast(device.type, enabled=False):
        for index, chunk in enumerate(chunks):
            hidden = student.rows(chunk)
            count = len(hidden)
            student_logits = student.logits(hidden, student_buffer[:count])
            teacher_logits = teacher.logits(teacher.rows(chunk), teacher_buffer[:count])
            gradient = None if gradient_buffer is None else gradient_buffer[:count]
            per_token = (
                value[chunk] if isinstance(value, Tensor) and value.dim() > 0 else value
                for value in (
                    labels,
                    token_weight,
                    temperature,
                    teacher_temperature,
                    grad_scale,
                )
            )
            losses[:, chunk] = row_losses(
                student_logits[None],
                teacher_logits[None],
                *per_token,
                None if gradient is None else gradient[None],
            )
            if gradient is None:
                continue
            if student.softcap is not None:
                student.uncap(gradient, student_logits)
            if hidden_gradient is not None:
                hidden_gradient.view(student.hidden.shape)[chunk] = student.hidden_gradient(
                    gradient
                )
            if weight_gradient is not None:
                if labels is not None and device.type != "cpu":
                    # A row that does not count has a gradient of 0, which a NaN must not meet.
                    hidden = torch.where((labels[chunk] != ignore_index)[:, None], hidden, 0)
                _multiply(gradient.T, hidden, weight_gradient[:vocab], accumulate=index > 0)
            if bias_gradient is not None:
                bias_gradient[:vocab] += gradient.sum(0, dtype=wide)
    if weight_gradient is not None:
        weight_gradient[vocab if chunks else 0 :] = 0
    if group is not None and hidden_gradient is not None:
        vocab_parallel.add_shards_(hidden_gradient, group)
    if headroom is not None:
        for gradient in gradients:
            gradient.div_(headroom)
    return reduce(losses, share, tokens, need_parts)


@torch.library.register_fake("kdfast::linear_kd_loss_forward", lib=registry.library)
def _(student_hidden: Tensor, student_weight: Tensor, *args: object, **settings: object):
    shape = student_hidden.shape[:-1] if settings["reduction"] == "none" else ()
    dtype = torch.promote_types(student_hidden.dtype, student_weight.dtype)
    return reduced_like(student_hidden.to(dtype), shape, settings["need_parts"])


class _LinearKDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_weight, student_bias, *inputs_and_settings):
        *inputs, needed, settings = inputs_and_settings
        student = (student_hidden, student_weight, student_bias)
        ctx.settings, ctx.needed = settings, needed
        # Without a reduction every token has an incoming gradient of its own, which a sum over
        # tokens must wait for.
        ctx.deferred = settings["reduction"] == "none" and any(needed[1:])
        gradients = [None] * 3 if ctx.deferred else _gradient_buffers(student, needed)
        outputs = torch.ops.kdfast.linear_kd_loss_forward(
            *student, *inputs, None, *gradients, **settings
        )
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in student]
        ctx.save_for_backward(*((*student, *inputs) if ctx.deferred else gradients))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, incoming, *_):
        refuse_double_backward("linear_kd_loss")
        if ctx.deferred:
            student, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
            gradients = _gradient_buffers(student, ctx.needed)
            torch.ops.kdfast.linear_kd_loss_forward(
                *student, *inputs, incoming, *gradients, **ctx.settings
            )
        else:
            gradients = [
                None if gradient is None else scale_gradient(gradient, incoming)
                for gradient in ctx.saved_tensors
            ]
        # Half precision is rounded to once, with the incoming scale inside.
        gradients = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *gradients, *[None] * 10


def _gradient_buffers(student: tuple, needed: tuple[bool, ...]) -> list[Tensor | None]:
    wide = _wide(torch.promote_types(student[0].dtype, student[1].dtype))
    return [
        fresh(*tensor.shape, dtype=wide, device=tensor.device) if need else None
        for tensor, need in zip(student, needed, strict=True)
    ]


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_t2: bool = True,
    alpha: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`kd_loss` of logits that never exist, from the hidden states in front of both output heads.

    The logits are those of the two heads,

        logits = softcap(logit_scale · (hidden Wᵀ + bias)),   softcap(x) = c · tanh(x / c),

    and the loss, with every keyword that is not described here, is that of `kdfast.kd_loss`. Rows
    are taken in chunks, and gradients are computed in the forward pass: a training step is four
    matrix products of the head's size, and holds one chunk's logits besides its gradients. Logits
    are kept in float32 within a chunk and the weight's gradient is accumulated in float32, whatever
    the precision of the models.

    Args:
        student_hidden: `[..., H_s]`, float32, bfloat16, float16 or float64.
        student_weight: `[V, H_s]`, as in `nn.Linear`. Gradients go to `student_hidden`,
            `student_weight` and `student_bias`, to each if it requires grad. A DTensor, as FSDP2
            shards it, is gathered, and its gradient averaged over the ranks.
        teacher_hidden: `[..., H_t]`, the same leading shape and device.
        teacher_weight: `[V_t, H_t]`.
        labels: `[...]`, integers, aligned with the rows: no position is shifted.
        student_bias, teacher_bias: `[V]`, `[V_t]`.
        student_logit_scale, teacher_logit_scale: above 0.
        student_softcap, teacher_softcap: c, above 0; None for no cap.
        chunk_size: rows of a chunk. None takes as many as fit into the environment variable
            KDFAST_CHUNK_BYTES, by default 128 MiB on the CPU and 1 GiB elsewhere, at 8 bytes per
            logit (10 where the products are of half precision, 16 in float64).
        process_group: weights and biases are this rank's shard of the vocabulary, in the order of
            the ranks and both models cut alike; everything else is the same on every rank. Labels
            and `vocab_size` count the whole vocabulary. The loss and `student_hidden`'s gradient
            come out whole on every rank. Where one rank's arguments are refused, all raise. Breaks
            the graph of `torch.compile`.
        vocab_size: rows of the weights at and beyond it do not exist: they take part in no product,
            and their gradient is 0.
        reduction: with "none" and a weight or bias that requires grad, the gradients wait for the
            backward pass, and the step is six products.

    Returns:
        The loss, as `kdfast.kd_loss` returns it.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> loss = kdfast.linear_kd_loss(
        ...     student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight
        ... )
        >>> loss.backward()
    """
    prepare = partial(
        _prepared,
        (student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        labels,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        sharded=process_group is not None,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_items=num_items,
        return_parts=return_parts,
    )
    if process_group is None:
        tensors, needed, settings = prepare()
    else:
        tensors, needed, settings = vocab_parallel.agreed(prepare, process_group)
    total, soft, hard = _LinearKDLoss.apply(*tensors, needed, settings)
    return (total, soft, hard) if return_parts else total


def _prepared(
    student: tuple,
    teacher: tuple,
    labels: Tensor | None,
    *,
    vocab_size: int | None,
    chunk_size: int | None,
    sharded: bool,
    **keywords: object,
) -> tuple[tuple, tuple[bool, ...], dict[str, object]]:
    """The arguments, checked, as the operator takes them."""
    device = student[0].device if isinstance(student[0], Tensor) else None
    student = _checked_head("student", *student, device, sharded)
    teacher = _checked_head("teacher", *teacher, device, sharded)
    for name, tensor in zip(("hidden", "weight", "bias"), teacher, strict=False):
        check_detached(f"teacher_{name}", tensor)
    tokens = student[0].shape[:-1]
    if teacher[0].shape[:-1] != tokens:
        raise ValueError(
            f"teacher_hidden must have the student's leading shape {tuple(tokens)}, "
            f"got {tuple(teacher[0].shape[:-1])}"
        )
    per_token, settings = checked_keywords(tokens, device, labels, **keywords)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if not sharded:
        vocab_size = checked_vocab_size(
            vocab_size,
            len(student[1]),
            len(teacher[1]),
            ("student_weight", "teacher_weight"),
            "rows",
        )
    needed = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in student[:3]
    )
    autocast = None
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
    settings |= {
        "vocab_size": vocab_size,
        "student_logit_scale": student[3],
        "teacher_logit_scale": teacher[3],
        "student_softcap": student[4],
        "teacher_softcap": teacher[4],
        "chunk_size": chunk_size,
        "chunk_bytes": _chunk_bytes(device),
        "autocast": autocast,
        "group": None,
        "vocab_offset": 0,
        "widest_shard": vocab_size,
    }
    return (*student[:3], *teacher[:3], *per_token), needed, settings


def _checked_head(
    owner: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    device: torch.device,
    sharded: bool,
) -> tuple[Tensor, Tensor, Tensor | None, float, float | None]:
    check_floating(f"{owner}_hidden", hidden)
    if _is_dtensor(hidden):
        raise ValueError(
            f"{owner}_hidden must be a plain tensor, got a DTensor: pass {owner}_hidden.to_local()"
            " (and process_group, where the vocabulary is sharded)"
        )
    check_floating(f"{owner}_weight", weight)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{owner}_weight must be [vocab, {hidden.shape[-1] if hidden.dim() else 'hidden'}] for "
            f"{owner}_hidden of shape {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_floating(f"{owner}_bias", bias)
        check_shape(f"{owner}_bias", bias, weight.shape[:1], f"{owner}_weight's rows")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_same_device(f"{owner}_{name}", tensor, device)
    check_number(f"{owner}_logit_scale", scale, 0, open_low=True)
    if softcap is not None:
        check_number(f"{owner}_softcap", softcap, 0, open_low=True)
    weight, bias = (
        _gathered(f"{owner}_{name}", tensor, sharded)
        for name, tensor in (("weight", weight), ("bias", bias))
    )
    return hidden, weight, bias, float(scale), None if softcap is None else float(softcap)


def _is_dtensor(tensor: Tensor | None) -> bool:
    # Imported by whoever made one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _gathered(name: str, tensor: Tensor | None, sharded: bool) -> Tensor | None:
    """A DTensor whole, as FSDP2 gathers a parameter: every rank has a batch of its own.

    So every rank has a gradient of its own, and the shards' gradient is their mean.
    """
    if not _is_dtensor(tensor):
        return tensor
    if sharded:
        raise ValueError(
            f"{name} must be this rank's shard of the vocabulary where there is a process_group, "
            f"got a DTensor: pass {name}.to_local()"
        )
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
