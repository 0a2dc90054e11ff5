"""The output head becomes the loss: hidden states go in, and no logits come out.

A model's last linear layer sees the hidden states of every token, and its weight is whole while it
runs, whatever wraps the model. So its forward is where a loss of hidden states belongs: for one
forward pass of the model it is replaced, and returns logits of width 0, which the rest of the
model's forward hands on.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdfast.ops.arguments import FLOATING
from kdfast.ops.head import (
    Head,
    chunk_budget,
    chunks_of,
    largest,
    logits_buffer,
    product_dtype,
    rows_within,
    wide_dtype,
)
from kdfast.ops.truncated_softmax import TruncatedSoftmax
from kdfast.trainer.features import inner_model

# The entries of a model's configuration that say what it does with the head's outputs: it
# multiplies by (Cohere, Falcon-H1) or divides by (Granite) the first, and caps at the second (the
# Gemmas, xLSTM). What is read here is only a guess, which the model's own forward has to confirm.
SCALE_NAMES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# What a head returns while its model is asked what becomes of logits: few rows, because all of
# their columns matter, and values to both sides of every softcap.
PROBE_TOKENS = 8
PROBE_LIMIT = 100.0


Result = TypeVar("Result")

# The label of tokens that do not count.
IGNORE_INDEX = -100


class UnknownHead(Exception):
    """Why a model's logits cannot be had from the inputs of its head: what the model is or does."""


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits: softcap(logit_scale · linear(hidden)).

    Args:
        linear: the model's output embeddings.
        logit_scale: what the model multiplies the outputs of `linear` by.
        softcap: c, where the model maps x to c · tanh(x / c) after that.
        parts: `linear`, or the modules that are there for logits alone, as the dense layer and the
            norm that a masked language model has in front of it.
    """

    linear: nn.Linear
    logit_scale: float
    softcap: float | None
    parts: tuple[nn.Module, ...]

    def apply(self, logits: Tensor) -> Tensor:
        """What the model makes of `linear`'s outputs."""
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def keywords(self, owner: str) -> dict[str, Tensor | float | None]:
        """What the losses of hidden states call `owner`'s head, all but its weight."""
        return {
            f"{owner}_bias": self.linear.bias,
            f"{owner}_logit_scale": self.logit_scale,
            f"{owner}_softcap": self.softcap,
        }

    def skipped(self, forward: Callable[[], Result]) -> Result:
        """What `forward` returns without its head: its logits have width 0."""
        with _replaced_forwards(self.parts, _no_logits):
            return forward()

    def in_place(
        self, function: Callable[[Tensor], Result], forward: Callable[[], object]
    ) -> Result:
        """`function` of the inputs of `linear` in a run of `forward`, where `linear` would run.

        Args:
            function: of hidden states, `[batch, positions, hidden]`.

        Raises:
            RuntimeError: `forward` does not call `linear`, or calls it again.
        """
        results = []
        with _replaced_forwards((self.linear,), _once(results, function)):
            forward()
        return _only(results)

    def truncated(
        self,
        hidden: Tensor,
        labels: Tensor,
        truncate: Callable[[Tensor], TruncatedSoftmax],
        entries: int,
    ) -> TruncatedSoftmax:
        """`truncate` of the logits of `hidden`, of which no more exist at once than a chunk.

        Args:
            hidden: `[..., H]`.
            labels: `[...]`. On the CPU, tokens labelled `IGNORE_INDEX` get no entries.
            truncate: maps logits `[rows, V]` to `entries` each.
        """
        # Autocast would round what the head's products keep wide.
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        rows, weight, bias = hidden.flatten(0, -2), self.linear.weight, self.linear.bias
        dtype = product_dtype(rows, weight, autocast)
        wide, vocab = wide_dtype(dtype), len(weight)
        size = rows_within(chunk_budget(hidden.device), vocab, dtype, tensors=1)
        chunks = chunks_of(len(rows), size, labels.flatten(), IGNORE_INDEX)

        log_probs = rows.new_full((len(rows), entries), -math.inf, dtype=wide)
        indices = rows.new_full((len(rows), entries), -1, dtype=torch.int64)
        buffer = logits_buffer(largest(chunks, len(rows)), vocab, wide, hidden.device)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            head = Head(rows, weight, bias, self.logit_scale, self.softcap, dtype)
            for chunk in chunks:
                part = rows[chunk].to(dtype)
                log_probs[chunk], indices[chunk] = truncate(head.logits(part, buffer[: len(part)]))
        shape = (*hidden.shape[:-1], entries)
        return TruncatedSoftmax(log_probs.view(shape), indices.view(shape))

    def loss(
        self,
        model: nn.Module,
        forward: Callable[[], Mapping[str, Tensor] | tuple],
        loss: Callable[[Tensor], Tensor],
    ) -> Mapping[str, Tensor] | tuple:
        """What `forward` returns, with `loss` of the inputs of `linear`, computed in its place.

        The loss leaves with the outputs of `model`, as `loss` or the first of them, so that what
        wraps it (DDP looks for the parameters that were used, FSDP waits for the backward pass)
        finds it there.

        Args:
            model: what is called by its outermost wrapper, or by nobody but `forward`.
            forward: runs the wrapped model and returns its outputs.
            loss: maps `[batch, positions, hidden]` to a 0-d tensor.

        Raises:
            RuntimeError: `forward` does not call `linear`, or calls it again.
        """
        losses = []

        def attach(module: nn.Module, inputs: tuple, outputs: Mapping[str, Tensor] | tuple):
            value = _only(losses)
            if not isinstance(outputs, Mapping):
                return (value, *outputs)
            outputs["loss"] = value
            return outputs

        # First among the hooks: FSDP's are to see the loss.
        hook = model.register_forward_hook(attach, prepend=True)
        try:
            with _replaced_forwards((self.linear,), _once(losses, loss)):
                return forward()
        finally:
            hook.remove()


