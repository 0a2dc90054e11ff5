"""Turn the JSON of a benchmark run into what is kept and shown: numbers, a table and plots.

    pytest bench --benchmark-json=run.json && python bench/report.py run.json

prints the tables as Markdown, keeps the reduced numbers in bench/results/DEVICE.json and draws
docs/OPERATION-DEVICE-{light,dark}.svg. What is kept of an operation is of one state of the code,
with its date and versions: a run adds to that, or replaces it where the code or a version has
changed. It reads a kept file as well as a run's, so that what is shown can be made again from what
is kept. Exits with 1 if a result of kdfast itself is wrong.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# A member's entry in the table, in the kept file and in the plot.
Measurement = dict[str, Any]
Groups = dict[str, list[Measurement]]
# Facts, date, absent members and measurements; by operation.
Run = dict[str, Any]
Runs = dict[str, Run]

MIB = 2**20

# What the middle half of a member's rounds may span, of their median.
UNSTEADY = 0.4

# How the reason begins for which a member of kdfast's own is absent, if that is none.
OWN_FAILURE = "kdfast fails: "


def operation_of(group: str) -> str:
    return group.split()[0]


def measurement(group: str, info: dict[str, Any], stats: dict[str, float]) -> Measurement:
    return {
        "group": group,
        **info,
        "seconds": stats["median"],
        "iqr_seconds": stats["iqr"],
        "rounds": stats["rounds"],
    }


def load(path: Path) -> Runs:
    """What was measured of each operation, from pytest-benchmark's JSON or from a kept file."""
    # pytest-benchmark writes no file after a run that measured nothing.
    if not path.exists():
        return {}
    run = json.loads(path.read_text())
    if "benchmarks" not in run:
        return run
    runs: Runs = {}
    for entry in run["benchmarks"]:
        operation = operation_of(entry["group"])
        if operation not in runs:
            absent = {g: who for g, who in run["absent"].items() if operation_of(g) == operation}
            runs[operation] = {
                "facts": run["facts"],
                "date": run["datetime"][:10],
                "absent": absent,
                "measurements": [],
            }
        runs[operation]["measurements"].append(
            measurement(entry["group"], entry["extra_info"], entry["stats"])
        )
    return runs


