"""Several teachers as one: the mean of their probabilities."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdfast.ops.arguments import check_count, check_number
from kdfast.trainer.features import without_adapter
from kdfast.trainer.outputs import logits_of

# A teacher, or what makes one.
Member = nn.Module | Callable[[], nn.Module]

# What of a member's logits is turned into probabilities at a time.
CHUNK_BYTES = 16 << 20


class Ensemble(nn.Module):
    """A teacher whose distribution is Σ w_i · softmax(z_i / T) over its members' logits z_i.

    Hinton, Vinyals and Dean 2015, section 3. Its logits are T · log of that, so that every loss of
    logits at temperature T sees the mean. `DistillationTrainer` sets T to its objective's.

    Members may differ in everything but the meaning of their columns. Each gets the inputs that its
    forward names.

    Args:
        members: the teachers. A callable is called when its turn comes in each forward pass, and
            what it made is let go of afterwards: of callables alone, one teacher is in memory at a
            time.
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
        if not members:
            raise ValueError("members must hold a teacher, got none")
        for member in members:
            if not callable(member):
                raise TypeError(f"members must be models or callables, got {type(member).__name__}")
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
        self._members = list(members)
        models = [member for member in members if isinstance(member, nn.Module)]
        for model in models:
            model.eval().requires_grad_(False)
        # As submodules they move with the ensemble, which the others must not.
        self.models = nn.ModuleList([] if offload else models)
        self.input_names = set().union(*map(forward_names, models))

    def forward(self, **inputs: object) -> dict[str, Tensor]:
        """The ensemble's logits, `{"logits": [..., C]}`; every member takes what it names."""
        mean = None
        for member, weight in zip(self._members, self.weights, strict=True):
            logits = self._logits(member, inputs)
            if mean is None:
                # As wide as the losses take them.
                wide = torch.promote_types(logits.dtype, torch.float32)
                mean = logits.new_full(logits.shape, -math.inf, dtype=wide)
            elif logits.shape != mean.shape:
                raise ValueError(
                    f"members must have logits of one shape, got {tuple(mean.shape)} and "
                    f"{tuple(logits.shape)}: of vocabularies with padding, pass vocab_size"
                )
            self._add(mean, logits, weight)
        return {"logits": mean.mul_(self.temperature)}

    def _logits(self, member: Member, inputs: dict[str, object]) -> Tensor:
        with self._present(member, inputs) as model:
            names = forward_names(model)
            taken = {name: value for name, value in inputs.items() if name in names}
            if "use_cache" in names:
                taken["use_cache"] = False
            return logits_of(model(**taken))[..., : self.vocab_size]

    @contextmanager
    def _present(self, member: Member, inputs: dict[str, object]) -> Iterator[nn.Module]:
        """A member as a frozen model on the inputs' device, for its turn."""
        model = member if isinstance(member, nn.Module) else member().eval()
        if not self.offload and model is member:
            yield model
            return
        home = next(model.parameters()).device
        try:
            yield model.to(next(v.device for v in inputs.values() if isinstance(v, Tensor)))
        finally:
            if model is member:
                model.to(home)

    def _add(self, mean: Tensor, logits: Tensor, weight: float) -> None:
        """log(e^mean + weight · softmax(logits / T)), in place, some rows at a time."""
        mean, logits = mean.flatten(0, -2), logits.flatten(0, -2)
        rows = max(1, CHUNK_BYTES // (mean.shape[-1] * mean.element_size()))
        for part, chunk in zip(mean.split(rows), logits.split(rows), strict=True):
            log_probs = torch.log_softmax(chunk.to(mean.dtype) / self.temperature, -1)
            torch.logaddexp(part, log_probs.add_(math.log(weight)), out=part)


def forward_names(model: nn.Module) -> set[str]:
    """The arguments that a model's forward names."""
    if isinstance(model, Ensemble):
        return model.input_names
    return set(inspect.signature(without_adapter(model).forward).parameters)
