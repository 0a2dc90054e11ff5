"""One table of everything that is kept of a GPU, and how it stands to the project's targets.

    make gpu-bench

ends with this. Exits with 1 if a result of kdfast is wrong or one of its calls failed. By itself,
`python bench/side_by_side.py bench/results/DEVICE.json` shows a file again.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from report import MIB, Groups, Measurement, Runs

# Columns: members by what their names begin with. The fastest right one stands for its family.
FAMILIES = (
    "kdfast cuda",
    "kdfast triton",
    "kdfast gram",
    "kdfast tiled",
    "bare products",
    "bare models",
    "eager",
    "compile",
    "liger",
    "trl",
    "speculators",
    "textbrewer",
    "tinybert",
    "distillkit",
    "full head",
    "torch.topk",
)
YARDSTICKS = ("quack", "cut-cross-entropy")


def _is_main(entry: Measurement) -> bool:
    """A comma parts a variant from the case that everybody takes part in."""
    return "," not in entry["group"]


def _others(members: list[Measurement]) -> list[Measurement]:
    """Whoever computes the same, and right."""
    return [
        entry
        for entry in members
        if not (entry["member"].startswith("kdfast") or report.is_ceiling(entry) or entry["wrong"])
    ]


def _ratio(entries: list[Measurement], family: str = "") -> float | None:
    """How much longer the fastest one takes than kdfast."""
    found = [entry["relative"] for entry in entries if entry["member"].startswith(family)]
    return min(found, default=None)


def _share_of_copy(members: list[Measurement], member: str) -> float | None:
    return next((entry["share_of_copy"] for entry in members if entry["member"] == member), None)


def _of_triton(members: list[Measurement]) -> float | None:
    """Where kdfast has no other kernel, it is Triton's."""
    alone = _share_of_copy(members, "kdfast triton")
    return _share_of_copy(members, "kdfast") if alone is None else alone


@dataclass(frozen=True)
class Target:
    """What one number of some groups is to be, in the worst of them.

    Args:
        text: what is asked for.
        operation: whose groups.
        concerns: which of them, from kdfast's own measurement.
        number: of a group's members; None where it was not measured.
        bound: the least, or the most.
        at_least: which of the two.
        shown: how the number is written.
    """

    text: str
    operation: str
    concerns: Callable[[Measurement], bool]
    number: Callable[[list[Measurement]], float | None]
    bound: float
    at_least: bool = True
    shown: str = "{:.2f}×"

    def row(self, groups: Groups) -> list[str]:
        concerned = [members for members in groups.values() if self.concerns(members[0])]
        numbers = [n for n in map(self.number, concerned) if n is not None]
        sign = "≥" if self.at_least else "≤"
        asked = f"{sign} {self.shown.format(self.bound)}"
        if any(members[0]["wrong"] for members in concerned):
            return [self.text, asked, "wrong", "no"]
        if not numbers:
            return [self.text, asked, "not measured", "–"]
        worst = min(numbers) if self.at_least else max(numbers)
        met = worst >= self.bound if self.at_least else worst <= self.bound
        return [self.text, asked, self.shown.format(worst), "yes" if met else "no"]


def _large_bfloat16(entry: Measurement) -> bool:
    return _is_main(entry) and entry["vocab"] >= 128_000 and entry["dtype"] == "bfloat16"


def _large_head(entry: Measurement) -> bool:
    widths = entry["rows"], entry["student_width"], entry["teacher_width"], entry["vocab"]
    return _is_main(entry) and widths == (8192, 4096, 4096, 128256)


def _large_selection(entry: Measurement) -> bool:
    return entry["vocab"] == 128256 and entry["k"] == 64


