"""Logits as kernels take them: in rows, and by their addresses."""

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kdfast.ops import registry


def as_rows(logits: Tensor) -> Tensor:
    """`[outer, inner, V]` with unit stride along V; a view of `logits[:, :-1]` too, not a copy."""
    *leading, width = logits.shape
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    inner = leading[-1] if leading else 1
    return logits.reshape(math.prod(leading[:-1]), inner, width)


def in_rows(values: Tensor | float | None, leading: torch.Size) -> Tensor | float | None:
    """Values per row in the shape of the rows' leading dimensions; one for all rows stays one."""
    single = not isinstance(values, Tensor) or values.numel() == 1 != leading.numel()
    return values if single else values.view(leading)


def cpp_kernel(name: str, real: torch.dtype) -> Callable[..., None]:
    """The extension's `name` that computes in `real`, on as many threads as PyTorch takes."""
    kernel = getattr(registry.extension(), f"{name}_{str(real).removeprefix('torch.')}")
    return partial(kernel, threads=torch.get_num_threads())


@functools.lru_cache(maxsize=64)
def _single(value: float, dtype: torch.dtype) -> Tensor:
    """A number in memory; temperatures are the same ones at every call."""
    return torch.tensor(value, dtype=dtype, device="cpu")


class Addresses:
    """What a C++ kernel is given for tensors. It holds on to the tensors that a conversion made."""

    def __init__(self) -> None:
        self._keep = []

    def matrix(self, rows: Tensor | None) -> tuple[int, int, int, str]:
        """Address, strides of the two leading dimensions and dtype."""
        if rows is None:
            return 0, 0, 0, "float32"
        return rows.data_ptr(), *rows.stride()[:2], str(rows.dtype).removeprefix("torch.")

    def heads(self, tensor: Tensor | None) -> tuple[int, int, int, int, int, str]:
        """The same of `[samples, heads, tokens, channels]`: three strides, and how many heads."""
        if tensor is None:
            return 0, 0, 0, 0, 0, "float32"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            tensor = tensor.contiguous()
        self._keep.append(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return tensor.data_ptr(), *tensor.stride()[:3], tensor.shape[1], dtype

    def mask(self, mask: Tensor | None) -> int:
        """The address of one bool per row, 0 for none."""
        return 0 if mask is None else self.contiguous(mask, torch.bool)

    def per_row(self, values: Tensor | float | None, dtype: torch.dtype) -> tuple[int, int]:
        """The address of one value per row, and the step between them: 0 repeats a single value."""
        if values is None:
            return 0, 0
        if not isinstance(values, Tensor):
            values = _single(values, dtype)
        return self.contiguous(values, dtype), int(values.dim() > 0)

    def contiguous(self, values: Tensor, dtype: torch.dtype) -> int:
        values = values.to(dtype).contiguous()
        self._keep.append(values)
        return values.data_ptr()


def check_overwritable(student_logits: Tensor) -> None:
    rows = as_rows(student_logits)
    # Rows that overlap, as those of an expanded tensor or of a window that slides, begin before one
    # ends.
    end, overlaps = 1, False
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        overlaps |= size > 1 and stride < end
        end += (size - 1) * stride
    if overlaps or rows.untyped_storage() is not student_logits.untyped_storage():
        raise ValueError(
            "overwrite_student_logits needs student_logits whose rows are contiguous and distinct "
            f"in memory, got strides {student_logits.stride()}"
        )
