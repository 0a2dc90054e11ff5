"""Published recipes: the objective, student and training arguments that each source prescribes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from kdfast.ops.arguments import check_number
from kdfast.trainer.objective import HardLabels, Logits, Objective, Term, TruncatedLogits


@dataclass(frozen=True)
class Recipe:
    """What a recipe prescribes.

    Args:
        objective: what the student is trained towards.
        student_config: the student, where the source prescribes one.
        training_arguments: defaults for `transformers.TrainingArguments`, where the source
            prescribes them.
    """

    objective: Objective
    student_config: PreTrainedConfig | None = None
    training_arguments: dict[str, object] = field(default_factory=dict)


def hinton(
    temperature: float = 2.0,
    alpha: float = 0.5,
    *,
    divergence: str = "forward_kl",
    teacher_temperature: float | None = None,
) -> Recipe:
    """alpha · T² · KL(teacher ‖ student) at temperature T + (1 − alpha) · cross entropy.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. The
    paper prescribes no student and no optimiser. Its soft term is a cross entropy, which has the
    same gradient and differs by the teacher's entropy.

    Args:
        temperature: T, above 0. The paper uses 1 to 20, and the low end for small students.
        alpha: the soft term's share, in [0, 1]. The paper gives the hard term "a considerably lower
            weight".
        divergence: another divergence of `kdfast.kd_loss` in the soft term's place.
        teacher_temperature: the teacher's T where it differs.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> objective = hinton(temperature=4.0, alpha=0.9).objective
        >>> DistillationTrainer(student, arguments, teacher=teacher, objective=objective)
    """
    check_number("alpha", alpha, 0, 1)
    soft = Logits(
        alpha, temperature, divergence=divergence, teacher_temperature=teacher_temperature
    )
    return Recipe(_with_hard_labels(soft, alpha))


def truncated(
    k: int = 10,
    tail: str = "none",
    temperature: float = 1.0,
    alpha: float = 1.0,
    *,
    divergence: str = "forward_kl",
) -> Recipe:
    """The teacher's k largest probabilities, and no more of it.

    Barraza 2019, "Transformer Distillation" (github.com/Edy-Barraza/Transformer_Distillation): a
    masked language model learns −Σ p · log q over the k = 10 largest p of the teacher, with p as it
    is, q of the student's full softmax, no temperature, and no hard labels, at the masked
    positions, which are those with a label. Here Σ p · log p is added, which has no gradient. The
    source also has BERT's loss of the next sentence, which comes from no teacher.

    Its author found that this truncation costs quality: all of the student's probability is
    pushed onto k tokens. `tail="bucket"` keeps the rest of the teacher as one more entry, costs the
    same, and does not do so (`kdfast.topk_kd_loss`).

    Args:
        k: how many entries of each token to keep. A teacher cache has to hold as many.
        tail: what becomes of the rest, as in `kdfast.topk_kd_loss`.
        temperature: of student and teacher, above 0; the soft term is multiplied by its square.
        alpha: the soft term's share, in [0, 1]; the rest is the cross entropy with the labels.
        divergence: another divergence that `tail` has.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> objective = truncated(k=64, tail="bucket", alpha=0.9).objective
        >>> DistillationTrainer(student, arguments, teacher_cache=cache, objective=objective)
    """
    check_number("alpha", alpha, 0, 1)
    soft = TruncatedLogits(alpha, k, tail, temperature, divergence)
    return Recipe(_with_hard_labels(soft, alpha))


def _with_hard_labels(soft: Term, alpha: float) -> Objective:
    return Objective([soft, HardLabels(1 - alpha)] if alpha < 1 else [soft])


RECIPES: dict[str, Callable[..., Recipe]] = {"hinton": hinton, "truncated": truncated}
