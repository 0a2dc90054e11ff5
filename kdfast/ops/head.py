"""A language model's output head, taken some rows at a time: its logits, and its gradients."""

import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdfast.ops.arguments import check_floating, check_number, check_same_device, check_shape
from kdfast.ops.matmul import multiply, takes_half
from kdfast.ops.memory import fresh

# What one chunk may take, where KDFAST_CHUNK_BYTES does not say. A CPU's caches are long outgrown,
# and its matrix products are as fast as they get from 200 rows on; a GPU wants more rows.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}

# A weight that the products want wider is converted by blocks, which cost time and not memory.
BLOCK_BYTES = 16 << 20

HALF = (torch.bfloat16, torch.float16)

# How many chunks' gradients in half precision the products take at once: 2 bytes a logit against 8,
# so four take the room of one chunk of both models' logits. Each product over them reads and writes
# the weight's gradient, which is as large as the weight.
HALF_CHUNKS = 4


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What is accumulated in: float64 where one of `dtypes` is, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def product_dtype(hidden: Tensor, weight: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype of the products' operands, for hidden states and weights that may differ in it."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    # A CPU's products return what they take, so half precision is widened before them.
    if dtype == torch.float64 or hidden.device.type != "cuda":
        return wide_dtype(dtype)
    return dtype if autocast is None else autocast


class Head:
    """logits = softcap(scale · (hidden Wᵀ + bias)), accumulated and returned in wide precision.

    Args:
        hidden: `[rows, H]`; weight: `[V, H]`; bias: `[V]` or None.
        softcap: c of c · tanh(x / c), or None.
        dtype: of the products' operands.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.bias, self.scale, self.softcap = hidden, bias, scale, softcap
        self.dtype = dtype
        narrows = weight.dtype.itemsize > dtype.itemsize
        self.weight = weight.to(dtype) if narrows else weight

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as the products take it, some columns of the logits at a time."""
        vocab, width = self.weight.shape
        as_it_is = self.weight.dtype == self.dtype or takes_half(self.weight, self.dtype)
        size = max(1, vocab if as_it_is else BLOCK_BYTES // (4 * width))
        for begin in range(0, vocab, size):
            columns = slice(begin, min(begin + size, vocab))
            weight = self.weight[columns]
            yield columns, weight if as_it_is else weight.to(self.dtype)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """The logits of hidden states `rows`, in `out`."""
        for columns, weight in self.blocks():
            multiply(rows, weight.T, out[:, columns])
        if self.bias is not None:
            out.add_(self.bias)
        return self.cap(out)

    def cap(self, logits: Tensor) -> Tensor:
        """softcap(scale · logits), in place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def uncap(self, gradient: Tensor, logits: Tensor) -> None:
        """From the gradient of the capped logits to that of what was capped; logits are lost."""
        gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1))

    def hidden_gradient(self, gradient: Tensor, out: Tensor) -> Tensor:
        """gradient W, `[rows, H]`, in `out`."""
        if len(self.weight) == 0:
            return out.zero_()
        for columns, weight in self.blocks():
            multiply(gradient[:, columns], weight, out, accumulate=columns.start > 0)
        return out


class HeadGradients:
    """Where a head's gradients go, chunk by chunk: each in wide precision, or None.

    Args:
        hidden: `[..., H]`; weight: `[V, H]`; bias: `[V]`.
        vocab: the rows of the weight that exist; the others' gradient is 0.
    """

    def __init__(
        self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, vocab: int
    ) -> None:
        self.hidden, self.weight, self.bias, self.vocab = hidden, weight, bias, vocab
        self._started = False

    def wanted(self) -> list[Tensor]:
        return [g for g in (self.hidden, self.weight, self.bias) if g is not None]

    def prepare(self, chunks: tuple[slice | Tensor, ...]) -> None:
        """Zeros in what `add` adds to, and in hidden states' gradients that no chunk has."""
        if self.bias is not None:
            self.bias.zero_()
        # Slices are of all rows.
        if self.hidden is not None and not (chunks and isinstance(chunks[0], slice)):
            self.hidden.zero_()

    def add(self, head: Head, chunk: slice | Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of the logits of `rows`, the hidden states of `chunk`."""
        if self.hidden is not None:
            hidden, wide = self.hidden.view(head.hidden.shape), wide_dtype(head.dtype)
            if isinstance(chunk, slice) and hidden.dtype == wide:
                head.hidden_gradient(gradient, hidden[chunk])
            else:
                out = gradient.new_empty(len(gradient), hidden.shape[1], dtype=wide)
                hidden[chunk] = head.hidden_gradient(gradient, out)
        if self.weight is not None:
            multiply(gradient.T, rows, self.weight[: self.vocab], accumulate=self._started)
        if self.bias is not None:
            self.bias[: self.vocab] += gradient.sum(0, dtype=self.bias.dtype)
        self._started = True

    def finish(self) -> None:
        if self.weight is not None:
            self.weight[self.vocab if self._started else 0 :] = 0


def chunk_budget(device: torch.device) -> int:
    """How many bytes a chunk may take."""
    text = os.environ.get("KDFAST_CHUNK_BYTES")
    if text is None:
        return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"KDFAST_CHUNK_BYTES must be a whole number above 0, got {text!r}")
    return int(text)


def rows_within(budget: int, vocab: int, dtype: torch.dtype, tensors: int) -> int:
    """How many rows fit into the budget: at least one, and multiples of 64 from there on.

    Args:
        dtype: of the products' operands.
        tensors: how many of the logits' size there are at once, in wide precision.
    """
    per_logit = tensors * wide_dtype(dtype).itemsize
    per_logit += HALF_CHUNKS * dtype.itemsize if dtype in HALF else 0
    rows = budget // max(1, vocab * per_logit)
    return max(1, rows // 64 * 64 if rows >= 64 else rows)


def logits_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Rows start on a boundary: a matrix product whose rows do not is a slow one on a GPU.
    return fresh(rows, -(-vocab // 64) * 64, dtype=dtype, device=device)[:, :vocab]


def chunks_of(
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


def largest(chunks: tuple[slice | Tensor, ...], rows: int) -> int:
    """The rows of the largest of the chunks of `rows` rows."""
    sizes = (
        len(chunk) if isinstance(chunk, Tensor) else len(range(rows)[chunk]) for chunk in chunks
    )
    return max(sizes, default=0)


def sweep(
    student: Head,
    chunk_losses: Callable[[slice | Tensor, Tensor, Tensor | None], Tensor],
    gradients: HeadGradients,
    chunks: tuple[slice | Tensor, ...],
    counted: Tensor | None,
    spare: Tensor | None = None,
) -> Tensor:
    """Total, soft and hard of every row, `[3, rows]`, and the gradients that are wanted.

    Args:
        chunk_losses: of a chunk, its logits `[1, rows, V]` and where to write their gradient (None
            where none is wanted): `[3, rows]`. The gradient may take the logits' place.
        chunks: the rows of each chunk; rows in none have a loss of 0.
        counted: `[rows]`, False where a chunk holds a row that does not count; None if none does.
        spare: `[rows of the largest chunk, V]`, which the gradient may overwrite.
    """
    device, vocab, wide = student.hidden.device, len(student.weight), wide_dtype(student.dtype)
    tokens = len(student.hidden)
    losses = torch.zeros(3, tokens, dtype=wide, device=device)
    size = largest(chunks, tokens)
    buffer = logits_buffer(size, vocab, wide, device)
    # The gradient takes the place of the student's logits, unless they are still needed or it is
    # narrower.
    gradient_buffer, together = buffer, 1
    if gradients.wanted() and student.dtype in HALF:
        together = HALF_CHUNKS
        gradient_buffer = logits_buffer(min(together * size, tokens), vocab, student.dtype, device)
    elif gradients.wanted() and student.softcap is not None:
        gradient_buffer = logits_buffer(size, vocab, wide, device) if spare is None else spare

    gradients.prepare(chunks)
    for begin in range(0, len(chunks), together):
        group = chunks[begin : begin + together]
        joined = group[0] if together == 1 else slice(group[0].start, group[-1].stop)
        hidden = student.hidden[joined].to(student.dtype)
        if counted is not None:
            # A row that does not count has a gradient of 0, which a NaN must not meet.
            hidden = torch.where(counted[joined, None], hidden, 0)
        for chunk, rows, gradient in zip(
            group, hidden.split(size), gradient_buffer.split(size), strict=False
        ):
            logits = student.logits(rows, buffer[: len(rows)])
            out = gradient[None, : len(rows)] if gradients.wanted() else None
            losses[:, chunk] = chunk_losses(chunk, logits[None], out)
            if out is not None and student.softcap is not None:
                student.uncap(out[0], logits)
        if gradients.wanted():
            gradients.add(student, joined, hidden, gradient_buffer[: len(hidden)])
    gradients.finish()
    return losses


def rows_of(values: tuple[float | Tensor | None, ...], chunk: slice | Tensor) -> Iterator:
    """A chunk's part of values that are each `[rows]`, or one for all."""
    for value in values:
        yield value[chunk] if isinstance(value, Tensor) and value.dim() > 0 else value


def float16_headroom(
    scale: Tensor,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    scale_t2: bool,
    alpha: float,
) -> Tensor:
    """A power of two that brings the entries of a float16 gradient near 2⁸.

    There is room above for the logarithms of a reverse KL, and below for probabilities of 1e-10.
    """
    largest = scale.abs() * (alpha * (temperature if scale_t2 else 1 / temperature) + (1 - alpha))
    if token_weight is not None:
        largest = largest * token_weight.abs()
    if largest.numel() == 0:
        return torch.ones((), device=scale.device)
    largest = largest.amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(8 - largest.log2().ceil())


def head_gradient_scale(
    scale: Tensor | None,
    logit_scale: float,
    dtype: torch.dtype,
    device: torch.device,
    *,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    scale_t2: bool,
    alpha: float,
) -> tuple[Tensor, Tensor | None]:
    """What the gradient of uncapped logits is multiplied by, and the headroom that is part of it.

    Args:
        scale: of the loss, 0-d or `[rows]`; None for 1.
        dtype: of the products' operands. Only float16 needs headroom: it is None otherwise.
    """
    if scale is None:
        scale = torch.ones((), dtype=wide_dtype(dtype), device=device)
    scale = scale * logit_scale
    headroom = None
    if dtype == torch.float16:
        headroom = float16_headroom(scale, token_weight, temperature, scale_t2, alpha)
        scale = scale * headroom
    return scale.to(wide_dtype(dtype)), headroom


def checked_head(
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
    if is_dtensor(hidden):
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


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether a tensor is spread over processes, as FSDP2 shards a parameter."""
    # Imported by whoever made one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _gathered(name: str, tensor: Tensor | None, sharded: bool) -> Tensor | None:
    """A DTensor whole, as FSDP2 gathers a parameter: every rank has a batch of its own.

    So every rank has a gradient of its own, and the shards' gradient is their mean.
    """
    if not is_dtensor(tensor):
        return tensor
    if sharded:
        raise ValueError(
            f"{name} must be this rank's shard of the vocabulary where there is a process_group, "
            f"got a DTensor: pass {name}.to_local()"
        )
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
