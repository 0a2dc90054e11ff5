"""What a student is trained towards: a weighted list of terms."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from types import UnionType

import torch
from torch import Tensor, nn

from kdfast.ops.arguments import (
    INTEGER,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_per_token,
    checked_vocab_size,
    values_are_checked,
)
from kdfast.ops.hidden import hidden_mse
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.ops.linear_topk_kd_loss import linear_topk_kd_loss
from kdfast.ops.sampled_softmax import sampled_softmax
from kdfast.ops.tokens import check_values
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
from kdfast.trainer.head import IGNORE_INDEX

# The tokens of language models that a soft term is of.
TOKENS = ("labelled", "all")


@dataclass(frozen=True)
class Logits:
    """The teacher's distribution over tokens or classes; the keywords are those of `kd_loss`.

    Args:
        tokens: of models with a distribution per token, "labelled" are those whose label is not
            −100, and "all" those that are no padding, as DistilBERT has it. The second is a mean
            over a batch's tokens: accumulated batches share a step equally.
        per_class: divide by the number of classes too, as `nn.KLDivLoss("mean")` does, and
            TinyBERT's code.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.
    """

    weight: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    scale_t2: bool = True
    teacher_temperature: float | None = None
    tokens: str = "labelled"
    per_class: bool = False

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_number("beta", self.beta, 0, 1)
        check_flag("scale_t2", self.scale_t2)
        if self.teacher_temperature is not None:
            check_number("teacher_temperature", self.teacher_temperature, 0, open_low=True)
        check_choice("tokens", self.tokens, TOKENS)
        check_flag("per_class", self.per_class)


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
        tokens: as of `Logits`.

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
    tokens: str = "labelled"

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)
        check_count("k", self.k)
        check_choice("tail", self.tail, TAILS)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_number("beta", self.beta, 0, 1)
        check_flag("scale_t2", self.scale_t2)
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
        check_choice("tokens", self.tokens, TOKENS)

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
class LogitMSE:
    """Mean squared error between the models' logits, over the columns that both have.

    Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks".
    Where there are labels, rows and tokens labelled −100 count for nothing; of language models it
    needs labels, and builds the logits.

    Raises:
        TypeError, ValueError: `weight` is not a number, or below 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)


