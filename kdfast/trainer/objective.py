"""What a student is trained towards: a weighted list of terms."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType

from torch import Tensor

from kdfast.ops.arguments import (
    check_choice,
    check_count,
    check_number,
    checked_vocab_size,
)
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.ops.linear_topk_kd_loss import linear_topk_kd_loss
from kdfast.ops.sampled_softmax import sampled_softmax
from kdfast.ops.topk_kd_loss import topk_kd_loss
from kdfast.ops.truncated_softmax import TruncatedSoftmax, truncated_softmax
from kdfast.reference import DIVERGENCES, TAIL_DIVERGENCES, TAILS
from kdfast.trainer.features import (
    AttentionMSE,
    EmbeddingMSE,
    FeatureTerm,
    HiddenCosine,
    HiddenMSE,
)


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
class TruncatedLogits:
    """A few entries of the teacher's distribution; the keywords are those of `topk_kd_loss`.

    Of a teacher at hand they are the `k` largest, or a random sample. A teacher cache has made that
    choice when it was built, and the settings have to fit it.

    Args:
        k: how many entries of each token to keep, without `draws`.
        tail: what becomes of the rest, as in `kdfast.topk_kd_loss`.
        temperature: of student and teacher.
        draws: sample the teacher with `kdfast.sampled_softmax` instead, this many times per token.
            It needs `tail="none"`.
        proposal_temperature: of the sampling. None takes `temperature`.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> objective = Objective([TruncatedLogits(0.9, k=32, temperature=2.0), HardLabels(0.1)])
    """

    weight: float = 1.0
    k: int = 64
    tail: str = "bucket"
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    scale_t2: bool = True
    draws: int | None = None
    proposal_temperature: float | None = None

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)
        check_count("k", self.k)
        check_choice("tail", self.tail, TAILS)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_number("beta", self.beta, 0, 1)
        if self.divergence not in TAIL_DIVERGENCES[self.tail]:
            raise ValueError(
                f"divergence must be one of {TAIL_DIVERGENCES[self.tail]} with tail={self.tail!r}, "
                f"got {self.divergence!r}"
            )
        if self.draws is not None:
            check_count("draws", self.draws)
            if self.tail != "none":
                raise ValueError(f"tail must be 'none' with draws, got {self.tail!r}")
        if self.proposal_temperature is not None:
            check_number("proposal_temperature", self.proposal_temperature, 0, open_low=True)
            if self.draws is None:
                raise ValueError("proposal_temperature needs draws: the k largest are not drawn")

    @property
    def entries(self) -> int:
        """How many entries of each token there are room for."""
        return self.k if self.draws is None else self.draws

    def truncate(self, logits: Tensor, vocab_size: int | None = None) -> TruncatedSoftmax:
        """The entries of a teacher's logits `[..., V]`, each `[..., entries]`.

        Args:
            vocab_size: the columns that exist; None takes all.

        Raises:
            TypeError, ValueError: as of `kdfast.truncated_softmax` and `kdfast.sampled_softmax`.

        Example:
            >>> top = TruncatedLogits(k=32).truncate(teacher(batch).logits.detach())
        """
        if self.draws is None:
            return truncated_softmax(
                logits, self.k, temperature=self.temperature, vocab_size=vocab_size
            )
        return sampled_softmax(
            logits[..., :vocab_size],
            self.draws,
            temperature=self.temperature,
            proposal_temperature=(
                self.temperature if self.proposal_temperature is None else self.proposal_temperature
            ),
        )


@dataclass(frozen=True)
class HardLabels:
    """Cross entropy with the labels, always at temperature 1.

    Raises:
        TypeError, ValueError: `weight` is not a number, or below 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)


FEATURES = (AttentionMSE, HiddenMSE, EmbeddingMSE, HiddenCosine)
KINDS = (Logits, TruncatedLogits, HardLabels, *FEATURES)
Term = Logits | TruncatedLogits | HardLabels | FeatureTerm


