"""A teacher in a few random tokens whose expectation is the whole of it: `sampled_softmax`."""

import math

import torch
from torch import Tensor

from kdfast.ops.arguments import check_count, check_detached, check_floating, check_number
from kdfast.ops.tokens import accumulation_dtype, result_dtype
from kdfast.ops.truncated_softmax import TruncatedSoftmax

# Of the proposals that stand in memory at once, in float64. What a CPU writes stays in its caches,
# and is no fresh memory: six times faster than 64 MiB.
PROPOSAL_BYTES = {"cpu": 2**21, "cuda": 2**26}


def sampled_softmax(
    logits: Tensor,
    draws: int,
    *,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> TruncatedSoftmax:
    """An unbiased sample of softmax(logits / temperature), by importance sampling.

    Tokens are drawn with replacement from softmax(logits / proposal_temperature). A token that was
    drawn c times has the weight

        c / draws · p(token) / proposal(token)

    whose expectation is p(token). With `tail="none"`, which takes weights as they are, the expected
    gradient of `topk_kd_loss` is that of forward KL on the whole distribution; the other tails
    spoil that. After Anshumann et al. 2025, "Sparse Logit Sampling". Truncation to the largest
    entries is biased instead, and teaches a student that there is no tail.

    Args:
        logits: `[..., V]`, floating. Logits that require grad are an error.
        draws: how many tokens to draw per row. Peaked rows give fewer distinct ones.
        temperature: the teacher's T.
        proposal_temperature: above `temperature` draws rare tokens more often, each with less
            weight; equal to it, weights are the shares of the draws.
        generator: of the logits' device; None takes the default one.

    Returns:
        `TruncatedSoftmax(log_probs, indices)`, both `[..., draws]`: the distinct tokens, the log of
        their weights, largest first and of equal weights the lower index first, then entries that
        do not exist (−inf, −1). The weights sum to 1 in expectation alone, unless the temperatures
        are equal. A row that holds NaN has a first weight of NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> sample = kdfast.sampled_softmax(teacher_logits, 12, generator=generator)
        >>> loss = kdfast.topk_kd_loss(student_logits, sample, tail="none")
    """
    check_floating("logits", logits)
    check_detached("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have a vocabulary dimension, got the shape {tuple(logits.shape)}"
        )
    check_count("draws", draws)
    check_number("temperature", temperature, 0, open_low=True)
    check_number("proposal_temperature", proposal_temperature, 0, open_low=True)

    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)
    # Uniform numbers of all rows at once: a sample does not depend on how rows are split.
    real = accumulation_dtype(logits.device)
    uniform = torch.rand(
        rows.shape[0], draws, dtype=real, device=logits.device, generator=generator
    )
    log_weights = rows.new_empty((rows.shape[0], draws), dtype=result_dtype(logits))
    indices = rows.new_empty((rows.shape[0], draws), dtype=torch.int64)
    budget = PROPOSAL_BYTES["cpu" if logits.device.type == "cpu" else "cuda"]
    step = max(1, budget // (vocab * real.itemsize))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        log_weights[part], indices[part] = _sampled_rows(
            rows[part].to(real), uniform[part], temperature, proposal_temperature
        )
    shape = (*logits.shape[:-1], draws)
    return TruncatedSoftmax(log_weights.reshape(shape), indices.reshape(shape))


def _sampled_rows(
    logits: Tensor, uniform: Tensor, temperature: float, proposal_temperature: float
) -> tuple[Tensor, Tensor]:
    draws = uniform.shape[-1]
    scaled = logits - logits.amax(-1, keepdim=True)
    log_proposal = (scaled / proposal_temperature).log_softmax(-1)
    cumulative = log_proposal.exp().cumsum(-1)
    # Below the last sum, which rounding may reach: no column follows it. A column without
    # probability adds nothing to the sums and is passed over.
    most = cumulative[..., -1:].nextafter(torch.zeros_like(cumulative[..., -1:]))
    targets = torch.minimum(uniform * cumulative[..., -1:], most)
    drawn = torch.searchsorted(cumulative, targets, right=True)
    # Only of a row of NaN is none found.
    drawn = drawn.clamp_max(logits.shape[-1] - 1).sort(-1).values

    first = torch.ones_like(drawn, dtype=torch.bool)
    first[..., 1:] = drawn[..., 1:] != drawn[..., :-1]
    slot = first.cumsum(-1) - 1
    counts = torch.zeros_like(uniform).scatter_add(-1, slot, torch.ones_like(uniform))
    tokens = torch.full_like(drawn, -1).scatter(-1, slot, drawn)

    column = tokens.clamp_min(0)
    log_p = (scaled / temperature).log_softmax(-1)
    log_ratio = log_p.gather(-1, column) - log_proposal.gather(-1, column)
    log_weights = torch.where(tokens >= 0, (counts / draws).log() + log_ratio, -math.inf)
    order = log_weights.argsort(dim=-1, descending=True, stable=True)
    return log_weights.gather(-1, order), tokens.gather(-1, order)