def find_head(
    model: nn.Module, forward: Callable[[], Tensor], *, to_skip: bool = False
) -> OutputHead:
    """The output head of `model`, and what the model does with its outputs.

    Nothing is taken on trust: runs of `forward` show what becomes of logits of width 0 and of
    logits that are known, so that the model's weights and the sizes of its logits do not matter.

    Args:
        model: a model of transformers, or one with its `get_output_embeddings`.
        forward: runs the model, under whatever wraps it, and returns its logits.
        to_skip: whether to look for what else of the model is there for its logits alone.

    Raises:
        UnknownHead: it says why.
    """
    linear = output_embeddings(model)
    if not isinstance(linear, nn.Module):
        raise UnknownHead("has no output head")
    # A subclass may be quantised or adapted, and its weight not what its forward multiplies by.
    if type(linear) is not nn.Linear:
        name = f"{type(linear).__module__}.{type(linear).__qualname__}"
        raise UnknownHead(f"has an output head of type {name} instead of nn.Linear")
    if "forward" in vars(linear):
        raise UnknownHead("has an output head whose forward was replaced")

    hidden = []

    def look(seen: Tensor) -> Tensor:
        if linear.weight.dtype not in FLOATING or linear.weight.device != seen.device:
            raise UnknownHead(
                f"has an output head of {linear.weight.dtype} on {linear.weight.device} and hidden "
                f"states on {seen.device}"
            )
        hidden.append(seen)
        return _no_logits(seen)

    logits = _logits_with((linear,), look, forward)
    if len(hidden) != 1:
        raise UnknownHead(f"calls its output head {len(hidden)} times")
    if hidden[0].dim() != 3 or logits.shape != _no_logits(hidden[0]).shape:
        raise UnknownHead(
            "does not keep its logits as its output head makes them, [batch, positions, vocab]"
        )

    rows = min(PROBE_TOKENS, hidden[0].shape[1])
    known = torch.linspace(
        -PROBE_LIMIT, PROBE_LIMIT, rows * linear.out_features, device=hidden[0].device
    ).view(1, rows, -1)
    # Copied: a model may work in place.
    logits = _logits_with((linear,), lambda _: known.clone(), forward)
    for scale, softcap in _known_processing(model):
        head = OutputHead(linear, scale, softcap, (linear,))
        if logits.shape == known.shape and torch.allclose(
            logits.float(), head.apply(known), rtol=1e-5, atol=1e-5
        ):
            return replace(head, parts=_parts(model, linear, forward)) if to_skip else head
    raise UnknownHead("changes its logits in a way that is not known")