def _comparable(facts: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether measurements stand in one table: all but the driver is the same."""
    return {**facts, "driver": ""} == {**others, "driver": ""}


def done(runs: Runs, facts: dict[str, Any]) -> set[tuple[str, str]]:
    """The groups and members that need not be measured again for these facts."""
    found = set()
    for run in runs.values():
        if _comparable(run["facts"], facts):
            found |= {(entry["group"], entry["member"]) for entry in run["measurements"]}
            found |= {(group, member) for group, who in run["absent"].items() for member in who}
    return found


def merged(kept: Run, run: Run) -> Run:
    """An operation's kept run with what another one has measured; that one alone, if all differs.

    A member that was measured twice has its last numbers, in its old place.
    """
    if not _comparable(kept["facts"], run["facts"]):
        return run
    drivers = [r["facts"]["driver"] for r in (kept, run) if r["facts"].get("driver")]
    measurements = {(e["group"], e["member"]): e for e in kept["measurements"]}
    measurements |= {(e["group"], e["member"]): e for e in run["measurements"]}
    absent = {group: {**who} for group, who in kept["absent"].items()}
    for group, who in run["absent"].items():
        absent.setdefault(group, {}).update(who)
    for group, member in measurements:
        absent.get(group, {}).pop(member, None)
    return {
        "facts": run["facts"] | ({"driver": ", ".join(dict.fromkeys(drivers))} if drivers else {}),
        "date": run["date"],
        "absent": absent,
        "measurements": [*measurements.values()],
    }


def kept_path(folder: Path, facts: dict[str, Any]) -> Path:
    return folder / f"{device_slug(facts)}.json"


def keep(runs: Runs, folder: Path) -> None:
    """Add to what is kept of a device, whole or not at all."""
    path = kept_path(folder, next(iter(runs.values()))["facts"])
    kept = load(path)
    for operation, run in runs.items():
        kept[operation] = merged(kept[operation], run) if operation in kept else run
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    partial.replace(path)


def device_slug(facts: dict[str, Any]) -> str:
    """The name of a device's file: `cpu-2core`, `nvidia-h100-80gb-hbm3`."""
    if "driver" not in facts:
        return f"cpu-{facts['cores']}core"
    return re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")


def grouped(measurements: list[Measurement]) -> Groups:
    """By group, in the order measured, each member with its time relative to the group's first.

    In a group with a ceiling also relative to that.
    """
    groups: Groups = {}
    for entry in measurements:
        groups.setdefault(entry["group"], []).append(entry)
    for group, members in groups.items():
        ceiling = next((entry for entry in members if is_ceiling(entry)), None)
        groups[group] = [
            entry
            | {"relative": entry["seconds"] / members[0]["seconds"]}
            | ({"of_ceiling": entry["seconds"] / ceiling["seconds"]} if ceiling else {})
            for entry in members
        ]
    return groups


def milliseconds(seconds: float) -> str:
    thousandths = seconds * 1e3
    decimals = 2 if thousandths < 10 else 1 if thousandths < 100 else 0
    return f"{thousandths:.{decimals}f} ms"


def table(header: str, rows: list[list[str]]) -> str:
    columns = header.split(" | ")
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def _of(members: list[Measurement], name: str) -> Measurement | None:
    return next((entry for entry in members if entry["member"] == name), None)


def _is_peer(entry: Measurement) -> bool:
    hand_written = entry["member"].startswith(("kdfast", "eager", "compile"))
    return not (hand_written or is_ceiling(entry))


def is_ceiling(entry: Measurement) -> bool:
    return entry.get("is_ceiling", False)


def wrong_results_of_kdfast(runs: Runs) -> list[str]:
    return [
        f"{entry['group']}: {entry['member']}: wrong {' and '.join(entry['wrong'])}"
        for run in runs.values()
        for entry in run["measurements"]
        if entry["wrong"] and entry.get("ours", entry["member"].startswith("kdfast"))
    ]


def _fastest(members: list[Measurement], family: str = "") -> Measurement | None:
    """The fastest right one of the members whose names begin with `family`, or else a wrong one."""
    found = [entry for entry in members if entry["member"].startswith(family)]
    return min(found, key=lambda entry: (bool(entry["wrong"]), entry["seconds"]), default=None)


def _cell(entry: Measurement | None, name: str = "", decimals: int = 1) -> str:
    if entry is None:
        return "–"
    if entry["wrong"]:
        return "wrong"
    return f"{name}{milliseconds(entry['seconds'])} ({entry['relative']:.{decimals}f}×)"


def _extra_mebibytes(entry: Measurement) -> str:
    """The peak above the inputs and the gradients."""
    return f"{max(0, entry['peak_bytes'] - entry['gradient_bytes']) / MIB:.0f}"


def _extra_memory(members: list[Measurement]) -> str:
    """kdfast's, and that of the hand-written code."""
    fused, eager = _of(members, "kdfast"), _fastest(members, "eager")
    return f"{_extra_mebibytes(fused)} / {_extra_mebibytes(eager)} MiB"


def _family_cell(members: list[Measurement], family: str) -> str:
    """The time of the member that stands for a family, after what tells it from the others."""
    entry = _fastest(members, family)
    variant = entry["member"].removeprefix(family).strip() if entry else ""
    return _cell(entry, variant + " " if variant else "")


def _dense_summary(members: list[Measurement]) -> list[str]:
    fused = _of(members, "kdfast")
    peer = _fastest([entry for entry in members if _is_peer(entry) and not entry["wrong"]])
    return [
        *(_family_cell(members, family) for family in ("eager", "compile")),
        _cell(peer, peer["member"] + " " if peer else ""),
        *_bandwidth(fused),
        _extra_memory(members),
    ]


def _bandwidth(entry: Measurement) -> list[str]:
    return [f"{entry['bytes_per_second'] / 1e9:.1f} GB/s", f"{entry['share_of_copy']:.0%}"]


def _dense_details(entry: Measurement) -> list[str]:
    return [
        f"{entry['bytes_per_second'] / 1e9:.1f}",
        f"{entry['share_of_copy']:.0%}",
        _extra_mebibytes(entry),
    ]


def _linear_kd_loss_summary(members: list[Measurement]) -> list[str]:
    return [
        _cell(_of(members, "bare products"), decimals=2),
        *(_family_cell(members, family) for family in ("eager", "compile", "liger", "trl")),
        _extra_memory(members),
    ]


def _linear_kd_loss_details(entry: Measurement) -> list[str]:
    return [
        f"{entry['of_ceiling']:.2f}×" if "of_ceiling" in entry else "–",
        f"{entry['operations'] / entry['seconds'] / 1e9:.0f}",
        _extra_mebibytes(entry),
    ]


def _truncated_softmax_summary(members: list[Measurement]) -> list[str]:
    return [
        *(_family_cell(members, family) for family in ("eager", "compile")),
        _cell(_of(members, "torch.topk alone")),
        *_bandwidth(_of(members, "kdfast")),
        _extra_memory(members),
    ]


def _linear_topk_kd_loss_summary(members: list[Measurement]) -> list[str]:
    return [
        _cell(_of(members, "kdfast sparse gradient"), decimals=2),
        _cell(_of(members, "bare products"), decimals=2),
        *(_family_cell(members, family) for family in ("eager", "compile")),
        _cell(_fastest(members, "full head + topk_kd_loss")),
        _extra_memory(members),
    ]


def _linear_topk_kd_loss_details(entry: Measurement) -> list[str]:
    return [
        f"{entry['operations'] / entry['seconds'] / 1e9:.0f}",
        _extra_mebibytes(entry),
    ]


def _attention_mse_summary(members: list[Measurement]) -> list[str]:
    families = ("eager", "compile", "tinybert", "textbrewer")
    return [*(_family_cell(members, family) for family in families), _extra_memory(members)]


def _hidden_mse_summary(members: list[Measurement]) -> list[str]:
    ceiling = _fastest([entry for entry in members if is_ceiling(entry)], "bare products float32")
    families = ("eager", "compile", "textbrewer")
    return [
        _cell(ceiling or _of(members, "bare products"), decimals=2),
        *(_family_cell(members, family) for family in families),
        _extra_memory(members),
    ]


def _hidden_cosine_summary(members: list[Measurement]) -> list[str]:
    families = ("eager", "compile", "textbrewer")
    return [
        *(_family_cell(members, family) for family in families),
        *_bandwidth(_of(members, "kdfast")),
        _extra_memory(members),
    ]


def _training_step_summary(members: list[Measurement]) -> list[str]:
    fused, eager = _of(members, "kdfast"), _of(members, "eager")

    def shares(part: str) -> str:
        """Of what the two steps take beyond a part of them, each beyond its own."""
        steps = [step for step in (fused, eager) if part in step["part_seconds"]]
        found = (f"{1 - step['part_seconds'][part] / step['seconds']:.1%}" for step in steps)
        return " / ".join(found) or "–"

    models = (milliseconds(step["part_seconds"]["models"]) for step in (fused, eager))
    return [
        _cell(eager, decimals=2),
        " / ".join(models),
        shares("models"),
        shares("projected models"),
        _extra_memory(members),
    ]


@dataclass(frozen=True)
class Layout:
    """What an operation's tables show besides times, and who is in them."""

    summary_header: str
    summary_cells: Callable[[list[Measurement]], list[str]]
    details_header: str
    details_cells: Callable[[Measurement], list[str]]


# Of a training step on logits that are there.
DENSE = Layout(
    "eager | torch.compile | fastest peer | kdfast moves | of a copy"
    " | extra memory, kdfast / eager",
    _dense_summary,
    "GB/s | of a copy | extra MiB",
    _dense_details,
)
LAYOUTS = {
    "kd_loss": DENSE,
    "linear_kd_loss": Layout(
        "bare products | eager | torch.compile | Liger | TRL | extra memory, kdfast / eager",
        _linear_kd_loss_summary,
        "× products | GFLOP/s | extra MiB",
        _linear_kd_loss_details,
    ),
    "truncated_softmax": Layout(
        "eager | torch.compile | torch.topk alone | kdfast moves | of a copy"
        " | extra memory, kdfast / eager",
        _truncated_softmax_summary,
        "GB/s | of a copy | extra MiB",
        _dense_details,
    ),
    "topk_kd_loss": DENSE,
    "linear_topk_kd_loss": Layout(
        "sparse gradient | bare products | eager | torch.compile | full head + topk_kd_loss"
        " | extra memory, kdfast / eager",
        _linear_topk_kd_loss_summary,
        "GFLOP/s | extra MiB",
        _linear_topk_kd_loss_details,
    ),
    "attention_mse": Layout(
        "eager | torch.compile | TinyBERT | TextBrewer | extra memory, kdfast / eager",
        _attention_mse_summary,
        "extra MiB",
        lambda entry: [_extra_mebibytes(entry)],
    ),
    "hidden_mse": Layout(
        "bare products | eager | torch.compile | TextBrewer | extra memory, kdfast / eager",
        _hidden_mse_summary,
        "GB/s | of a copy | extra MiB",
        _dense_details,
    ),
    "hidden_cosine": Layout(
        "eager | torch.compile | TextBrewer | kdfast moves | of a copy"
        " | extra memory, kdfast / eager",
        _hidden_cosine_summary,
        "GB/s | of a copy | extra MiB",
        _dense_details,
    ),
    "training_step": Layout(
        "the papers' code | models alone, kdfast's / the papers'"
        " | loss in the step, kdfast / the papers' code | with the projection in the student"
        " | extra memory, kdfast / the papers' code",
        _training_step_summary,
        "× models | extra MiB",
        lambda entry: [
            f"{entry['of_ceiling']:.2f}×" if "of_ceiling" in entry else "–",
            _extra_mebibytes(entry),
        ],
    ),
}


def summary(operation: str, groups: Groups) -> str:
    """One line for each group that was measured by hand-written code too."""
    rows = []
    for group, members in groups.items():
        fused, eager = _of(members, "kdfast"), _fastest(members, "eager")
        if fused is None or eager is None:
            continue
        time = milliseconds(fused["seconds"]) if not fused["wrong"] else "wrong"
        rows.append([group, time, *LAYOUTS[operation].summary_cells(members)])
    return table(f"case | kdfast | {LAYOUTS[operation].summary_header}", rows)


# What the README begins with: a case or two of every operation.
HEADLINES = (
    "kd_loss 512×50257 float32",
    "kd_loss 128×128256 bfloat16",
    "linear_kd_loss 1024×256/512×50257 float32",
    "truncated_softmax 512×50257 float32 k=64",
    "topk_kd_loss 512×50257 float32 k=64 bucket",
    "linear_topk_kd_loss 1024×512×128256 float32 k=64 support",
    "attention_mse 8×12×128×64 float32",
    "attention_mse 8×12×512×64 float32",
    "hidden_mse 8192×312→768 float32",
    "hidden_cosine 8192×768 float32",
)


def headline(runs: Runs) -> str:
    """One line for each of the HEADLINES, with the fastest of everybody else's right results."""
    rows = []
    for group, members in grouped(
        [e for run in runs.values() for e in run["measurements"]]
    ).items():
        if group not in HEADLINES:
            continue
        others = [
            entry
            for entry in members
            if not (entry["wrong"] or is_ceiling(entry))
            and not entry["member"].startswith(("kdfast", "eager", "full head"))
        ]
        fastest = _fastest(others)
        name = fastest["member"].replace("compile", "torch.compile") + " " if fastest else ""
        rows.append(
            [
                group,
                milliseconds(_of(members, "kdfast")["seconds"]),
                _cell(_fastest(members, "eager")),
                _cell(fastest, name),
                _extra_memory(members),
            ]
        )
    header = "case | kdfast | PyTorch by hand | fastest of the others"
    return table(f"{header} | extra memory, kdfast / by hand", rows)


def unsteady(groups: Groups) -> list[str]:
    """Members whose rounds differ so much that their median says little."""
    return [
        f"Unsteady: {group}: {entry['member']}: its middle half spans "
        f"{entry['iqr_seconds'] / entry['seconds']:.0%} of its median."
        for group, members in groups.items()
        for entry in members
        if entry["iqr_seconds"] > UNSTEADY * entry["seconds"]
    ]


def details(operation: str, group: str, members: list[Measurement]) -> str:
    """Everything that was measured of one group."""
    layout = LAYOUTS[operation]
    terms = list(dict.fromkeys(term for entry in members for term in entry["errors"]))

    def result(entry: Measurement) -> str:
        if is_ceiling(entry):
            return "a part of the work"
        return "agrees" if not entry["wrong"] else f"**wrong {' and '.join(entry['wrong'])}**"

    rows = [
        [
            entry["member"],
            milliseconds(entry["seconds"]) + f" ± {entry['iqr_seconds'] * 5e2:.1f}",
            f"{entry['relative']:.2f}×",
            *layout.details_cells(entry),
            *(f"{entry['errors'][term]:.1e}" if entry["errors"] else "–" for term in terms),
            result(entry),
        ]
        for entry in members
    ]
    errors = " | ".join(f"{term} error" for term in terms)
    header = f"{group} | median | relative | {layout.details_header} | {errors} | result"
    return table(header, rows)


def markdown(operation: str, run: Run) -> str:
    """An operation's report: the summary, what it was measured on, every group, who was absent."""
    groups = grouped(run["measurements"])
    facts = run["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    settings = ", ".join(
        f"{name} {facts[name]}" for name in ("cores", "threads", "driver", "cuda") if name in facts
    )
    missing = {
        member: reason for members in run["absent"].values() for member, reason in members.items()
    }
    parts = [
        summary(operation, groups),
        f"Measured {run['date']} on {facts['device']} ({facts['system']}, {settings}; "
        f"python {facts['python']}, {versions}). Medians of one run; extra memory is the peak "
        "above the inputs and the gradients.",
        *(details(operation, group, members) for group, members in groups.items()),
        *unsteady(groups),
        *(f"Absent: {member}: {reason}." for member, reason in missing.items()),
    ]
    return "\n\n".join(parts) + "\n"


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no {begin.strip()} … {end}")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")


