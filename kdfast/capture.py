"""Queries and keys out of Hugging Face models, as their attention sees them.

transformers hands attention to a function that `AttentionInterface.get_interface` looks up at every
call: SDPA, flash attention, flex attention, or the eager code of the model's own file. While a
capture is open, what that look-up returns takes note of queries and keys before it runs. Nothing
else changes: no configuration and no name of an implementation, after which transformers chooses
the masks, so that outputs are the same to the bit.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.ops.arguments import values_are_checked

# What a model passes to its attention function that makes scores of more than queries and keys.
SCORE_KEYWORDS = {
    "position_bias": "a relative position bias",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "a softcap",
}

# Additive masks hold 0 where a key is seen. Where it is not, this or less: -inf, the dtype's lowest
# number, or the -10000 of old models.
MASKED_SCORE = -1e4

# The captures that are open, in all threads. Replaced as a whole: it is read without the lock.
_open: tuple["_Capture", ...] = ()
_lock = threading.Lock()
_original_lookup: Callable | None = None


class AttentionInputs(NamedTuple):
    """What an attention layer computes its scores from: softmax(scale · query keyᵀ + mask).

    Attributes:
        query: `[B, H, S, d]`, after rotary embedding and normalisation.
        key: `[B, H_kv, S, d]`, likewise, H a multiple of H_kv (grouped queries).
        scale: what the model multiplies query · key by.
        causal: whether a query sees no key behind it. Padding and windows are in the batch's mask.
    """

    query: Tensor
    key: Tensor
    scale: float
    causal: bool


@contextmanager
def capture_attention(
    model: nn.Module,
    layers: Sequence[int | str] | None = None,
    *,
    allow_partial_scores: bool = False,
) -> Iterator[dict[str, AttentionInputs]]:
    """Records the queries and keys of a model's attention layers while it runs.

    The model must come from transformers (5.0 or newer) or route its attention through the same
    `AttentionInterface`. Its outputs are the same to the bit, under SDPA, flash and eager attention
    alike, and gradients flow through what is recorded into the model's projections.

    Args:
        model: the model, or the part of it that is called. Only its own layers are recorded, and
            only in the thread that opened the capture: captures may be nested, and several models
            captured at once.
        layers: which attention layers, by number in the order of `model.named_modules()` (negative
            from the end) or by module name. None takes all of them.
        allow_partial_scores: record layers whose scores are more than scaled products of queries
            and keys: a softcap, attention sinks, a relative position bias. What is recorded is then
            only a part of the score.

    Yields:
        A dict from module name to `AttentionInputs`, in the order in which the layers run. It is
        filled anew by every forward pass of the model. A layer that runs more than once in one pass
        is recorded the first time, and nothing is recorded during a backward pass, where
        checkpointing runs layers again.

    Raises:
        ImportError: there is no transformers, or an older one.
        TypeError: the model is no module, or `layers` no sequence of numbers and names.
        ValueError: no attention layer of the model goes through the interface, or `layers` names
            one that does not exist.
        RuntimeError: while the model runs, if a layer computes attention by itself, if its scores
            are partial, or if a query has no gradient although the model trains, as under
            re-entrant checkpointing; at the end, if nothing was recorded, as of a model that runs
            compiled.

    Example:
        >>> with kdfast.capture_attention(student, layers=[1, 3]) as records:
        ...     student(**batch)
        >>> query, key, scale, causal = records["bert.encoder.layer.1.attention.self"]
    """
    interface = _interface()
    capture = _Capture(model, layers, interface, allow_partial_scores)
    with ExitStack() as stack:
        stack.enter_context(_opened(capture, interface))
        for hook in capture.hooks():
            stack.callback(hook.remove)
        yield capture.records
    if capture.watched and not capture.reached:
        raise RuntimeError(
            f"no attention layer of {type(model).__name__} ran while it was captured: call the "
            "model inside the block, in the same thread, and not as code that torch.compile has "
            "made of it"
        )


def attention_layers(model: nn.Module) -> list[str]:
    """The names of the modules that `capture_attention` numbers, in their order.

    Raises:
        ImportError, TypeError, ValueError: as of `capture_attention`.

    Example:
        >>> attention_layers(bert)[0]
        'bert.encoder.layer.0.attention.self'
    """
    return list(_attention_modules(model, _interface()))


def _attention_modules(model: nn.Module, interface: type) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {
        name: module for name, module in model.named_modules() if _looks_up(type(module), interface)
    }
    if not found:
        raise ValueError(_no_interface(model))
    return found


def _interface() -> type:
    """The class of transformers that models look their attention function up in."""
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise ImportError(
            "capture_attention needs transformers 5.0 or newer: pip install kdfast[trainer]"
        ) from error
    if not hasattr(AttentionInterface, "get_interface"):
        from transformers import __version__

        raise ImportError(
            f"capture_attention needs transformers 5.0 or newer, got {__version__}: "
            "pip install kdfast[trainer]"
        )
    return AttentionInterface


@contextmanager
def _opened(capture: "_Capture", interface: type) -> Iterator[None]:
    """`capture` among the open ones; the first replaces the look-up, the last restores it."""
    global _open, _original_lookup
    with _lock:
        if not _open:
            _original_lookup = interface.get_interface
            interface.get_interface = _recording(_original_lookup)
        _open = (*_open, capture)
    try:
        yield
    finally:
        with _lock:
            _open = tuple(other for other in _open if other is not capture)
            if not _open:
                interface.get_interface, _original_lookup = _original_lookup, None


def _recording(lookup: Callable) -> Callable:
    """A look-up of attention functions that let the open captures see what they are called with."""

    def get_interface(self: Any, attn_implementation: str, default: Callable) -> Callable:
        attention = lookup(self, attn_implementation, default)

        def recorded(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any):
            for capture in _open:
                capture.record(module, query, key, args, kwargs)
            return attention(module, query, key, *args, **kwargs)

        return recorded

    return get_interface


class _Capture:
    """The layers that are watched, and what has been seen of them."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int | str] | None,
        interface: type,
        allow_partial_scores: bool,
    ) -> None:
        found = _attention_modules(model, interface)
        self.model = model
        self.watched = {found[name]: name for name in _chosen(layers, list(found), model)}
        self.allow_partial_scores = allow_partial_scores
        self.records: dict[str, AttentionInputs] = {}
        self.thread = threading.get_ident()
        # Whether a watched layer ever ran where it could be seen.
        self.reached = False
        # Whether a forward pass of the model is running, and whether it began with gradients on.
        self.running, self.differentiable = False, torch.is_grad_enabled()

    def hooks(self) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(self._begin)
        yield self.model.register_forward_hook(self._end, always_call=True)
        for module in self.watched:
            yield module.register_forward_hook(self._check_recorded)

    def _concerned(self) -> bool:
        # What runs in a backward pass is a repetition, under checkpointing.
        return threading.get_ident() == self.thread and torch._C._current_graph_task_id() == -1

    def _begin(self, *_: Any) -> None:
        if self._concerned():
            self.records.clear()
            self.running, self.differentiable = True, torch.is_grad_enabled()

    def _end(self, *_: Any) -> None:
        if self._concerned():
            self.running = False

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        name = self.watched.get(module)
        if name is None or not self._concerned():
            return
        self.reached = True
        if self.running and name in self.records:
            return
        if not self.allow_partial_scores and (parts := _other_parts(args, kwargs)):
            raise RuntimeError(
                f"{name} ({type(module).__name__}) adds {' and '.join(parts)} to its scores, so "
                "that queries and keys are only a part of them: pass allow_partial_scores=True to "
                "record that part, or other layers"
            )
        if self.model.training and self.differentiable and not query.requires_grad:
            raise RuntimeError(self._no_gradient(name))
        scale, causal = kwargs.get("scaling"), kwargs.get("is_causal")
        self.records[name] = AttentionInputs(
            query,
            key,
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            # The attention functions of transformers read the module where they are not told.
            bool(getattr(module, "is_causal", True) if causal is None else causal),
        )

    def _no_gradient(self, name: str) -> str:
        if not torch.is_grad_enabled():
            return (
                f"the query of {name} does not require grad although the model trains: re-entrant "
                "checkpointing runs it without gradients, and a loss of its attention would have "
                'none. Use the non-reentrant kind, {"use_reentrant": False} among '
                "activation_checkpointing_kwargs, which older transformers call "
                "gradient_checkpointing_kwargs"
            )
        return (
            f"the query of {name} does not require grad although the model trains: nothing in front"
            " of it does. Pass other layers if these are frozen; if the model is a teacher, call "
            "model.eval(), or run it under torch.no_grad()"
        )

    def _check_recorded(self, module: nn.Module, *_: Any) -> None:
        name = self.watched[module]
        if self._concerned() and name not in self.records:
            self.reached = True
            raise RuntimeError(
                f"{name} ({type(module).__name__}) did not route its attention through "
                "transformers' AttentionInterface in this call: set another attn_implementation, "
                "or pass other layers"
            )


