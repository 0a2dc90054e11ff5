"""A teacher that was cached: its rows join the batches, and no teacher model is needed."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils import logging

from kdfast.ops.truncated_softmax import TruncatedSoftmax
from kdfast.reference import TAIL_DIVERGENCES
from kdfast.teacher_cache import OtherRowsError, TeacherCache
from kdfast.trainer.head import IGNORE_INDEX
from kdfast.trainer.objective import Logits, Objective, TruncatedLogits

logger = logging.get_logger(__name__)

# The dataset's column that says which sample of the cache a row is.
SAMPLE = "teacher_sample"
# Under these names the teacher travels in a batch.
LOG_PROBS, INDICES = "teacher_log_probs", "teacher_indices"


def fitted(objective: Objective, cache: TeacherCache) -> Objective:
    """The objective as it is with this cache, whose teacher has left only so much of itself.

    `Logits` becomes `TruncatedLogits` with the bucket tail, and with the tail "none" where the
    teacher was sampled; a warning says so.

    Raises:
        ValueError: the soft term does not fit the cache.
    """
    soft = objective.soft
    if soft is None or objective.logit_mse is not None:
        names = ", ".join(type(term).__name__ for term in objective.terms)
        raise ValueError(
            "objective must have Logits or TruncatedLogits and no LogitMSE with a teacher cache, "
            f"which has probabilities alone, got {names}"
        )
    if isinstance(soft, Logits):
        truncated = _truncated(soft, cache)
        logger.warning_once(
            f"Of each token the teacher cache has {cache.k} entries: {soft} is trained as "
            f"{truncated}."
        )
        soft = truncated
    if soft.temperature != cache.temperature:
        raise ValueError(
            f"temperature must be the teacher cache's, {cache.temperature:g}, "
            f"got {soft.temperature:g}"
        )
    if cache.sampled and soft.draws != cache.k:
        raise ValueError(
            f"draws must be {cache.k}, of which the teacher cache has samples, got {soft.draws}"
        )
    if not cache.sampled and soft.draws is not None:
        raise ValueError(
            f"draws must be None: the teacher cache has the {cache.k} largest entries, "
            f"got {soft.draws}"
        )
    if soft.entries > cache.k:
        raise ValueError(f"k must be at most the teacher cache's, {cache.k}, got {soft.k}")
    others = (term for term in objective.terms if term is not objective.soft)
    return Objective([soft, *others])


def _truncated(soft: Logits, cache: TeacherCache) -> TruncatedLogits:
    tail = "none" if cache.sampled else "bucket"
    if soft.divergence not in TAIL_DIVERGENCES[tail]:
        raise ValueError(
            f"divergence must be one of {TAIL_DIVERGENCES[tail]} with a teacher cache of "
            f"{'sampled' if cache.sampled else 'the largest'} entries, got {soft.divergence!r}"
        )
    if soft.teacher_temperature not in (None, soft.temperature):
        raise ValueError(
            "teacher_temperature must be the temperature with a teacher cache, "
            f"got {soft.teacher_temperature:g} and {soft.temperature:g}"
        )
    if soft.per_class:
        raise ValueError("per_class must be False with a teacher cache, whose entries are few")
    return TruncatedLogits(
        soft.weight,
        k=cache.k,
        tail=tail,
        temperature=soft.temperature,
        divergence=soft.divergence,
        beta=soft.beta,
        scale_t2=soft.scale_t2,
        draws=cache.k if cache.sampled else None,
        tokens=soft.tokens,
    )


def attach(
    cache: TeacherCache,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
) -> tuple[Dataset | None, Dataset | dict[str, Dataset] | None]:
    """Both with the column `teacher_sample`; the evaluation samples follow the training samples.

    An evaluation set that is not in the cache stays as it is, with a warning.

    Raises:
        TypeError, ValueError: the training set is not what the cache was built from.
    """
    if train_dataset is not None and not _is_attached(train_dataset):
        train_dataset = cache.attach(train_dataset)
    start = len(train_dataset) if hasattr(train_dataset, "__len__") else 0

    def attach_eval(dataset: Dataset) -> Dataset:
        nonlocal start
        is_empty = hasattr(dataset, "__len__") and len(dataset) == 0
        if is_empty or _is_attached(dataset):
            return dataset
        try:
            attached = cache.attach(dataset, start)
        except (TypeError, OtherRowsError) as reason:
            logger.warning_once(
                f"The evaluation set is not in the teacher cache ({reason}): evaluation gives the "
                "hard loss alone."
            )
            return dataset
        start += len(dataset)
        return attached

    if isinstance(eval_dataset, dict):
        eval_dataset = {name: attach_eval(part) for name, part in eval_dataset.items()}
    elif eval_dataset is not None:
        eval_dataset = attach_eval(eval_dataset)
    return train_dataset, eval_dataset


def _is_attached(dataset: Dataset) -> bool:
    names = getattr(dataset, "column_names", None)
    # A stream that names no columns cannot be asked.
    if names is None and hasattr(dataset, "__len__") and len(dataset):
        names = dataset[0]
    return SAMPLE in (names or ())


@dataclass
class CachedCollator:
    """Batches of `collator`, and the rows that `cache` has of them: `pop_rows` finds them.

    The cache is read where the batch is made: in the data loader's workers, where there are any.

    Args:
        k: how many entries of each token to take.
        shift_labels: whether label i + 1 belongs to position i. A label whose position is padding,
            of which the cache has nothing, counts for nothing.

    Raises:
        ValueError: the data collator masks tokens at random; at a call, the batch's tokens are not
            those of its samples.
    """

    collator: Callable[[list[Mapping]], MutableMapping[str, Tensor]]
    cache: TeacherCache
    k: int
    shift_labels: bool

    def __post_init__(self) -> None:
        if getattr(self.collator, "mlm", False):
            raise ValueError(
                f"the data collator ({type(self.collator).__name__} with mlm=True) masks tokens "
                "anew in every epoch, which the cached teacher did not see: mask the dataset "
                "before the cache is built, and collate it without masking"
            )

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> MutableMapping[str, Tensor]:
        samples = [row.get(SAMPLE) for row in rows]
        batch = self.collator(
            [{key: value for key, value in row.items() if key != SAMPLE} for row in rows]
        )
        # Not attached, like an evaluation set that the cache does not hold.
        if None in samples:
            return batch
        tokens, mask = batch["input_ids"], batch.get("attention_mask")
        positions = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        if tokens.shape != positions.shape or len(tokens) != len(rows):
            raise ValueError(
                f"with a teacher cache a batch must be [{len(rows)} samples, positions], got "
                f"input_ids of {tuple(tokens.shape)} and attention_mask of {tuple(positions.shape)}"
            )
        try:
            teacher = self.cache.rows(torch.as_tensor(samples), positions, tokens)
        except (IndexError, OtherRowsError) as error:
            raise OtherRowsError(
                f"{error}: {SAMPLE} must come from this cache's attach, and the tokens must stay "
                "as they were: no map, and no data collator, may change them"
            ) from error
        # A cache may hold more entries than are trained with, and the largest come first.
        batch[LOG_PROBS] = teacher.log_probs[..., : self.k]
        batch[INDICES] = teacher.indices[..., : self.k]
        if "shift_labels" in batch:
            batch["shift_labels"] = batch["shift_labels"].masked_fill(~positions, IGNORE_INDEX)
        if "labels" in batch:
            if batch["labels"].shape != positions.shape:
                raise ValueError(
                    "a teacher cache needs a label per token: labels must be "
                    f"{tuple(positions.shape)}, got {tuple(batch['labels'].shape)}"
                )
            predicted = positions
            if self.shift_labels:
                # Nothing predicts the first label, which stays as it is.
                predicted = torch.nn.functional.pad(positions[:, :-1], (1, 0), value=True)
            batch["labels"] = batch["labels"].masked_fill(~predicted, IGNORE_INDEX)
        return batch


def pop_rows(inputs: dict[str, Tensor]) -> TruncatedSoftmax | None:
    """What the cache knows of a batch, taken out of it: `[batch, positions, k]`."""
    if LOG_PROBS not in inputs:
        return None
    return TruncatedSoftmax(inputs.pop(LOG_PROBS), inputs.pop(INDICES))