@dataclass(frozen=True)
class HardLabels:
    """Cross entropy with the labels, always at temperature 1; squared error, where they are floats.

    Raises:
        TypeError, ValueError: `weight` is not a number, or below 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)


FEATURES = (AttentionMSE, HiddenMSE, EmbeddingMSE, HiddenCosine)
KINDS = (Logits, TruncatedLogits, LogitMSE, HardLabels, *FEATURES)
Term = Logits | TruncatedLogits | LogitMSE | HardLabels | FeatureTerm


@dataclass(frozen=True)
class Objective:
    """Σ weight · term, over at most one term of each kind.

    A call takes the terms of the models' outputs, which are `Logits` or `TruncatedLogits`,
    `LogitMSE` and `HardLabels`. Those of their inside are `features`.

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

    @classmethod
    def from_config(cls, config: Sequence[Mapping[str, Mapping[str, object]]]) -> "Objective":
        """The objective that a configuration file spells out: the inverse of `to_config`.

        Args:
            config: a term each, as `{name of its class: {setting: value}}`.

        Raises:
            TypeError, ValueError: no such list, or a term or a setting that does not exist, and
                what the terms themselves raise.

        Example:
            >>> Objective.from_config([{"Logits": {"temperature": 4.0}}, {"HardLabels": {}}])
        """
        if isinstance(config, str | Mapping) or not isinstance(config, Sequence):
            raise TypeError(f"objective must be a list of terms, got {type(config).__name__}")
        kinds = {kind.__name__: kind for kind in KINDS}
        terms = []
        for entry in config:
            if not isinstance(entry, Mapping) or len(entry) != 1:
                raise TypeError(
                    f"objective must hold terms as {{name: {{setting: value}}}}, got {entry!r}"
                )
            ((name, settings),) = entry.items()
            if name not in kinds:
                names = ", ".join(kinds)
                raise ValueError(f"there is no term {name!r}: choose from {names}")
            settings = {} if settings is None else settings
            known = [field.name for field in fields(kinds[name])]
            for setting in settings:
                if setting not in known:
                    names = ", ".join(known)
                    raise ValueError(f"{name} has no setting {setting!r}: it has {names}")
            terms.append(kinds[name](**settings))
        return cls(terms)

    def to_config(self) -> list[dict[str, dict[str, object]]]:
        """The terms with all their settings, as plain data."""
        return [{type(term).__name__: asdict(term)} for term in self.terms]

    def needs_labels(self, *, per_token: bool) -> bool:
        """Whether a batch without labels is an error, of models with logits per token or not."""
        if self.hard is not None:
            return True
        # They say which tokens count.
        labelled = self.soft is not None and self.soft.tokens == "labelled"
        return per_token and (labelled or self.logit_mse is not None)

    @property
    def soft(self) -> Logits | TruncatedLogits | None:
        """The term of the teacher's outputs, if there is one."""
        return self._term(Logits | TruncatedLogits)

    @property
    def hard(self) -> HardLabels | None:
        """The term of the labels, if there is one."""
        return self._term(HardLabels)

    @property
    def logit_mse(self) -> LogitMSE | None:
        """The term of the logits' difference, if there is one."""
        return self._term(LogitMSE)

    @property
    def of_tokens(self) -> bool:
        """Whether there are terms of the models' outputs."""
        return any(term is not None for term in (self.soft, self.hard, self.logit_mse))

    @property
    def features(self) -> tuple[FeatureTerm, ...]:
        """The terms of the models' inside."""
        return tuple(term for term in self.terms if isinstance(term, FEATURES))

    def _term(self, kind: type[Term] | UnionType) -> Term | None:
        return next((term for term in self.terms if isinstance(term, kind)), None)

    def __call__(
        self,
        student_logits: Tensor,
        teacher: Tensor | TruncatedSoftmax | None,
        labels: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        num_items: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        vocab_size: int | None = None,
        overwrite_student_logits: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and the terms it is made of.

        Args:
            student_logits: `[..., V_s]`, floating. Gradients flow here.
            teacher: its logits `[..., V_t]`; for `TruncatedLogits` also what is left of them,
                `[..., k]`. None leaves the cross entropy alone, without a weight if there should be
                a teacher.
            labels: `[...]`, integers, −100 where nothing counts; floats of a regression.
            tokens: `[...]` bool, those of a soft term of all tokens.
            num_items, num_tokens: the divisors of labelled and of all tokens, as in
                `kdfast.kd_loss`; None takes the number of counted positions.
            vocab_size: the columns that exist on both sides, as in `kdfast.kd_loss`; the student's,
                for a truncated teacher.
            overwrite_student_logits: as in `kdfast.kd_loss`, where one call takes all terms.

        Returns:
            `(total, terms)`: 0-d, and a dict of detached 0-d tensors. `soft_loss` is the divergence
            without its weight and without T²; `logit_loss` and `hard_loss` are the others without
            their weights, `hard_loss` absent without labels.
        """
        if self.soft is not None and labels is not None and labels.is_floating_point():
            raise TypeError(
                f"labels must be classes where the objective has {type(self.soft).__name__}, got "
                f"{labels.dtype}: of a regression the teacher's values are learnt by LogitMSE"
            )
        teacher_logits = teacher
        if isinstance(self.soft, TruncatedLogits) and isinstance(teacher, Tensor):
            vocab_size = checked_vocab_size(
                vocab_size,
                student_logits.shape[-1],
                teacher.shape[-1],
                ("student_logits", "teacher"),
                "columns",
            )
            teacher = self.soft.truncate(teacher, vocab_size)
        if self.soft is None or teacher is None:
            total, terms = self._hard(student_logits, labels, num_items, vocab_size)
        else:
            loss = topk_kd_loss if isinstance(self.soft, TruncatedLogits) else kd_loss
            overwrite = overwrite_student_logits and tokens is None and self.logit_mse is None
            total, terms = self._soft_and_hard(
                partial(
                    loss,
                    student_logits,
                    teacher,
                    vocab_size=vocab_size,
                    overwrite_student_logits=overwrite,
                ),
                labels,
                tokens,
                num_items,
                num_tokens,
                student_logits.shape[-1] if vocab_size is None else vocab_size,
            )
        if self.logit_mse is not None and teacher is not None:
            loss = _logit_mse(student_logits, teacher_logits, labels, num_items, vocab_size)
            total = total + self.logit_mse.weight * loss
            terms["logit_loss"] = loss.detach()
        return total, terms

    def _hard(
        self,
        logits: Tensor,
        labels: Tensor | None,
        num_items: float | Tensor | None,
        vocab_size: int | None,
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What is left without a soft term, or without a teacher's outputs."""
        if labels is None or (self.hard is None and self.soft is None):
            return 0.0, {}
        logits = logits[..., :vocab_size].float()
        if labels.is_floating_point():
            if labels.numel() != logits.numel():
                raise ValueError(
                    "labels of a regression must be as many as the student's values "
                    f"{tuple(logits.shape)}, got {tuple(labels.shape)}"
                )
            loss = nn.functional.mse_loss(logits, labels.view_as(logits), reduction="sum")
            counted = labels.numel()
        else:
            check_per_token("labels", labels, logits.shape[:-1], logits.device, INTEGER)
            if values_are_checked(labels.device):
                check_values(labels, {}, IGNORE_INDEX, logits.shape[-1])
            loss = nn.functional.cross_entropy(
                logits.flatten(0, -2),
                labels.flatten().long(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
            counted = (labels != IGNORE_INDEX).sum()
        loss = loss / torch.as_tensor(counted if num_items is None else num_items).clamp_min(1)
        weight = 1.0 if self.soft is not None else self.hard.weight
        return weight * loss, {"hard_loss": loss.detach()}

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        num_items: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        vocab_size: int | None = None,
        **heads: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of logits that never exist, as in `kdfast.linear_kd_loss`, for `Logits`.

        Args:
            student_hidden, student_weight: `[..., H_s]` and `[V_s, H_s]`. Gradients flow here, and
                to `student_bias`.
            teacher_hidden, teacher_weight: `[..., H_t]` and `[V_t, H_t]`.
            labels, tokens, num_items, num_tokens: as for a call.
            vocab_size: the rows of the weights that exist on both sides.
            **heads: `student_bias`, `student_logit_scale`, `student_softcap`, and the teacher's.

        Returns:
            `(total, terms)`, as of a call.
        """
        loss = partial(
            linear_kd_loss,
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            vocab_size=vocab_size,
            **heads,
        )
        classes = len(student_weight) if vocab_size is None else vocab_size
        return self._soft_and_hard(loss, labels, tokens, num_items, num_tokens, classes)

    def from_truncated(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: TruncatedSoftmax,
        labels: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        num_items: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        vocab_size: int | None = None,
        **head: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, as in `kdfast.linear_topk_kd_loss`, for `TruncatedLogits`.

        Args:
            student_hidden, student_weight: `[..., H]` and `[V, H]`. Gradients flow here, and to
                `student_bias`.
            teacher: what is left of it, `[..., k]`.
            labels, tokens, num_items, num_tokens: as for a call.
            vocab_size: the rows of the weight that exist.
            **head: `student_bias`, `student_logit_scale`, `student_softcap`.

        Returns:
            `(total, terms)`, as of a call.
        """
        loss = partial(
            linear_topk_kd_loss,
            student_hidden,
            student_weight,
            teacher,
            vocab_size=vocab_size,
            **head,
        )
        classes = len(student_weight) if vocab_size is None else vocab_size
        return self._soft_and_hard(loss, labels, tokens, num_items, num_tokens, classes)

    def _soft_and_hard(
        self,
        loss: Callable[..., tuple[Tensor, Tensor, Tensor]],
        labels: Tensor | None,
        tokens: Tensor | None,
        num_items: float | Tensor | None,
        num_tokens: float | Tensor | None,
        classes: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` of both terms: in one call, if they are of the same tokens."""
        soft, hard = self._soft_weight(classes), 0.0 if self.hard is None else self.hard.weight
        call = partial(loss, **self._keywords(), return_parts=True)
        if tokens is None:
            weight = soft + hard
            # A weight of 0 everywhere is allowed to terms of which others have one.
            alpha = soft / weight if weight > 0 else 1.0
            total, soft_loss, hard_loss = call(labels=labels, num_items=num_items, alpha=alpha)
            total = weight * total
        else:
            total, soft_loss, _ = call(labels=labels_of(tokens), num_items=num_tokens, alpha=1.0)
            total = soft * total
            if labels is not None:
                # Without a weight it is logged, and needs no gradient.
                with torch.set_grad_enabled(torch.is_grad_enabled() and hard > 0):
                    of_labels, _, hard_loss = call(labels=labels, num_items=num_items, alpha=0.0)
                total = total + hard * of_labels
        terms = {"soft_loss": soft_loss}
        if labels is not None:
            terms["hard_loss"] = hard_loss
        return total, terms

    def _soft_weight(self, classes: int) -> float:
        per_class = isinstance(self.soft, Logits) and self.soft.per_class
        return self.soft.weight / classes if per_class else self.soft.weight

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
        }


def labels_of(tokens: Tensor) -> Tensor:
    """Labels for a loss that needs none but to know which tokens count."""
    return torch.where(tokens, 0, IGNORE_INDEX)


def _logit_mse(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    num_items: float | Tensor | None,
    vocab_size: int | None,
) -> Tensor:
    student, teacher = student[..., :vocab_size], teacher[..., :vocab_size]
    if labels is None or labels.is_floating_point():
        # The values of a regression, all of which count; of several for a row each is an item.
        counted, values = None, 1 if labels is None else labels.numel() / student[..., 0].numel()
    else:
        counted, values = labels != IGNORE_INDEX, 1
    if num_items is None:
        return hidden_mse(student, teacher, mask=counted)
    loss = hidden_mse(student, teacher, mask=counted, reduction="sum")
    return values * loss / torch.as_tensor(num_items).clamp_min(1)
