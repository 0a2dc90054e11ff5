"""What a student is trained towards: a weighted list of terms."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from kdfast.ops.arguments import check_choice, check_number
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.reference import DIVERGENCES


@dataclass(frozen=True)
class Logits:
    """The teacher's distribution over tokens or classes; the keywords are those of `kd_loss`.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.
    """

    weight: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    scale_t2: bool = True
    teacher_temperature: float | None = None

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_number("beta", self.beta, 0, 1)
        if self.teacher_temperature is not None:
            check_number("teacher_temperature", self.teacher_temperature, 0, open_low=True)


@dataclass(frozen=True)
class HardLabels:
    """Cross entropy with the labels, always at temperature 1.

    Raises:
        TypeError, ValueError: `weight` is not a number, or below 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)


Term = Logits | HardLabels


@dataclass(frozen=True)
class Objective:
    """Σ weight · term, over at most one term of each kind.

    Args:
        terms: the terms, one of them `Logits`.

    Raises:
        TypeError: something in `terms` is not a term.
        ValueError: a kind of term is missing, comes twice, or no term has a weight above 0.

    Example:
        >>> objective = Objective([Logits(0.9, temperature=4.0), HardLabels(0.1)])
    """

    terms: Iterable[Term]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        kinds = [type(term) for term in self.terms]
        for kind in kinds:
            if kind not in (Logits, HardLabels):
                raise TypeError(f"terms must be Logits or HardLabels, got {kind.__name__}")
            if kinds.count(kind) > 1:
                raise ValueError(
                    f"terms must hold at most one {kind.__name__}, got {kinds.count(kind)}"
                )
        if Logits not in kinds:
            raise ValueError("terms must hold Logits: without it nothing comes from the teacher")
        if not any(term.weight > 0 for term in self.terms):
            raise ValueError("terms must hold one of a weight above 0")

    @property
    def needs_labels(self) -> bool:
        """Whether a batch without labels is an error."""
        return self._term(HardLabels) is not None

    def _term(self, kind: type[Term]) -> Term | None:
        return next((term for term in self.terms if isinstance(term, kind)), None)

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
        vocab_size: int | None = None,
        overwrite_student_logits: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and the terms it is made of.

        Args:
            student_logits: `[..., V_s]`, floating. Gradients flow here.
            teacher_logits: `[..., V_t]`.
            labels: `[...]`, integers, −100 where nothing counts.
            num_items: the divisor, as in `kdfast.kd_loss`; None takes the number of counted
                positions.
            vocab_size: the columns that exist on both sides, as in `kdfast.kd_loss`.
            overwrite_student_logits: as in `kdfast.kd_loss`.

        Returns:
            `(total, terms)`: 0-d, and a dict of detached 0-d tensors. `soft_loss` is the divergence
            without its weight and without T²; `hard_loss` is the cross entropy without its weight,
            absent without labels.
        """
        parts = kd_loss(
            student_logits,
            teacher_logits,
            labels,
            vocab_size=vocab_size,
            num_items=num_items,
            overwrite_student_logits=overwrite_student_logits,
            **self._keywords(),
        )
        return self._weighted(parts, labels)

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
        vocab_size: int | None = None,
        **heads: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of logits that never exist, as in `kdfast.linear_kd_loss`.

        Args:
            student_hidden, student_weight: `[..., H_s]` and `[V_s, H_s]`. Gradients flow here, and
                to `student_bias`.
            teacher_hidden, teacher_weight: `[..., H_t]` and `[V_t, H_t]`.
            labels, num_items: as for a call.
            vocab_size: the rows of the weights that exist on both sides.
            **heads: `student_bias`, `student_logit_scale`, `student_softcap`, and the teacher's.

        Returns:
            `(total, terms)`, as of a call.
        """
        parts = linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            vocab_size=vocab_size,
            num_items=num_items,
            **heads,
            **self._keywords(),
        )
        return self._weighted(parts, labels)

    @property
    def _weight(self) -> float:
        return sum(term.weight for term in self.terms)

    def _keywords(self) -> dict[str, object]:
        soft = self._term(Logits)
        return {
            "divergence": soft.divergence,
            "beta": soft.beta,
            "temperature": soft.temperature,
            "teacher_temperature": soft.teacher_temperature,
            "scale_t2": soft.scale_t2,
            # One sweep serves both terms: it takes weights that sum to 1.
            "alpha": soft.weight / self._weight,
            "return_parts": True,
        }

    def _weighted(
        self, parts: tuple[Tensor, Tensor, Tensor], labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, soft_loss, hard_loss = parts
        terms = {"soft_loss": soft_loss}
        if labels is not None:
            terms["hard_loss"] = hard_loss
        return self._weight * total, terms
