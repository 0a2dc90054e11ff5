"""Turn the JSON of a benchmark run into what is kept and shown: numbers, a table and plots.

    pytest bench --benchmark-json=run.json && python bench/report.py run.json

prints the tables as Markdown, keeps the reduced numbers as bench/results/DEVICE.json and draws
docs/OPERATION-DEVICE-{light,dark}.svg. It reads a kept file as well as a run's, so that what is
shown can be made again from what is kept. Exits with 1 if a result of kdfast itself is wrong.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# A member's entry in the table, in the kept file and in the plot.
Measurement = dict[str, Any]
Groups = dict[str, list[Measurement]]

MIB = 2**20


def load(path: Path) -> dict[str, Any]:
    """What was measured, from pytest-benchmark's JSON or from a kept file; {} if nothing was."""
    # pytest-benchmark writes no file after a run that measured nothing.
    if not path.exists():
        return {}
    run = json.loads(path.read_text())
    if "measurements" in run:
        return run
    return {
        "facts": run["facts"],
        "date": run["datetime"][:10],
        "absent": run["absent"],
        "measurements": [
            {
                "group": entry["group"],
                **entry["extra_info"],
                "seconds": entry["stats"]["median"],
                "iqr_seconds": entry["stats"]["iqr"],
                "rounds": entry["stats"]["rounds"],
            }
            for entry in run["benchmarks"]
        ],
    }


def device_slug(facts: dict[str, Any]) -> str:
    """The name of a device's file: `cpu-2core`, `nvidia-h100-80gb-hbm3`."""
    if "driver" not in facts:
        return f"cpu-{facts['cores']}core"
    return re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")


def grouped(measurements: list[Measurement]) -> Groups:
    """By group, in the order measured, each member with its time relative to the group's first."""
    groups: Groups = {}
    for entry in measurements:
        members = groups.setdefault(entry["group"], [])
        baseline = members[0] if members else entry
        members.append(entry | {"relative": entry["seconds"] / baseline["seconds"]})
    return groups


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1e3
    decimals = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:.{decimals}f} ms"


def _table(header: str, rows: list[list[str]]) -> str:
    columns = header.split(" | ")
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def _of(members: list[Measurement], name: str) -> Measurement | None:
    return next((entry for entry in members if entry["member"] == name), None)


def _is_peer(entry: Measurement) -> bool:
    return not entry["member"].startswith(("kdfast", "eager", "compile"))


def summary(groups: Groups) -> str:
    """One line for each group that was measured by hand-written code too: the README's table."""

    def cell(entry: Measurement | None, name: str = "") -> str:
        if entry is None:
            return "–"
        if entry["wrong"]:
            return "wrong"
        return f"{name}{_milliseconds(entry['seconds'])} ({entry['relative']:.1f}×)"

    rows = []
    for group, members in groups.items():
        fused, eager = _of(members, "kdfast"), _of(members, "eager")
        if fused is None or eager is None:
            continue
        peers = [entry for entry in members if _is_peer(entry) and not entry["wrong"]]
        peer = min(peers, key=lambda entry: entry["seconds"], default=None)
        rows.append(
            [
                group,
                _milliseconds(fused["seconds"]) if not fused["wrong"] else "wrong",
                cell(eager),
                cell(_of(members, "compile")),
                cell(peer, peer["member"] + " " if peer else ""),
                f"{fused['bytes_per_second'] / 1e9:.1f} GB/s",
                f"{fused['share_of_copy']:.0%}",
                f"{fused['peak_bytes'] / MIB:.0f} / {eager['peak_bytes'] / MIB:.0f} MiB",
            ]
        )
    return _table(
        "case | kdfast | eager | torch.compile | fastest peer | kdfast moves | of a copy"
        " | extra memory, kdfast / eager",
        rows,
    )


def details(group: str, members: list[Measurement]) -> str:
    """Everything that was measured of one group."""
    terms = list(members[0]["errors"])
    rows = [
        [
            entry["member"],
            _milliseconds(entry["seconds"]) + f" ± {entry['iqr_seconds'] * 5e2:.1f}",
            f"{entry['relative']:.2f}×",
            f"{entry['bytes_per_second'] / 1e9:.1f}",
            f"{entry['share_of_copy']:.0%}",
            f"{entry['peak_bytes'] / MIB:.0f}",
            *(f"{entry['errors'][term]:.1e}" for term in terms),
            "agrees" if not entry["wrong"] else f"**wrong {' and '.join(entry['wrong'])}**",
        ]
        for entry in members
    ]
    errors = " | ".join(f"{term} error" for term in terms)
    header = f"{group} | median | relative | GB/s | of a copy | extra MiB | {errors} | result"
    return _table(header, rows)


