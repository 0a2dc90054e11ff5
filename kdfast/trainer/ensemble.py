"""Several teachers as one: the mean of their probabilities."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdfast.ops.arguments import check_count, check_number
from kdfast.trainer.features import without_adapter
from kdfast.trainer.head import output_embeddings
from kdfast.trainer.outputs import logits_of

# A teacher, or what makes one.
Member = nn.Module | Callable[[], nn.Module]

# What of a member's logits is turned into probabilities at a time.
CHUNK_BYTES = 16 << 20


class Ensemble(nn.Module):
    """A teacher whose distribution is Σ w_i · softmax(z_i / T) over its members' logits z_i.

    Hinton, Vinyals and Dean 2015, section 1. Its logits are T · log of that, so that every loss of
    logits at temperature T sees the mean, plus Σ w_i · T · log Σ exp(z_i / T) in every column,
    which no softmax sees. So one member's logits are its own, and those of a regression are the
    members' mean. `DistillationTrainer` sets T to its objective's.

    Members may differ in everything but the meaning of their columns. Each gets the inputs that its
    forward names.

    Args:
        members: the teachers. A callable is called when its turn comes in each forward pass, and
            what it made is let go of afterwards: of callables alone, one teacher is in memory at a
            time. It is also called once now, to see the inputs of what it makes. The random numbers
            that it draws are drawn for it alone: what trains sees the same ones as without it.
        weights: of the members, above 0; they are divided by their sum. None takes the mean.
        vocab_size: the columns that exist, where members have others behind them as padding.
        offload: leave the members on the CPU, and move each to the inputs' device for its turn: one
            teacher is on the device at a time.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> teacher = Ensemble([base, large], weights=[1, 2])
        >>> DistillationTrainer(student, arguments, teacher=teacher, train_dataset=blocks)
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        weights: Sequence[float] | None = None,
        vocab_size: int | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        members = list(members)
        if not members:
            raise ValueError("members must hold a teacher, got none")
        for member in members:
            if not callable(member):
                raise TypeError(f"members must be models or callables, got {type(member).__name__}")
            if isinstance(member, Ensemble):
                raise ValueError("members must not be ensembles: give theirs, with weights")
        weights = [1.0] * len(members) if weights is None else list(weights)
        if len(weights) != len(members):
            raise ValueError(
                f"weights must have one for each of {len(members)} members, got {len(weights)}"
            )
        for weight in weights:
            check_number("weights", weight, 0, open_low=True)
        if vocab_size is not None:
            check_count("vocab_size", vocab_size)
        self.vocab_size = vocab_size
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.offload = offload
        self.temperature = 1.0
        self.members = members
        models = [member for member in members if isinstance(member, nn.Module)]
        for model in models:
            model.eval().requires_grad_(False)
        # As submodules they move with the ensemble, which the others must not.
        self.models = nn.ModuleList([] if offload else models)
        self.input_names: set[str] = set()
        self.decodes = False
        for member in members:
            with self._present(member, None) as model:
                self.input_names |= forward_names(model)
                self.decodes |= decodes(model)
            # The next one is made without it.
            del model

    def forward(self, **inputs: object) -> dict[str, Tensor]:
        """The ensemble's logits, `{"logits": [..., C]}`; every member takes what it names."""
        mean = level = None
        for member, weight in zip(self.members, self.weights, strict=True):
            logits = self._logits(member, inputs)
            if mean is None:
                # As wide as the losses take them.
                wide = torch.promote_types(logits.dtype, torch.float32)
                mean = logits.new_full(logits.shape, -math.inf, dtype=wide)
                level = logits.new_zeros((*logits.shape[:-1], 1), dtype=wide)
            elif logits.shape != mean.shape:
                raise ValueError(
                    f"members must have logits of one shape, got {tuple(mean.shape)} and "
                    f"{tuple(logits.shape)}: of vocabularies with padding, pass vocab_size"
                )
            self._add(mean, level, logits, weight)
        return {"logits": mean.add_(level).mul_(self.temperature)}

    def _logits(self, member: Member, inputs: dict[str, object]) -> Tensor:
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        with self._present(member, device) as model:
            names = forward_names(model)
            taken = {name: value for name, value in inputs.items() if name in names}
            if "use_cache" in names:
                taken["use_cache"] = False
            return logits_of(model(**taken))[..., : self.vocab_size]

    @contextmanager
    def _present(self, member: Member, device: torch.device | None) -> Iterator[nn.Module]:
        """A member as a model for its turn; on `device`, where it does not move with the rest."""
        if not isinstance(member, nn.Module):
            devices = [device] if device is not None and device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                model = member()
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"a member that is a callable must make a model, got {type(model).__name__}"
                )
            yield model.eval().to(device)
        elif self.offload and device is not None:
            home = next(member.parameters()).device
            try:
                yield member.to(device)
            finally:
                member.to(home)
        else:
            yield member

    def _add(self, mean: Tensor, level: Tensor, logits: Tensor, weight: float) -> None:
        """log(e^mean + weight · softmax(logits / T)) and its level, in place, a few rows a time."""
        mean, level, logits = mean.flatten(0, -2), level.flatten(0, -2), logits.flatten(0, -2)
        rows = max(1, CHUNK_BYTES // (mean.shape[-1] * mean.element_size()))
        parts = zip(mean.split(rows), level.split(rows), logits.split(rows), strict=True)
        for part, part_level, chunk in parts:
            scaled = chunk.to(mean.dtype) / self.temperature
            lse = scaled.logsumexp(-1, keepdim=True)
            part_level.add_(lse, alpha=weight)
            torch.logaddexp(part, scaled.sub_(lse).add_(math.log(weight)), out=part)


def forward_names(model: nn.Module) -> set[str]:
    """The arguments that a model's forward names."""
    if isinstance(model, Ensemble):
        return model.input_names
    return set(inspect.signature(without_adapter(model).forward).parameters)


def decodes(model: nn.Module) -> bool:
    """Whether a model is an encoder and a decoder, whose logits are of the decoder's tokens."""
    if isinstance(model, Ensemble):
        return model.decodes
    language_model = output_embeddings(without_adapter(model)) is not None
    return language_model and "decoder_input_ids" in forward_names(model)
