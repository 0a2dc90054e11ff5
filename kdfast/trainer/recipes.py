"""Published recipes: the objective, student and training arguments that each source prescribes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import BertConfig, DistilBertConfig, PreTrainedConfig

from kdfast.ops.arguments import check_flag, check_number
from kdfast.trainer.features import AttentionMSE, EmbeddingMSE, HiddenCosine, HiddenMSE
from kdfast.trainer.lstm import BiLSTMConfig
from kdfast.trainer.objective import (
    HardLabels,
    LogitMSE,
    Logits,
    Objective,
    Term,
    TruncatedLogits,
)


@dataclass(frozen=True)
class Recipe:
    """What a recipe prescribes.

    Args:
        objective: what the student is trained towards.
        student_config: the student, where the source prescribes one.
        training_arguments: defaults for `transformers.TrainingArguments`, where the source
            prescribes them.
        optimizer: `optimizer_cls_and_kwargs` of the trainer, where the source has one that
            `TrainingArguments.optim` does not name. Its learning rate stands in
            `training_arguments` too.
        initialise: whether the student begins with layers of the teacher
            (`kdfast.trainer.initialise_from_teacher`).
    """

    objective: Objective
    student_config: PreTrainedConfig | None = None
    training_arguments: dict[str, object] = field(default_factory=dict)
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, object]] | None = None
    initialise: bool = False


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


def distilbert(
    temperature: float = 2.0,
    alpha_ce: float = 5.0,
    alpha_mlm: float = 2.0,
    alpha_cos: float = 1.0,
    *,
    restrict_ce_to_mask: bool = False,
) -> Recipe:
    """Soft targets, masked language modelling and the cosine of the last hidden states.

    Sanh et al. 2019, "DistilBERT, a distilled version of BERT", by its code (`distiller.py` of
    huggingface/transformers-research-projects):

        alpha_ce · T² · KL(teacher ‖ student) + alpha_mlm · cross entropy + alpha_cos · (1 − cos)

    with the KL at temperature T, over all tokens that are no padding or, restricted, over the
    masked ones; the cross entropy over the masked ones; and the cosine over all. The student is the
    teacher with half of its layers, whose weights it begins with: 0, 2, 4, 7, 9 and 11 of 12. A
    GPT-2 learns in the same way, every token in the masked ones' place.

    Args:
        temperature: T, above 0.
        alpha_ce, alpha_mlm, alpha_cos: the weights, those of the source's example for one GPU.
        restrict_ce_to_mask: take the soft targets of the masked tokens alone.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> recipe = distilbert()
        >>> student = DistilBertForMaskedLM(recipe.student_config)
        >>> initialise_from_teacher(student, teacher)
    """
    check_flag("restrict_ce_to_mask", restrict_ce_to_mask)
    tokens = "labelled" if restrict_ce_to_mask else "all"
    terms = [
        Logits(alpha_ce, temperature, tokens=tokens),
        HardLabels(alpha_mlm),
        HiddenCosine(alpha_cos, {-1: -1}),
    ]
    return Recipe(
        Objective(terms),
        DistilBertConfig(),
        {
            "learning_rate": 5e-4,
            "per_device_train_batch_size": 5,
            "gradient_accumulation_steps": 50,
            "num_train_epochs": 3,
            "warmup_steps": 0.05,
            "adam_beta2": 0.98,
            "adam_epsilon": 1e-6,
            "max_grad_norm": 5.0,
        },
        initialise=True,
    )


def tinybert_general() -> Recipe:
    """Attention scores, hidden states and embeddings, on text without labels.

    Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", equations 7 to
    9, by its code (`general_distill.py` of huawei-noah/Pretrained-Language-Model):

        Σ MSE(scores) + Σ MSE(hidden · W) + MSE(embeddings · W)

    over the student's layers, each learning from the last of its share of the teacher's. Scores are
    those before the softmax. As in the code, means are over padding too, save that no score of a
    padding key counts, and one W with a bias serves all layers and the embeddings, where the paper
    has one W for each of the two. The student is TinyBERT-4.

    Example:
        >>> recipe = tinybert_general()
        >>> student = BertForMaskedLM(recipe.student_config)
    """
    return Recipe(
        _tinybert(),
        _tinybert_4(),
        {
            "learning_rate": 5e-5,
            "per_device_train_batch_size": 256,
            "num_train_epochs": 3,
            "warmup_steps": 0.1,
            **TINYBERT_OPTIMIZER,
        },
    )


def tinybert_intermediate() -> Recipe:
    """The same as `tinybert_general`, with a fine-tuned teacher, on a task's text.

    The first of the two steps of task-specific distillation (`task_distill.py`), on augmented data,
    with a constant learning rate. The student is the one that `tinybert_general` made.

    Example:
        >>> objective = tinybert_intermediate().objective
    """
    return Recipe(
        _tinybert(),
        _tinybert_4(),
        {
            "learning_rate": 5e-5,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 32,
            "num_train_epochs": 10,
            **TINYBERT_OPTIMIZER,
        },
    )


def tinybert_prediction(temperature: float = 1.0) -> Recipe:
    """The teacher's classes, after the student has learnt its inside.

    The second step of TinyBERT's task-specific distillation, equation 10 of the paper, by its code
    (`task_distill.py --pred_distill`): the cross entropy of the softened distributions, a mean over
    samples and classes, without T². Here it is the KL, which has the same gradient and differs by
    the teacher's entropy.

    Args:
        temperature: T, above 0.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> objective = tinybert_prediction().objective
    """
    return Recipe(
        Objective([Logits(1.0, temperature, scale_t2=False, per_class=True)]),
        _tinybert_4(),
        {
            "learning_rate": 3e-5,
            "per_device_train_batch_size": 32,
            "num_train_epochs": 3,
            "warmup_steps": 0.1,
            **TINYBERT_OPTIMIZER,
        },
    )


# Of the source's BertAdam, as far as AdamW has it.
TINYBERT_OPTIMIZER = {"weight_decay": 0.01, "adam_epsilon": 1e-6}


def _tinybert_4() -> BertConfig:
    return BertConfig(
        hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200
    )


def _tinybert() -> Objective:
    return Objective(
        [
            AttentionMSE(mask_queries=False, reduction="tinybert"),
            HiddenMSE(projection="shared", mask=False),
            EmbeddingMSE(projection="shared", mask=False),
        ]
    )


def bilstm(distill_weight: float = 1.0, ce_weight: float = 0.0) -> Recipe:
    """The logits of a classifier, into a bidirectional LSTM.

    Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks":

        distill_weight · MSE(logits) + ce_weight · cross entropy

    The paper's students learn from the logits alone. Its code (`distill_birnn.py` of
    castorini/d-bert) has 1 for both weights.

    Args:
        distill_weight, ce_weight: the weights, 0 or above, one of them above 0.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> recipe = bilstm()
        >>> student = BiLSTMForSequenceClassification(recipe.student_config)
        >>> trainer = DistillationTrainer(
        ...     student,
        ...     TrainingArguments("out", **recipe.training_arguments),
        ...     optimizer_cls_and_kwargs=recipe.optimizer,
        ...     teacher=teacher,
        ...     objective=recipe.objective,
        ...     train_dataset=sentences,
        ... )
    """
    check_number("distill_weight", distill_weight, 0)
    check_number("ce_weight", ce_weight, 0)
    terms = [LogitMSE(distill_weight)]
    if ce_weight > 0:
        terms.append(HardLabels(ce_weight))
    rate = 1.0
    return Recipe(
        Objective(terms),
        BiLSTMConfig(embeddings="multichannel"),
        {
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 50,
            "num_train_epochs": 30,
            # The source's, which clips nothing; the trainer's own default would.
            "max_grad_norm": 30000.0,
        },
        optimizer=(torch.optim.Adadelta, {"lr": rate, "rho": 0.95}),
    )


def _with_hard_labels(soft: Term, alpha: float) -> Objective:
    return Objective([soft, HardLabels(1 - alpha)] if alpha < 1 else [soft])


RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        hinton,
        truncated,
        distilbert,
        tinybert_general,
        tinybert_intermediate,
        tinybert_prediction,
        bilstm,
    )
}