def markdown(run: dict[str, Any]) -> str:
    """The whole report: the summary, what it was measured on, every group, and who was absent."""
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
        summary(groups),
        f"Measured {run['date']} on {facts['device']} ({facts['system']}, {settings}; "
        f"python {facts['python']}, {versions}). Medians of one run; extra memory is the peak "
        "above the inputs.",
        *(details(group, members) for group, members in groups.items()),
        *(f"Absent: {member}: {reason}." for member, reason in missing.items()),
    ]
    return "\n\n".join(parts) + "\n"


def write_between_markers(path: Path, operation: str, text: str) -> None:
    """Replace what stands between `<!-- OPERATION:begin -->` and `<!-- OPERATION:end -->`."""
    begin, end = f"<!-- {operation}:begin -->\n", f"<!-- {operation}:end -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no {begin.strip()} … {end}")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")


THEMES = {
    "light": {"text": "#1f2328", "quiet": "#59636e", "bar": "#afb8c1", "kdfast": "#0969da"},
    "dark": {"text": "#f0f6fc", "quiet": "#9198a1", "bar": "#4b535d", "kdfast": "#4493f8"},
}


def plot(groups: Groups, theme: str, path: Path) -> None:
    """Horizontal bars of time, one panel per group, on a transparent ground."""
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
    color = THEMES[theme]
    columns = min(2, len(groups))
    panels = [list(groups.items())[i : i + columns] for i in range(0, len(groups), columns)]
    bars = [max(len(members) for _, members in row) for row in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        columns,
        figsize=(5.5 * columns, sum(0.27 * count + 0.55 for count in bars)),
        height_ratios=bars,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    for row, panel, count in zip(axes, panels, bars, strict=True):
        for axis, (group, members) in zip(row, panel, strict=False):
            _panel(axis, group, sorted(members, key=lambda entry: entry["seconds"]), color)
            # Bars are equally thick all along a row of panels; the fastest is on top.
            axis.set_ylim(count - 0.5, -0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def _panel(axis: Any, group: str, members: list[Measurement], color: dict[str, str]) -> None:
    axis.axis("on")
    axis.set_title(group, loc="left", color=color["text"], fontweight="bold")
    longest = max(entry["seconds"] for entry in members)
    for place, entry in enumerate(members):
        ours = entry["member"].startswith("kdfast")
        fill = color["kdfast"] if ours else color["bar"]
        right = not entry["wrong"]
        axis.barh(
            place,
            entry["seconds"],
            height=0.72,
            color=fill if right else "none",
            edgecolor=fill,
            hatch=None if right else "////",
        )
        label = _milliseconds(entry["seconds"])
        if not ours:
            label += f" · {entry['relative']:.1f}×"
        if not right:
            label += " · wrong"
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
        "--into", type=Path, help="also write the summary between a file's OPERATION markers"
    )
    arguments = parser.parse_args()
    run = load(arguments.run)
    if not run:
        print(f"nothing was measured: there is no {arguments.run}")
        return 0

    print(markdown(run))
    slug = device_slug(run["facts"])
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{slug}.json").write_text(json.dumps(run, indent=1) + "\n")
    groups = grouped(run["measurements"])
    for operation in dict.fromkeys(group.split()[0] for group in groups):
        of_operation = {g: members for g, members in groups.items() if g.split()[0] == operation}
        # A comma parts a variant from the case that everybody takes part in.
        main_groups = {g: members for g, members in of_operation.items() if "," not in g}
        for theme in THEMES:
            plot(main_groups, theme, arguments.plots / f"{operation}-{slug}-{theme}.svg")
        if arguments.into:
            write_between_markers(arguments.into, operation, summary(of_operation))
    ours = [entry for entry in run["measurements"] if entry["member"].startswith("kdfast")]
    return int(any(entry["wrong"] for entry in ours))


if __name__ == "__main__":
    sys.exit(main())
