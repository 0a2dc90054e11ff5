"""What the operations ask of their arguments.

Every error names the argument, what came and what was expected.
"""

import math
import numbers
import os

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be one of {FLOATING}, got {tensor.dtype}")


def check_detached(name: str, tensor: object) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, and gradients flow to the student alone: "
            f"compute it under torch.no_grad(), or pass {name}.detach()"
        )


def check_same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the student, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: tuple, meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have {meaning} {tuple(shape)}, got {tuple(tensor.shape)}")


def check_per_token(
    name: str, tensor: Tensor, tokens: tuple, device: torch.device, dtypes: tuple
) -> None:
    """A tensor with one value per token: labels, weights, temperatures."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {dtypes}, got {tensor.dtype}")
    check_shape(name, tensor, tokens, "the logits' leading shape")
    check_same_device(name, tensor, device)
    check_detached(name, tensor)


def check_number(
    name: str, number: float, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    inside = (low < number if open_low else low <= number) and number <= high and number < math.inf
    if not inside:
        raise ValueError(f"{name} must be {_interval(low, high, open_low)}, got {number}")


def check_integer(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number, got {type(number).__name__}")


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")


def check_count(name: str, number: int) -> None:
    check_integer(name, number)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")


def _interval(low: float, high: float, open_low: bool) -> str:
    lower = f"above {low:g}" if open_low else f"at least {low:g}"
    return f"finite and {lower}" if high == math.inf else f"{lower} and at most {high:g}"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def checked_vocab_size(
    vocab_size: int | None, student: int, teacher: int, names: tuple[str, str], unit: str
) -> int:
    """The size of the vocabulary, given what the two sides have: `unit` of the tensors `names`."""
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"{names[0]} has {student} {unit} and {names[1]} {teacher}: "
                "pass vocab_size, the size of the vocabulary that the two share"
            )
        vocab_size = student
    check_integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size must be at least 1 and at most the {unit} of both sides, got {vocab_size} "
            f"for {names[0]} of {student} and {names[1]} of {teacher} {unit}"
        )
    return vocab_size


def values_are_checked(device: torch.device) -> bool:
    """Whether to look at values: on the CPU. Elsewhere it synchronises: only for KDFAST_DEBUG=1."""
    return device.type == "cpu" or os.environ.get("KDFAST_DEBUG", "0") == "1"
