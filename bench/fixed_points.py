"""What a student learns from a truncated teacher: where each tail's loss comes to rest.

    python bench/fixed_points.py

trains one student per tail, as free as can be: its logits are the parameters, and there is one
context. It prints the table of docs/truncated-softmax.md and draws its plots,
docs/truncated-softmax-{light,dark}.svg.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import report
import torch
from torch import Tensor

import kdfast
from kdfast.reference import TAILS

VOCAB, ENTRIES = 1000, 10
# The standard deviation of the teacher's logits that gives its ten largest entries 0.301.
TEACHER_SCALE = 1.864258
# Plain gradient descent. "none" and "renormalize" never come to rest: they are seen at this time.
LEARNING_RATE, MOMENTUM, STEPS = 2.0, 0.9, 2000
# Tokens of a step with `sampled_softmax`, and the draws of each: all of them are drawn anew.
TOKENS, DRAWS = 32, 12

# Of the student's logits `[1, VOCAB]`.
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FixedPoint:
    """A trained student beside its teacher."""

    student: Tensor  # (VOCAB,) probabilities, of the teacher's most probable token first
    support: float  # the student's probability on the teacher's ENTRIES largest
    divergence: float  # KL(teacher‖student), over the whole vocabulary


def teacher_logits() -> Tensor:
    """`[1, VOCAB]` float64, the largest first: a normal distribution's quantiles, so no chance."""
    levels = (torch.arange(VOCAB, dtype=torch.float64) + 0.5) / VOCAB
    return (TEACHER_SCALE * torch.special.ndtri(levels).flip(0)).unsqueeze(0)


def losses(teacher: Tensor) -> dict[str, Loss]:
    """What is trained on, by name: the whole teacher, samples of it, and the four tails."""
    top = kdfast.truncated_softmax(teacher, ENTRIES)
    generator = torch.Generator().manual_seed(0)

    def sampled(student: Tensor) -> Tensor:
        tokens = teacher.expand(TOKENS, -1)
        sample = kdfast.sampled_softmax(tokens, DRAWS, generator=generator)
        return kdfast.topk_kd_loss(student.expand_as(tokens), sample, tail="none")

    return {
        "full": partial(kdfast.kd_loss, teacher_logits=teacher),
        "sampled": sampled,
        **{tail: partial(kdfast.topk_kd_loss, teacher=top, tail=tail) for tail in TAILS},
    }


def fixed_point(loss: Loss, teacher: Tensor) -> FixedPoint:
    """Train a student that begins with equal probabilities, and see where it is."""
    logits = torch.zeros_like(teacher, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=LEARNING_RATE, momentum=MOMENTUM)
    # The mean of the second half: what noise a loss has is gone from it.
    mean = torch.zeros_like(teacher)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
        if step >= STEPS // 2:
            mean += logits.detach() / (STEPS - STEPS // 2)
    log_p, log_q = teacher.log_softmax(-1), mean.log_softmax(-1)
    return FixedPoint(
        student=log_q.exp().squeeze(0),
        support=log_q[..., :ENTRIES].exp().sum().item(),
        divergence=(log_p.exp() * (log_p - log_q)).sum().item(),
    )


def table(points: dict[str, FixedPoint]) -> str:
    """As Markdown: what a student of each loss has learned."""
    rows = [
        f"| `{name}` | {point.support:.4f} | {point.divergence:.3f} |"
        for name, point in points.items()
    ]
    return "\n".join(["| trained with | on the support | KL(p‖q) |", "|---|---:|---:|", *rows])


# The rank at which a curve is named, above it and on to the right, or below it and up to there.
NAMED_ABOVE = {"teacher": 40, "support": 14, "none": 14}
NAMED_BELOW = {"sampled": 420, "bucket": 30, "renormalize": 40}


def plot(points: dict[str, FixedPoint], teacher: Tensor, theme: str, path: Path) -> None:
    """Probability by the teacher's rank, the student of each loss beside the teacher."""
    pyplot = report.styled_pyplot()
    color = report.THEMES[theme]
    figure, axis = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    ranks = torch.arange(1, VOCAB + 1)
    curves = {
        "teacher": (teacher.softmax(-1).squeeze(0), color["text"], "-", 2.5),
        "sampled": (points["sampled"].student, color["kdfast"], ":", 1.2),
        "bucket": (points["bucket"].student, color["kdfast"], "-", 2.0),
        "support": (points["support"].student, color["quiet"], "-", 1.2),
        "none": (points["none"].student, color["quiet"], "--", 1.2),
        "renormalize": (points["renormalize"].student, color["quiet"], "-.", 1.2),
    }
    for name, (probability, shade, style, width) in curves.items():
        axis.loglog(ranks, probability, color=shade, linestyle=style, linewidth=width)
        if name in NAMED_ABOVE:
            rank, shift, sides = NAMED_ABOVE[name], 1.25, {"ha": "left", "va": "bottom"}
        else:
            rank, shift, sides = NAMED_BELOW[name], 0.8, {"ha": "right", "va": "top"}
        axis.text(rank, shift * probability[rank - 1].item(), name, color=shade, **sides)
    axis.axvline(ENTRIES + 0.5, color=color["bar"], linewidth=0.8)
    axis.text(ENTRIES, 0.6, f"support, k = {ENTRIES}", color=color["quiet"], ha="right")
    axis.set_ylim(5e-8, 1.5)
    axis.set_xlim(1, VOCAB)
    axis.set_xlabel("token, by the teacher's rank", color=color["text"])
    axis.set_ylabel("probability", color=color["text"])
    axis.tick_params(which="both", colors=color["quiet"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(color["bar"])
    report.save(figure, path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plots", type=Path, default=report.ROOT / "docs")
    arguments = parser.parse_args()
    # Rows of a thousand entries: threads would wait for one another longer than they compute.
    torch.set_num_threads(1)
    teacher = teacher_logits()
    points = {name: fixed_point(loss, teacher) for name, loss in losses(teacher).items()}
    print(table(points))
    for theme in report.THEMES:
        plot(points, teacher, theme, arguments.plots / f"truncated-softmax-{theme}.svg")


if __name__ == "__main__":
    main()
