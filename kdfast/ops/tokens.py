"""What the losses over a vocabulary share: their keywords, and the way from tokens to one number.

An operator takes each of the temperatures as a number and as a tensor that replaces it, and the
reduction by name.
"""

import torch
from torch import Tensor

from kdfast.ops.arguments import (
    FLOATING,
    INTEGER,
    check_choice,
    check_detached,
    check_flag,
    check_integer,
    check_number,
    check_per_token,
)
from kdfast.reference import DIVERGENCES

REDUCTIONS = ("mean", "sum", "none")


def checked_keywords(
    tokens: torch.Size,
    device: torch.device,
    labels: Tensor | None,
    *,
    divergence: str,
    beta: float,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    token_weight: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    return_parts: bool,
) -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
    """The keywords of `kd_loss`, checked, as operators take them.

    Returns:
        `(labels, token_weight, temperature_per_token, teacher_temperature_per_token, num_items)`
        and the settings by name.
    """
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("beta", beta, 0, 1)
    check_number("alpha", alpha, 0, 1)
    check_integer("ignore_index", ignore_index)
    check_flag("scale_t2", scale_t2)
    check_flag("return_parts", return_parts)
    if labels is not None:
        labels = checked_labels("labels", labels, tokens, device)
    elif alpha < 1:
        raise ValueError(
            f"labels are needed for the hard term of alpha={alpha}; pass labels, or alpha=1.0"
        )
    if token_weight is not None:
        check_per_token("token_weight", token_weight, tokens, device, FLOATING)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    temperature, temperature_per_token = split_temperature(
        "temperature", temperature, tokens, device
    )
    teacher_temperature, teacher_temperature_per_token = split_temperature(
        "teacher_temperature", teacher_temperature, tokens, device
    )
    num_items = _checked_num_items(num_items, reduction, device)
    per_token = labels, token_weight, temperature_per_token, teacher_temperature_per_token
    return (*per_token, num_items), {
        "divergence": divergence,
        "beta": float(beta),
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "scale_t2": scale_t2,
        "alpha": float(alpha),
        "ignore_index": ignore_index,
        "reduction": reduction,
        "need_parts": return_parts,
    }


def checked_labels(name: str, labels: Tensor, tokens: torch.Size, device: torch.device) -> Tensor:
    """Labels as int64: narrower ones may hold neither the vocabulary's size nor ignore_index."""
    check_per_token(name, labels, tokens, device, INTEGER)
    return labels.long()


def split_temperature(
    name: str, temperature: float | Tensor, tokens: torch.Size, device: torch.device
) -> tuple[float, Tensor | None]:
    """A temperature as an operator takes it: a number, and a tensor that replaces it."""
    if isinstance(temperature, Tensor):
        check_per_token(name, temperature, tokens, device, FLOATING)
        return 1.0, temperature
    check_number(name, temperature, 0, open_low=True)
    return float(temperature), None


def _checked_num_items(
    num_items: float | Tensor | None, reduction: str, device: torch.device
) -> Tensor | None:
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"num_items is the divisor of reduction='mean', got reduction={reduction!r}"
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}"
            )
        if num_items.dtype not in (*FLOATING, *INTEGER):
            raise TypeError(f"num_items must be a tensor of numbers, got {num_items.dtype}")
        check_detached("num_items", num_items)
        # A number of the host is copied to a GPU without waiting for what runs there.
        return num_items.reshape(()).to(device, non_blocking=True)
    check_number("num_items", num_items, 0)
    return torch.full((), num_items, dtype=accumulation_dtype(device), device=device)


def check_values(
    labels: Tensor | None,
    temperatures: dict[str, Tensor | None],
    ignore_index: int,
    vocab_size: int,
    num_items: Tensor | None = None,
) -> None:
    """What only the tensors' contents can violate."""
    if labels is not None:
        outside = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
        if outside.any():
            raise ValueError(
                f"labels must be in [0, {vocab_size}) or ignore_index={ignore_index}, "
                f"got {labels[outside][0].item()}"
            )
    for name, temperature in temperatures.items():
        if temperature is None:
            continue
        outside = ~((temperature > 0) & temperature.isfinite())
        if labels is not None:
            outside &= (labels != ignore_index).view_as(outside)
        if outside.any():
            raise ValueError(
                f"{name} must be finite and above 0 for every token, "
                f"got {temperature[outside][0].item():g}"
            )
    if num_items is not None and not ((num_items >= 0) & num_items.isfinite()):
        raise ValueError(f"num_items must be finite and at least 0, got {num_items.item():g}")


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over tokens, and of what a device should take its time for."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def result_dtype(student: Tensor) -> torch.dtype:
    """The dtype of a loss."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def token_share(
    reduction: str,
    num_items: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    tokens: torch.Size,
    device: torch.device,
) -> Tensor | None:
    """What each token's loss is multiplied by, 1 / N for a mean; None to keep tokens apart."""
    if reduction == "none":
        return None
    real = accumulation_dtype(device)
    if reduction == "sum":
        return torch.ones((), dtype=real, device=device)
    if num_items is None and labels is None:
        # Filled in: for a copy of a number from the host a GPU would be waited for.
        return torch.full((), 1 / max(1, tokens.numel()), dtype=real, device=device)
    if num_items is None:
        divisor = (labels != ignore_index).sum(dtype=real)
    else:
        divisor = num_items.to(real)
    # Without a counted token every term is an exact 0, which 0 / 0 must not spoil.
    return torch.where(divisor > 0, 1 / divisor, 0.0)


def gradient_scale(share: Tensor | None, incoming: Tensor | None) -> Tensor | None:
    """share · incoming, 0-d or one per token `[tokens]`; a factor that is None is 1."""
    if incoming is None:
        return share
    incoming = incoming.to(accumulation_dtype(incoming.device))
    if incoming.dim() > 0:
        incoming = incoming.flatten()
    return incoming if share is None else incoming * share


def reduce(
    losses: Tensor, share: Tensor | None, tokens: torch.Size, need_parts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, soft and hard from `[3, tokens]`; without `need_parts` the last two are empty."""

    def reduced(per_token: Tensor) -> Tensor:
        if share is None:
            return per_token.reshape(tokens).clone()
        return (per_token.sum(dtype=share.dtype) * share).to(per_token.dtype)

    if need_parts:
        return reduced(losses[0]), reduced(losses[1]), reduced(losses[2])
    return reduced(losses[0]), losses.new_empty(0), losses.new_empty(0)


def reduced_like(student: Tensor, shape: tuple, need_parts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors as `reduce` returns them, for tracing."""
    return tuple(
        student.new_empty(shape if kept else (0,), dtype=result_dtype(student))
        for kept in (True, need_parts, need_parts)
    )
