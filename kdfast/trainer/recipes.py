"""Published recipes: the objective, student and training arguments that each source prescribes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from kdfast.ops.arguments import check_number
from kdfast.trainer.objective import HardLabels, Logits, Objective


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
    return Recipe(Objective([soft, HardLabels(1 - alpha)] if alpha < 1 else [soft]))


RECIPES: dict[str, Callable[..., Recipe]] = {"hinton": hinton}
