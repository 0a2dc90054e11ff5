"""truncated_softmax against what people write by hand. A round is one selection, of a teacher's
logits and without gradients. The bound to compare with is one read of the logits.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import measure
import torch
from measure import Trial
from peers import Member
from torch import Tensor
from truncated_softmax_peers import TruncatedCase, members_of

# Rows, vocabulary, dtype, entries to keep.
SHAPES = {
    "cpu": (
        (512, 50257, "float32", 64),
        (128, 128256, "bfloat16", 128),
    ),
    "cuda": (
        (8192, 128256, "bfloat16", 64),
        (8192, 151936, "bfloat16", 128),
        (4096, 262144, "bfloat16", 64),
        (32768, 32000, "bfloat16", 16),
        (8192, 50257, "float32", 64),
    ),
}

# Absolute, of a log-probability: what PyTorch's own float32 sum over 50 000 exponentials is off by,
# and some more. Logits that were rounded to bfloat16 on the way miss by 1e-2.
TOLERANCE = 1e-5

# float64 temporaries of the reference: about four of this many elements.
REFERENCE_CHUNK = 2**23


@dataclass(frozen=True)
class Problem:
    """The logits of a case and what float64 makes of them."""

    logits: Tensor  # (rows, vocab)
    log_sum_exp: Tensor  # (rows, 1) float64
    log_probs: Tensor  # (rows, k) float64, the largest first
    copy_rate: float


@measure.one_at_a_time
def problem_of(case: TruncatedCase) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    # A standard deviation of 3 is that of trained language models' logits.
    logits = torch.randn(case.rows, case.vocab, device=case.device, generator=generator).mul_(3)
    logits = logits.to(case.torch_dtype)
    chunks = logits.split(max(1, REFERENCE_CHUNK // case.vocab))
    log_sum_exp = torch.cat([chunk.double().logsumexp(-1, keepdim=True) for chunk in chunks])
    return Problem(
        logits=logits,
        log_sum_exp=log_sum_exp,
        log_probs=logits.topk(case.k).values.double() - log_sum_exp,
        copy_rate=measure.copy_bandwidth(case.device, logits.nbytes),
    )


def trial_of(case: TruncatedCase, member: Member) -> Trial:
    problem = problem_of(case)
    select = member.build(case)
    result = None

    def step() -> None:
        nonlocal result
        with torch.no_grad():
            result = select(problem.logits)

    def reset() -> None:
        nonlocal result
        result = None

    def errors() -> dict[str, float]:
        if member.is_ceiling:
            return {}
        log_probs, indices = result
        # What the chosen columns have, so that equal logits may be chosen in any order.
        chosen = problem.logits.gather(-1, indices).double() - problem.log_sum_exp
        repeated = (indices.sort(-1).values.diff() == 0).any()
        return {
            "log-probability": (log_probs.double() - chosen).abs().max().item(),
            "selection": math.inf if repeated else (chosen - problem.log_probs).abs().max().item(),
        }

    tolerances = {"log-probability": TOLERANCE, "selection": TOLERANCE}
    # A float32 log-probability and an int64 column for each entry.
    entry_bytes = 12
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances={} if member.is_ceiling else tolerances,
        # The logits are read, and the entries are written.
        bytes_moved=problem.logits.nbytes + entry_bytes * case.rows * case.k,
        about={**asdict(case), "is_ceiling": member.is_ceiling},
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, case.torch_dtype),
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, TruncatedCase, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    for *sizes, k in shapes:
        case = TruncatedCase(*sizes, device=device, k=k)
        for member in members_of(case):
            yield f"truncated_softmax {case.shape}", member.name, case, member


def test_truncated_softmax(
    group: str, name: str, case: TruncatedCase, member: Member, measured
) -> None:
    # Compiled members of one shape must not make those of the next one "dynamic".
    torch.compiler.reset()
    measured(group, name, lambda: trial_of(case, member))