# A trainer asks of every module at every step, and the answer is in the class's code.
@functools.cache
def _looks_up(cls: type, interface: type) -> bool:
    """Whether a method of a module class calls `get_interface` of a global `interface`."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method in vars(base).values():
            function = inspect.unwrap(method) if callable(method) else None
            if not isinstance(function, types.FunctionType):
                continue
            names = function.__code__.co_names
            if "get_interface" in names and any(
                isinstance(function.__globals__.get(name), interface) for name in names
            ):
                return True
    return False


def _no_interface(model: nn.Module) -> str:
    names = sorted({type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__})
    own = f" ({', '.join(names)})" if names else ""
    return (
        f"{type(model).__name__} does not route its attention{own} through transformers' "
        "AttentionInterface, where queries and keys could be recorded. Use a model that does, or "
        "take queries and keys out of the model's own code and pass them to kdfast.attention_mse"
    )


def _chosen(layers: Sequence[int | str] | None, names: list[str], model: nn.Module) -> list[str]:
    """The names of the layers that are asked for."""
    if layers is None:
        return names
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(
            f"layers must be a sequence of numbers and module names, got {type(layers).__name__}"
        )
    chosen = []
    for layer in layers:
        if isinstance(layer, str):
            if layer not in names:
                raise ValueError(
                    f"layers names {layer!r}, which is no attention layer of "
                    f"{type(model).__name__} that could be recorded: it has {', '.join(names)}"
                )
            chosen.append(layer)
        elif isinstance(layer, int) and not isinstance(layer, bool):
            if not -len(names) <= layer < len(names):
                raise ValueError(
                    f"layers must be in [{-len(names)}, {len(names)}) for the {len(names)} "
                    f"attention layers of {type(model).__name__}, got {layer}"
                )
            chosen.append(names[layer])
        else:
            raise TypeError(f"layers must be numbers and module names, got {layer!r}")
    return chosen


def _other_parts(args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """What a layer's scores are made of besides queries and keys."""
    parts = {what for name, what in SCORE_KEYWORDS.items() if kwargs.get(name) is not None}
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if (
        isinstance(mask, Tensor)
        and mask.is_floating_point()
        and values_are_checked(mask.device)
        and ((mask != 0) & (mask > MASKED_SCORE)).any()
    ):
        parts.add("a bias in its mask")
    return sorted(parts)
