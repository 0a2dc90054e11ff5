"""How attention_mse grows with the sequence, and what its methods lose near convergence.

    python bench/attention_mse_curves.py

prints the tables of docs/attention-mse.md and draws its plots,
docs/attention-mse-{precision,growth}-{light,dark}.svg. With `--only precision` or `--only growth`
it does one of the two.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import report
import torch
from attention_mse_peers import AttentionCase, eager_loss
from torch import Tensor

import kdfast
from kdfast import reference

METHODS = ("gram", "tiled", "auto")

# How far the student is from its teacher, in standard deviations of the teacher's queries and keys.
EPSILONS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
# What the student's queries and keys are to the teacher's, and the channels of their heads: the
# same, turned, or turned in a space of more dimensions. The scores are the same in all three.
BASES = {"one basis": 64, "rotated": 64, "rotated, wider": 96}
TEACHER_WIDTH, LENGTH = 64, 1024
# What the queries and keys of an independent student measure, its teacher's being 1.
SIZES = (1.0, 1e-1, 1e-2, 1e-4)

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
# The longest sequence whose maps fit into a small machine's memory.
LONGEST_EAGER = 4096


@dataclass(frozen=True)
class Precision:
    """Relative errors of one method at one distance from the teacher, against float64."""

    loss: float
    gradient: float

    def __str__(self) -> str:
        return f"{_rounded(self.loss)} \\| {_rounded(self.gradient)}"


@dataclass(frozen=True)
class Growth:
    """A step of one head's batch: what it takes, of time and beyond inputs and gradients."""

    seconds: float
    peak_bytes: int


# By basis, method and distance.
Precisions = dict[tuple[str, str, float], Precision]
# By method and size of the student.
SmallPrecisions = dict[tuple[str, float], Precision]
# By name and number of tokens.
Growths = dict[tuple[str, int], Growth]


def _rounded(error: float) -> str:
    return f"{error:.0e}".replace("e-0", "e-").replace("e+00", "")


def student_and_teacher(basis: str, epsilon: float) -> list[Tensor]:
    """The four tensor arguments, float64, `[1, 1, LENGTH, channels]`."""
    generator = torch.Generator().manual_seed(0)
    like = {"dtype": torch.float64, "generator": generator}
    width = BASES[basis]
    turn = torch.eye(width, dtype=torch.float64)
    if basis != "one basis":
        turn = torch.linalg.qr(torch.randn(width, width, **like)).Q
    teacher = [torch.randn(1, 1, LENGTH, TEACHER_WIDTH, **like) for _ in range(2)]
    student = []
    for tensor in teacher:
        widened = torch.nn.functional.pad(tensor, (0, width - TEACHER_WIDTH))
        student.append((widened + epsilon * torch.randn(widened.shape, **like)) @ turn)
    return [*student, *teacher]


def _loss_and_gradients(
    compare: Callable[..., Tensor], tensors: Iterable[Tensor], **options: object
) -> tuple[float, list[Tensor]]:
    tensors = [tensor.detach() for tensor in tensors]
    student = [tensor.requires_grad_() for tensor in tensors[:2]]
    # Heads of any width have the teacher's scores.
    scale = TEACHER_WIDTH**-0.5
    loss = compare(*tensors, student_scale=scale, teacher_scale=scale, **options).sum()
    return loss.item(), list(torch.autograd.grad(loss, student))


def _error(found: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> Precision:
    return Precision(
        loss=abs(found[0] / expected[0] - 1),
        gradient=max(
            ((f.double() - e.double()).norm() / e.double().norm()).item()
            for f, e in zip(found[1], expected[1], strict=True)
        ),
    )


def precisions(dtype: torch.dtype, bases: Iterable[str] = tuple(BASES)) -> Precisions:
    """Of each method on inputs of `dtype`, against float64 on the same inputs.

    The method "rounding" is float64 on inputs rounded to `dtype`, against those that were not: what
    no method can win back.
    """
    found = {}
    for basis in bases:
        for epsilon in EPSILONS:
            exact = student_and_teacher(basis, epsilon)
            inputs = [tensor.to(dtype) for tensor in exact]
            wide = [tensor.double() for tensor in inputs]
            expected = _loss_and_gradients(reference.attention_mse_sums, wide)
            for method in METHODS:
                sums = _loss_and_gradients(
                    kdfast.attention_mse, inputs, method=method, reduction="sum"
                )
                found[basis, method, epsilon] = _error(sums, expected)
            unrounded = _loss_and_gradients(reference.attention_mse_sums, exact)
            found[basis, "rounding", epsilon] = _error(expected, unrounded)
    return found


def small_precisions(sizes: Iterable[float] = SIZES) -> SmallPrecisions:
    """Of each method in float32, on a student that is smaller than its teacher."""
    found = {}
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        inputs = [
            scale * torch.randn(1, 1, LENGTH, TEACHER_WIDTH, generator=generator)
            for scale in (size, size, 1.0, 1.0)
        ]
        wide = [tensor.double() for tensor in inputs]
        expected = _loss_and_gradients(reference.attention_mse_sums, wide)
        for method in METHODS:
            sums = _loss_and_gradients(kdfast.attention_mse, inputs, method=method, reduction="sum")
            found[method, size] = _error(sums, expected)
    return found


def small_table(found: SmallPrecisions) -> str:
    """As Markdown: the errors of loss and gradient by the student's size."""
    methods = list(dict.fromkeys(method for method, _ in found))
    sizes = list(dict.fromkeys(size for _, size in found))
    rows = [[f"{size:g}", *(str(found[method, size]) for method in methods)] for size in sizes]
    header = ["size", *methods]
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def precision_table(found: Precisions) -> str:
    """As Markdown: the errors of loss and gradient by distance, a column for a basis and method."""
    columns = list(dict.fromkeys((basis, method) for basis, method, _ in found))
    header = ["ε", *(f"{method}, {basis}" for basis, method in columns)]
    rows = [
        [f"{epsilon:g}", *(str(found[basis, method, epsilon]) for basis, method in columns)]
        for epsilon in EPSILONS
    ]
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def growths(lengths: Iterable[int] = LENGTHS, repeats: int = 5) -> Growths:
    """Forward and backward of 12 heads of 64 in float32, at each length."""
    found = {}
    for length in lengths:
        members = {
            "kdfast": kdfast.attention_mse,
            "kdfast causal": partial(kdfast.attention_mse, causal=True),
        }
        if length <= LONGEST_EAGER:
            case = AttentionCase(1, 12, length, 64, 64, "float32")
            members["eager"] = partial(eager_loss(case), mask=None)
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(1, 12, length, 64, generator=generator) for _ in range(4)]
        for name, compare in members.items():
            found[name, length] = _growth(compare, tensors, repeats)
    return found