# Set for an H200.
TARGETS = (
    Target(
        "kd_loss, training step, bf16, V ≥ 128k: of a copy",
        "kd_loss",
        _large_bfloat16,
        lambda members: _share_of_copy(members, "kdfast"),
        0.85,
        shown="{:.0%}",
    ),
    Target(
        "the same in Triton alone",
        "kd_loss",
        _large_bfloat16,
        _of_triton,
        0.60,
        shown="{:.0%}",
    ),
    Target(
        "the same against the fastest peer",
        "kd_loss",
        _large_bfloat16,
        lambda members: _ratio(_others(members)),
        1.5,
    ),
    Target(
        "linear_kd_loss, N = 8192, H = 4096, V = 128256: of the four bare products",
        "linear_kd_loss",
        _large_head,
        lambda members: members[0].get("of_ceiling"),
        1.15,
        at_least=False,
    ),
    Target(
        "the same above inputs and gradients",
        "linear_kd_loss",
        _large_head,
        lambda members: (members[0]["peak_bytes"] - members[0]["gradient_bytes"]) / 1e9,
        1.5,
        at_least=False,
        shown="{:.2f} GB",
    ),
    Target(
        "the same against the fastest peer",
        "linear_kd_loss",
        _large_head,
        lambda members: _ratio(_others(members)),
        1.0,
    ),
    Target(
        "truncated_softmax, V = 128256, k = 64: of one read at a copy's rate",
        "truncated_softmax",
        _large_selection,
        lambda members: 1 / members[0]["share_of_copy"],
        1.5,
        at_least=False,
    ),
    Target(
        "the same against torch.topk + logsumexp",
        "truncated_softmax",
        _large_selection,
        lambda members: _ratio(_others(members), "eager logsumexp"),
        5.0,
    ),
    Target(
        "attention_mse, S = 512: against eager",
        "attention_mse",
        lambda entry: _is_main(entry) and entry["tokens"] == 512,
        lambda members: _ratio(_others(members), "eager"),
        4.0,
    ),
    Target(
        "attention_mse, S = 8192: against eager",
        "attention_mse",
        lambda entry: _is_main(entry) and entry["tokens"] == 8192,
        lambda members: _ratio(_others(members), "eager"),
        40.0,
    ),
    Target(
        "attention_mse, every shape: against eager",
        "attention_mse",
        lambda entry: True,
        lambda members: _ratio(_others(members), "eager"),
        1.0,
    ),
)


def _family_cell(members: list[Measurement], absent: dict[str, str], family: str) -> str:
    entries = [entry for entry in members if entry["member"].startswith(family)]
    ratio = _ratio([entry for entry in entries if not entry["wrong"]])
    if ratio is not None:
        return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×"
    if entries:
        return "wrong"
    reasons = [reason for member, reason in absent.items() if member.startswith(family)]
    return "no memory" if any("out of memory" in reason for reason in reasons) else "–"


def _own_groups(runs: Runs) -> dict[str, Groups]:
    """Those with kdfast first, by operation, with what `report.grouped` adds."""
    found = {}
    for operation, run in runs.items():
        groups = report.grouped(run["measurements"])
        found[operation] = {g: m for g, m in groups.items() if m[0]["member"] == "kdfast"}
    return found


def comparison(runs: Runs) -> str:
    """Every case: kdfast, how near it is to the limit, its memory, and everybody's multiple."""
    rows = []
    for operation, groups in _own_groups(runs).items():
        for group, members in groups.items():
            fused = members[0]
            # Of a training step, that of its models is known better.
            limit = next(
                (entry["seconds"] for entry in members if entry["member"] == "bare models"),
                fused["limit_seconds"],
            )
            extra = (fused["peak_bytes"] - fused["gradient_bytes"]) / MIB
            absent = runs[operation]["absent"].get(group, {})
            rows.append(
                [
                    group,
                    "wrong" if fused["wrong"] else report.milliseconds(fused["seconds"]),
                    f"{limit / fused['seconds']:.0%}",
                    f"{extra:.0f}",
                    *(_family_cell(members, absent, family) for family in FAMILIES),
                ]
            )
    header = ["case", "kdfast", "of the limit", "extra MiB", *FAMILIES]
    shown = [
        column
        for column in range(len(header))
        if column < 4 or any(row[column] != "–" for row in rows)
    ]
    rows = [[row[column] for column in shown] for row in rows]
    return report.table(" | ".join(header[column] for column in shown), rows)


