"""A language model's output head, taken some rows at a time: its logits, and its gradients."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from kdfast.ops.memory import fresh

# What one chunk may take, where KDFAST_CHUNK_BYTES does not say. A CPU's caches are long outgrown,
# and its matrix products are as fast as they get from 200 rows on; a GPU wants more rows.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}

# A weight that the products want wider is converted by blocks, which cost time and not memory.
BLOCK_BYTES = 16 << 20

HALF = (torch.bfloat16, torch.float16)


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


def multiply(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = left right, or out += left right, accumulated in the precision of `out`."""
    widening = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, left, right, **widening, out=out)
    else:
        torch.mm(left, right, **widening, out=out)


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
        size = vocab if self.weight.dtype == self.dtype else BLOCK_BYTES // (4 * width)
        size = max(1, size)
        for begin in range(0, vocab, size):
            columns = slice(begin, min(begin + size, vocab))
            yield columns, self.weight[columns].to(self.dtype)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """The logits of hidden states `rows`, in `out`."""
        for columns, weight in self.blocks():
            multiply(rows, weight.T, out[:, columns])
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
        """gradient W, `[rows, H]`."""
        wide = wide_dtype(self.dtype)
        out = gradient.new_empty(len(gradient), self.weight.shape[1], dtype=wide)
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
        for gradient in (hidden, bias):
            if gradient is not None:
                gradient.zero_()

    def wanted(self) -> list[Tensor]:
        return [g for g in (self.hidden, self.weight, self.bias) if g is not None]

    def add(self, head: Head, chunk: slice | Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of the logits of `rows`, the hidden states of `chunk`."""
        if self.hidden is not None:
            self.hidden.view(head.hidden.shape)[chunk] = head.hidden_gradient(gradient)
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


def rows_within(budget: int, vocab: int, dtype: torch.dtype, temporaries: int = 0) -> int:
    """How many rows fit into the budget: at least one, and multiples of 64 from there on.

    Args:
        dtype: of the products' operands.
        temporaries: tensors of the logits' size that the rows' loss holds besides them.
    """
    # Both sets of logits, and their gradient where the products want it narrower.
    per_logit = (2 + temporaries) * wide_dtype(dtype).itemsize
    per_logit += dtype.itemsize if dtype in HALF else 0
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
