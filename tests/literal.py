"""What the recipes' sources compute, transcribed term by term."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax


def scores_and_hidden(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """TinyBERT's `attention_scores` of each layer, before the softmax, and the hidden states.

    transformer/modeling.py: query and key projections, scaled products, and a mask of −10000 added
    to the columns of padding.
    """
    queries, keys = [], []
    layers = [layer.attention.self for layer in model.bert.encoder.layer]
    hooks = [
        hook
        for layer in layers
        for hook in (
            layer.query.register_forward_hook(lambda module, inputs, out: queries.append(out)),
            layer.key.register_forward_hook(lambda module, inputs, out: keys.append(out)),
        )
    ]
    hidden = model(**batch, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    heads, penalty = 2, (1.0 - batch["attention_mask"][:, None, None, :].float()) * -10000.0
    scores = []
    for query, key in zip(queries, keys, strict=True):
        query, key = (x.unflatten(-1, (heads, -1)).permute(0, 2, 1, 3) for x in (query, key))
        scores.append(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + penalty)
    return scores, hidden


def tinybert(
    student: nn.Module, teacher: nn.Module, fit_dense: nn.Linear, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """`att_loss` and `rep_loss` of general_distill.py and task_distill.py, which agree.

    github.com/huawei-noah/Pretrained-Language-Model, TinyBERT.
    """
    student_scores, student_hidden = scores_and_hidden(student, batch)
    with torch.no_grad():
        teacher_scores, teacher_hidden = scores_and_hidden(teacher, batch)
    loss_mse = nn.MSELoss()
    block = len(teacher_scores) // len(student_scores)

    attention = 0.0
    chosen = [teacher_scores[i * block + block - 1] for i in range(len(student_scores))]
    for own, other in zip(student_scores, chosen, strict=True):
        own = torch.where(own <= -1e2, torch.zeros_like(own), own)
        other = torch.where(other <= -1e2, torch.zeros_like(other), other)
        attention = attention + loss_mse(own, other)

    hidden = 0.0
    chosen = [teacher_hidden[i * block] for i in range(len(student_scores) + 1)]
    for own, other in zip(student_hidden, chosen, strict=True):
        hidden = hidden + loss_mse(fit_dense(own), other)
    return attention, hidden


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`cls_loss` of task_distill.py: the mean runs over samples and classes."""
    likelihood = log_softmax(student / temperature, dim=-1)
    return (-softmax(teacher / temperature, dim=-1) * likelihood).mean()


def distilbert(
    student: nn.Module,
    teacher: nn.Module,
    batch: dict[str, Tensor],
    *,
    temperature: float = 2.0,
    restrict_ce_to_mask: bool = False,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_ce`, `loss_mlm` (or `loss_clm`) and `loss_cos` of distiller.py, without weights.

    github.com/huggingface/transformers-research-projects, distillation.
    """
    attention_mask, labels = batch["attention_mask"].bool(), batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    own = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        other = teacher(**inputs, output_hidden_states=True)
    vocab, width = own.logits.shape[-1], own.hidden_states[-1].shape[-1]

    mask = (labels > -1 if restrict_ce_to_mask else attention_mask).unsqueeze(-1)
    own_selected, other_selected = (
        torch.masked_select(logits, mask.expand_as(logits)).view(-1, vocab)
        for logits in (own.logits, other.logits)
    )
    loss_ce = temperature**2 * nn.KLDivLoss(reduction="batchmean")(
        log_softmax(own_selected / temperature, dim=-1),
        softmax(other_selected / temperature, dim=-1),
    )

    logits, targets = own.logits, labels
    if causal:
        logits, targets = logits[..., :-1, :], labels[..., 1:]
    loss_lm = nn.CrossEntropyLoss(ignore_index=-100)(logits.reshape(-1, vocab), targets.flatten())

    mask = attention_mask.unsqueeze(-1)
    own_selected, other_selected = (
        torch.masked_select(hidden, mask.expand_as(hidden)).view(-1, width)
        for hidden in (own.hidden_states[-1], other.hidden_states[-1])
    )
    target = torch.ones(len(own_selected))
    loss_cos = nn.CosineEmbeddingLoss(reduction="mean")(own_selected, other_selected, target)
    return loss_ce, loss_lm, loss_cos


def bilstm(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    distill_lambda: float = 1.0,
    ce_lambda: float = 1.0,
) -> Tensor:
    """The loss of distill_birnn.py, with its own weights. github.com/castorini/d-bert."""
    loss = distill_lambda * nn.MSELoss()(student, teacher)
    return loss + ce_lambda * nn.CrossEntropyLoss()(student, labels)