def _growth(compare: Callable[..., Tensor], tensors: list[Tensor], repeats: int) -> Growth:
    student = [tensor.requires_grad_() for tensor in tensors[:2]]

    def step() -> None:
        for leaf in student:
            leaf.grad = None
        compare(*tensors).backward()

    step()
    for leaf in student:
        leaf.grad = None
    peak_bytes = measure.peak_bytes(step) - sum(leaf.nbytes for leaf in student)
    return Growth(measure.median_seconds(step, repeats=repeats, warmup=1), peak_bytes)


def growth_table(found: Growths) -> str:
    """As Markdown: milliseconds, microseconds per token and MiB by length."""
    names = list(dict.fromkeys(name for name, _ in found))
    header = ["tokens"]
    for name in names:
        header += [f"{name}, ms", "µs a token", "MiB"]
    rows = []
    for length in dict.fromkeys(length for _, length in found):
        row = [str(length)]
        for name in names:
            growth = found.get((name, length))
            row += ["–"] * 3 if growth is None else _growth_cells(growth, length)
        rows.append(row)
    rule = ["---:"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _growth_cells(growth: Growth, length: int) -> list[str]:
    return [
        f"{growth.seconds * 1e3:.3g}",
        f"{growth.seconds * 1e6 / length:.3g}",
        f"{growth.peak_bytes / report.MIB:.0f}",
    ]


def _style(axis: Any, color: dict[str, str], x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label, color=color["text"])
    axis.set_ylabel(y_label, color=color["text"])
    axis.tick_params(which="both", colors=color["quiet"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(color["bar"])


def plot_precision(found: Precisions, theme: str, path: Path) -> None:
    """Errors of loss and gradient by distance from a teacher in another basis."""
    pyplot = report.styled_pyplot()
    color = report.THEMES[theme]
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    lines = {
        "gram": (color["quiet"], "-", 1.2),
        "tiled": (color["quiet"], "--", 1.2),
        "auto": (color["kdfast"], "-", 2.0),
    }
    for axis, part in zip(axes, ("loss", "gradient"), strict=True):
        for method, (shade, style, width) in lines.items():
            errors = [getattr(found["rotated", method, epsilon], part) for epsilon in EPSILONS]
            axis.loglog(
                EPSILONS, errors, color=shade, linestyle=style, linewidth=width, label=method
            )
        axis.invert_xaxis()
        _style(axis, color, "distance from the teacher, ε", f"relative error of the {part}")
    axes[0].legend(frameon=False, labelcolor=color["text"])
    report.save(figure, path)
    pyplot.close(figure)


def plot_growth(found: Growths, theme: str, path: Path) -> None:
    """Time and memory by length, in which a straight line of slope 1 is linear growth."""
    pyplot = report.styled_pyplot()
    color = report.THEMES[theme]
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    lines = {
        "kdfast": (color["kdfast"], "-"),
        "kdfast causal": (color["kdfast"], "--"),
        "eager": (color["quiet"], "-"),
    }
    for name, (shade, style) in lines.items():
        lengths = [length for of, length in found if of == name]
        series = (
            [found[name, length].seconds * 1e3 for length in lengths],
            [found[name, length].peak_bytes / report.MIB for length in lengths],
        )
        for axis, values in zip(axes, series, strict=True):
            axis.loglog(lengths, values, color=shade, linestyle=style, marker=".", label=name)
    for axis, label in zip(axes, ("milliseconds a step", "MiB beyond the gradients"), strict=True):
        lengths = sorted({length for _, length in found})
        axis.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
        axis.minorticks_off()
        _style(axis, color, "tokens", label)
    axes[0].legend(frameon=False, labelcolor=color["text"])
    report.save(figure, path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plots", type=Path, default=report.ROOT / "docs")
    parser.add_argument("--only", choices=("precision", "growth"))
    arguments = parser.parse_args()
    if arguments.only != "growth":
        found = precisions(torch.float32)
        print(precision_table({at: error for at, error in found.items() if at[1] != "rounding"}))
        print(small_table(small_precisions()))
        half = precisions(torch.bfloat16, ("one basis", "rotated"))
        print(precision_table(half))
        for theme in report.THEMES:
            path = arguments.plots / f"attention-mse-precision-{theme}.svg"
            plot_precision(found, theme, path)
    if arguments.only != "precision":
        measured = growths()
        print(growth_table(measured))
        for theme in report.THEMES:
            path = arguments.plots / f"attention-mse-growth-{theme}.svg"
            plot_growth(measured, theme, path)


if __name__ == "__main__":
    main()