def _parts(
    model: nn.Module, linear: nn.Linear, forward: Callable[[], Tensor]
) -> tuple[nn.Module, ...]:
    """All of the model but its core, where `forward` can do without that; `linear` otherwise."""
    core = inner_model(model)
    parts = tuple(part for part in model.children() if core not in list(part.modules()))
    holds_head = any(linear in list(part.modules()) for part in parts)
    # A forward that was replaced before is somebody's to put back.
    taken = any("forward" in vars(part) for part in parts)
    if core is model or not holds_head or taken or parts == (linear,):
        return (linear,)
    states = []

    def skip(seen: Tensor) -> Tensor:
        if not states:
            raise UnknownHead("has layers in front of its core")
        return _no_logits(seen)

    hook = core.register_forward_hook(lambda module, inputs, outputs: states.append(outputs[0]))
    try:
        logits = _logits_with(parts, skip, forward)
    except UnknownHead:
        # Or one of them has other arguments or outputs, as a head of several tasks has.
        return (linear,)
    finally:
        hook.remove()
    ends_there = len(states) == 1 and logits.shape == _no_logits(states[0]).shape
    return parts if ends_there else (linear,)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits, where the model names one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def is_compiled(model: nn.Module, head: nn.Module) -> bool:
    """Whether `head` is called by compiled code of `model`.

    That is a copy, which need not see that the head's forward was replaced.
    """
    return any(
        (hasattr(module, "_orig_mod") or module._compiled_call_impl is not None)
        and any(inner is head for inner in module.modules())
        for module in model.modules()
    )


def _known_processing(model: nn.Module) -> Iterator[tuple[float, float | None]]:
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def positive(names: tuple[str, ...]) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, int | float) and v > 0]

    scales = [scale for value in positive(SCALE_NAMES) for scale in (value, 1 / value)]
    yield from product((1.0, *scales), (None, *positive(SOFTCAP_NAMES)))


def _logits_with(
    parts: tuple[nn.Module, ...],
    replacement: Callable[[Tensor], Tensor],
    forward: Callable[[], Tensor],
) -> Tensor:
    try:
        with _replaced_forwards(parts, replacement):
            return forward()
    except UnknownHead:
        raise
    except Exception as error:
        # Whatever a model does with its logits, it may fail on these: it runs on its own then, and
        # an error that is not due to them comes again.
        reason = str(error).partition("\n")[0]
        raise UnknownHead(f"fails without its logits ({reason})") from error


@contextmanager
def _replaced_forwards(
    parts: tuple[nn.Module, ...], replacement: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Calls of each of `parts` run `replacement`, between the hooks that it has."""
    for part in parts:
        part.forward = replacement
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _once(results: list[Result], function: Callable[[Tensor], Result]) -> Callable:
    """A forward that keeps `function` of its input and returns logits of width 0."""

    def forward(hidden: Tensor) -> Tensor:
        if results:
            raise RuntimeError(
                "the model calls its output head again, which it did not do when it was tried; "
                "pass fuse_head=False"
            )
        results.append(function(hidden))
        return _no_logits(hidden)

    return forward


def _only(results: list[Result]) -> Result:
    if not results:
        raise RuntimeError(
            "the model does not call its output head, which it did when it was tried; "
            "pass fuse_head=False"
        )
    return results[0]


def _no_logits(hidden: Tensor) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], 0))