@dataclass(frozen=True)
class Objective:
    """Σ weight · term, over at most one term of each kind.

    A call takes the terms of the models' outputs, which are `Logits` or `TruncatedLogits` and
    `HardLabels`. Those of their inside are `features`.

    Args:
        terms: the terms, one of them not `HardLabels`.

    Raises:
        TypeError: something in `terms` is not a term.
        ValueError: nothing comes from the teacher, a kind of term comes twice, or no term has a
            weight above 0.

    Example:
        >>> objective = Objective([Logits(0.9, temperature=4.0), HardLabels(0.1)])
        >>> objective = Objective([AttentionMSE(), HiddenMSE(), EmbeddingMSE()])
    """

    terms: Iterable[Term]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        kinds = [type(term) for term in self.terms]
        for kind in kinds:
            if kind not in KINDS:
                names = ", ".join(known.__name__ for known in KINDS)
                raise TypeError(f"terms must be of {names}, got {kind.__name__}")
            if kinds.count(kind) > 1:
                raise ValueError(
                    f"terms must hold at most one {kind.__name__}, got {kinds.count(kind)}"
                )
        if not set(kinds) - {HardLabels}:
            raise ValueError(
                "terms must hold one of the teacher's, Logits for example: without it nothing "
                "comes from the teacher"
            )
        if {Logits, TruncatedLogits} <= set(kinds):
            raise ValueError("terms must hold one of Logits and TruncatedLogits, got both")
        if not any(term.weight > 0 for term in self.terms):
            raise ValueError("terms must hold one of a weight above 0")

    @property
    def needs_labels(self) -> bool:
        """Whether a batch without labels is an error."""
        return self.hard is not None

    @property
    def soft(self) -> Logits | TruncatedLogits | None:
        """The term of the teacher's outputs, if there is one."""
        return self._term(Logits | TruncatedLogits)

    @property
    def hard(self) -> HardLabels | None:
        """The term of the labels, if there is one."""
        return self._term(HardLabels)

    @property
    def of_tokens(self) -> bool:
        """Whether there are terms of the models' outputs."""
        return self.soft is not None or self.hard is not None

    @property
    def features(self) -> tuple[FeatureTerm, ...]:
        """The terms of the models' inside."""
        return tuple(term for term in self.terms if isinstance(term, FEATURES))

    def _term(self, kind: type[Term] | UnionType) -> Term | None:
        return next((term for term in self.terms if isinstance(term, kind)), None)

    def __call__(
        self,
        student_logits: Tensor,
        teacher: Tensor | TruncatedSoftmax,
        labels: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
        vocab_size: int | None = None,
        overwrite_student_logits: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and the terms it is made of.

        Args:
            student_logits: `[..., V_s]`, floating. Gradients flow here.
            teacher: its logits `[..., V_t]`; for `TruncatedLogits` also what is left of them,
                `[..., k]`.
            labels: `[...]`, integers, −100 where nothing counts.
            num_items: the divisor, as in `kdfast.kd_loss`; None takes the number of counted
                positions.
            vocab_size: the columns that exist on both sides, as in `kdfast.kd_loss`; the student's,
                for a truncated teacher.
            overwrite_student_logits: as in `kdfast.kd_loss`.

        Returns:
            `(total, terms)`: 0-d, and a dict of detached 0-d tensors. `soft_loss` is the divergence
            without its weight and without T²; `hard_loss` is the cross entropy without its weight,
            absent without labels.
        """
        loss = kd_loss
        if isinstance(self.soft, TruncatedLogits):
            loss = topk_kd_loss
            if isinstance(teacher, Tensor):
                vocab_size = checked_vocab_size(
                    vocab_size,
                    student_logits.shape[-1],
                    teacher.shape[-1],
                    ("student_logits", "teacher"),
                    "columns",
                )
                teacher = self.soft.truncate(teacher, vocab_size)
        parts = loss(
            student_logits,
            teacher,
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
        """The same of logits that never exist, as in `kdfast.linear_kd_loss`, for `Logits`.

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

    def from_truncated(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: TruncatedSoftmax,
        labels: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
        vocab_size: int | None = None,
        **head: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, as in `kdfast.linear_topk_kd_loss`, for `TruncatedLogits`.

        Args:
            student_hidden, student_weight: `[..., H]` and `[V, H]`. Gradients flow here, and to
                `student_bias`.
            teacher: what is left of it, `[..., k]`.
            labels, num_items: as for a call.
            vocab_size: the rows of the weight that exist.
            **head: `student_bias`, `student_logit_scale`, `student_softcap`.

        Returns:
            `(total, terms)`, as of a call.
        """
        parts = linear_topk_kd_loss(
            student_hidden,
            student_weight,
            teacher,
            labels,
            vocab_size=vocab_size,
            num_items=num_items,
            **head,
            **self._keywords(),
        )
        return self._weighted(parts, labels)

    @property
    def _weight(self) -> float:
        return sum(term.weight for term in (self.soft, self.hard) if term is not None)

    def _keywords(self) -> dict[str, object]:
        soft = self.soft
        if isinstance(soft, Logits):
            own = {"teacher_temperature": soft.teacher_temperature}
        else:
            own = {"tail": soft.tail}
        return {
            **own,
            "divergence": soft.divergence,
            "beta": soft.beta,
            "temperature": soft.temperature,
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