THEMES = {
    "light": {"text": "#1f2328", "quiet": "#59636e", "bar": "#afb8c1", "kdfast": "#0969da"},
    "dark": {"text": "#f0f6fc", "quiet": "#9198a1", "bar": "#4b535d", "kdfast": "#4493f8"},
}


def styled_pyplot() -> Any:
    """Matplotlib as every plot of the documentation has it."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 10,
            "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
            "hatch.linewidth": 0.5,
            # Text stays text, and the same numbers give the same file.
            "svg.fonttype": "none",
            "svg.hashsalt": "kdfast",
        }
    )
    return pyplot


def save(figure: Any, path: Path) -> None:
    """On a transparent ground, and the same file every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def plot(groups: Groups, theme: str, path: Path) -> None:
    """Horizontal bars of time of one operation, one panel per group."""
    pyplot = styled_pyplot()
    color = THEMES[theme]
    columns = min(2, len(groups))
    panels = [list(groups.items())[i : i + columns] for i in range(0, len(groups), columns)]
    bars = [max(len(members) for _, members in row) for row in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        columns,
        figsize=(5.5 * columns, 0.3 + sum(0.27 * count + 0.55 for count in bars)),
        height_ratios=bars,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    operation = operation_of(next(iter(groups)))
    figure.suptitle(operation, x=0.01, ha="left", color=color["text"], fontweight="bold")
    for row, panel, count in zip(axes, panels, bars, strict=True):
        for axis, (group, members) in zip(row, panel, strict=False):
            title = group.removeprefix(operation).strip()
            _panel(axis, title, sorted(members, key=lambda entry: entry["seconds"]), color)
            # Bars are equally thick all along a row of panels; the fastest is on top.
            axis.set_ylim(count - 0.5, -0.5)
    save(figure, path)
    pyplot.close(figure)


def _panel(axis: Any, title: str, members: list[Measurement], color: dict[str, str]) -> None:
    axis.axis("on")
    axis.set_title(title, loc="left", color=color["text"], fontweight="bold")
    longest = max(entry["seconds"] for entry in members)
    for place, entry in enumerate(members):
        ours = entry["member"].startswith("kdfast")
        fill = color["kdfast"] if ours else color["bar"]
        solid = not (entry["wrong"] or is_ceiling(entry))
        axis.barh(
            place,
            entry["seconds"],
            height=0.72,
            color=fill if solid else "none",
            edgecolor=fill,
            hatch="////" if entry["wrong"] else None,
        )
        label = milliseconds(entry["seconds"])
        if not ours:
            label += f" · {entry['relative']:.1f}×"
        if entry["wrong"]:
            label += " · wrong"
        if is_ceiling(entry):
            label += " · a part"
        axis.text(
            entry["seconds"] + 0.015 * longest,
            place,
            label,
            va="center",
            color=color["text"] if ours else color["quiet"],
            fontweight="bold" if ours else "normal",
        )
    axis.set_yticks(range(len(members)), [entry["member"] for entry in members])
    axis.tick_params(axis="y", length=0, labelcolor=color["text"])
    # Room for the longest bar's label.
    axis.set_xlim(0, 1.4 * longest)
    axis.xaxis.set_visible(False)
    axis.spines[:].set_visible(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="pytest-benchmark's JSON, or a kept file")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs")
    parser.add_argument(
        "--into", type=Path, help="also write the summaries between a file's OPERATION markers"
    )
    parser.add_argument(
        "--headline", type=Path, help="also write what is kept between a file's headline markers"
    )
    arguments = parser.parse_args()
    runs = load(arguments.run)
    if not runs:
        print(f"nothing was measured: there is no {arguments.run}")
        return 0

    slug = device_slug(next(iter(runs.values()))["facts"])
    keep(runs, arguments.results)
    for operation, run in runs.items():
        print(markdown(operation, run))
        groups = grouped(run["measurements"])
        # A comma parts a variant from the case that everybody takes part in.
        main_groups = {g: members for g, members in groups.items() if "," not in g}
        for theme in THEMES:
            plot(main_groups, theme, arguments.plots / f"{operation}-{slug}-{theme}.svg")
        if arguments.into:
            write_between_markers(arguments.into, operation, summary(operation, groups))
    if arguments.headline:
        kept = load(kept_path(arguments.results, next(iter(runs.values()))["facts"]))
        write_between_markers(arguments.headline, "headline", headline(kept))
    return int(bool(wrong_results_of_kdfast(runs)))


if __name__ == "__main__":
    sys.exit(main())