def yardsticks(runs: Runs) -> str:
    """What others reach who compute a part, or something else."""
    rows = [
        [
            entry["group"],
            entry["member"],
            report.milliseconds(entry["seconds"]),
            f"{entry['share_of_copy']:.0%}",
            f"{entry['peak_bytes'] / MIB:.0f}",
        ]
        for run in runs.values()
        for entry in run["measurements"]
        if entry["member"].startswith(YARDSTICKS)
    ]
    return report.table("case | yardstick | median | of a copy | extra MiB", rows) if rows else ""


def targets(runs: Runs) -> str:
    groups = _own_groups(runs)
    rows = [target.row(groups.get(target.operation, {})) for target in TARGETS]
    return report.table("target, set for an H200 | asked | measured | met", rows)


def absences(runs: Runs) -> list[str]:
    """Who was not measured and why; each reason once, with the cases where it was not all."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs.values():
        for group, who in run["absent"].items():
            for member, reason in who.items():
                found.setdefault((member, reason), []).append(group)
    return [
        f"Absent: {member}: {reason} ({groups[0]}"
        + (f" and {len(groups) - 1} more)." if len(groups) > 1 else ").")
        for (member, reason), groups in found.items()
    ]


def _conditions(runs: Runs) -> str:
    """What was measured on, and how: one line for each state of the code or of the versions."""
    lines = {}
    for operation, run in runs.items():
        facts = run["facts"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        settings = ", ".join(
            f"{name} {facts[name]}" for name in ("driver", "cuda", "threads") if name in facts
        )
        line = (
            f"{facts['device']} ({settings}; python {facts['python']}, {versions}; code "
            f"{facts['code']})"
        )
        lines.setdefault(line, []).append(operation)
    clocks = [
        int(entry["clocks"]["cores"])
        for run in runs.values()
        for entry in run["measurements"]
        if entry.get("clocks", {}).get("cores", "").isdigit()
    ]
    ran = f" The cores ran at {min(clocks)} to {max(clocks)} MHz." if clocks else ""
    return "\n\n".join(
        [f"{', '.join(operations)}: {line}" for line, operations in lines.items()]
        + [
            "Medians; on a GPU of the device's own time, its caches flushed before each round. "
            "The limit is the time of a copy of the bytes that must move, or of the matrix "
            "products at the rate of a large one, whichever is longer; of a training step, that "
            "of its models alone. Extra memory is the peak above the inputs, and above the "
            "gradients of whoever starts from hidden states or attention inputs. Others in "
            f"multiples of kdfast's time.{ran}"
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="default: the one of this machine's GPU")
    parser.add_argument("--results", type=Path, default=report.ROOT / "bench" / "results")
    arguments = parser.parse_args()
    path = arguments.file
    if path is None:
        if not torch.cuda.is_available():
            print("no CUDA device found: nothing was measured")
            return 0
        facts = {"driver": "", "device": torch.cuda.get_device_name()}
        path = report.kept_path(arguments.results, facts)
    runs = report.load(path)
    if not runs:
        print(f"nothing was measured: there is no {path}")
        return 0
    failures = report.wrong_results_of_kdfast(runs) + [
        f"{group}: {member}: {reason}"
        for run in runs.values()
        for group, who in run["absent"].items()
        for member, reason in who.items()
        if reason.startswith(report.OWN_FAILURE)
    ]
    parts = (comparison(runs), yardsticks(runs), targets(runs), _conditions(runs))
    print("\n\n".join([*filter(None, parts), *absences(runs), *failures]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
