"""Which launches of its Triton kernels a GPU likes best, row by row of kernels/tuning.py.

    make gpu-tune TABLE=KD_LOSS

For each row of a table, or of all: the launch that it has and a handful around it, at widths that
the row serves. A launch whose result disagrees with the benchmarks' float64 reference is out. All
measurements are kept in bench/results/tuning-DEVICE.json, from where a row that is faster goes into
its table's `measured`. CLUSTER_BLOCKS is how many blocks of the CUDA kernel share a row of kd_loss,
which csrc/cuda/kd_loss.cu plans.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attention_mse_peers
import bench_attention_mse
import bench_hidden
import bench_kd_loss
import bench_linear_topk_kd_loss
import bench_topk_kd_loss
import bench_truncated_softmax
import hidden_peers
import kd_loss_peers
import linear_topk_kd_loss_peers
import measure
import report
import topk_kd_loss_peers
import torch
import truncated_softmax_peers
from facts import facts_of
from kdfast.kernels import tuning
from kdfast.kernels.gradient import scale_gradient_
from measure import Trial
from peers import Member

import kdfast
from kdfast.ops import kd_loss as kd_loss_operation

Launch = dict[str, int]

# Widths that users have; a row is measured at those that it serves.
VOCABULARIES = (2048, 32000, 50257, 128256, 262144)
WIDTHS = (312, 768, 2048, 4096)
DTYPES = {2: "bfloat16", 4: "float32"}

# Elements of one side: far more than an L2 holds, and a millisecond or so.
ELEMENTS = 2**28
ROUNDS = 20

# Of a row's widths, and of the launches around its own.
MOST = 10

# What a faster launch has to save, to be no noise.
MARGIN = 0.03

# The least and the most of an option; of all others, what a tile can have.
LIMITS = {"num_warps": (1, 32), "num_stages": (1, 4), "STAGES": (1, 8), "maxnreg": (32, 255)}
TILE_LIMITS = (16, 16384)


@dataclass(frozen=True)
class Setting:
    """Where to measure; `quick`: whether everything works, not how fast."""

    device: str
    quick: bool = False

    @property
    def rounds(self) -> int:
        return 1 if self.quick else ROUNDS

    def rows(self, width: int) -> int:
        return 1 if self.quick else max(1, ELEMENTS // width)

    def some(self, of: list) -> list:
        return of[: 1 if self.quick else MOST]


@dataclass(frozen=True)
class Row:
    """A launch that a table holds, and the work that shows how good it is.

    Args:
        table: its name.
        place: where it stands in its table, for people.
        launch: what it is.
        candidates: others to try.
        trials: by shape, what makes the work.
        launching: makes the kernels take another launch.
    """

    table: str
    place: str
    launch: Launch
    candidates: list[Launch]
    trials: dict[str, Callable[[], Trial]]
    launching: Callable[[Launch], Any]


def neighbours(launch: Launch) -> list[Launch]:
    """One option halved or doubled, and the first with the warps, which share its columns."""

    def fits(option: str, value: int) -> bool:
        least, most = LIMITS.get(option, TILE_LIMITS)
        return least <= value <= most

    first, *_ = launch
    changes = [{option} for option in launch] + [{first, "num_warps"}]
    found = []
    for options in changes:
        for halved in (True, False):
            changed = {o: launch[o] // 2 if halved else launch[o] * 2 for o in options}
            if all(fits(option, value) for option, value in changed.items()):
                found.append(launch | changed)
    return found


def _in_triton(trial_of: Callable, case: Any, loss_of: Callable) -> Trial:
    return trial_of(case, Member("kdfast triton", loss_of, backend="triton"))


def _kd_loss(setting: Setting, vocab: int, dtype: str) -> Trial:
    case = kd_loss_peers.Case(setting.rows(vocab), vocab, dtype, setting.device)
    return _in_triton(bench_kd_loss.trial_of, case, kd_loss_peers.kdfast_loss)


def _truncated_softmax(setting: Setting, vocab: int, dtype: str) -> Trial:
    case = truncated_softmax_peers.TruncatedCase(
        setting.rows(vocab), vocab, dtype, setting.device, k=64
    )
    selection = truncated_softmax_peers.kdfast_selection
    return _in_triton(bench_truncated_softmax.trial_of, case, selection)


def _topk_kd_loss(setting: Setting, vocab: int, dtype: str, k: int = 64) -> Trial:
    case = topk_kd_loss_peers.TopKCase(setting.rows(vocab), vocab, dtype, setting.device, k=k)
    return _in_triton(bench_topk_kd_loss.trial_of, case, topk_kd_loss_peers.kdfast_loss)


def _hidden(operation: str) -> Callable[[Setting, int, str], Trial]:
    def trial(setting: Setting, width: int, dtype: str) -> Trial:
        case = hidden_peers.HiddenCase(
            operation, setting.rows(width), width, width, dtype, setting.device
        )
        return _in_triton(bench_hidden.trial_of, case, hidden_peers.kdfast_loss)

    return trial


def _scaled_gradient(setting: Setting, vocab: int, dtype: str) -> Trial:
    like = {"dtype": getattr(torch, dtype), "device": setting.device}
    original = torch.randn(setting.rows(vocab), vocab, **like)
    gradient, incoming = original.clone(), torch.tensor(2.0, device=setting.device)
    return Trial(
        step=lambda: scale_gradient_(gradient, incoming),
        reset=lambda: gradient.copy_(original),
        errors=lambda: {"gradient": (gradient - 2 * original).abs().max().item()},
        tolerances={"gradient": 0.0},
        bytes_moved=2 * gradient.nbytes,
        about={},
        copy_rate=math.nan,
        product_rate=math.nan,
    )


# By table: the widths to measure at, and the work at one of them.
BY_WIDTH: dict[str, tuple[tuple[int, ...], Callable[[Setting, int, str], Trial]]] = {
    "KD_LOSS": (VOCABULARIES, _kd_loss),
    "TRUNCATED_SOFTMAX": (VOCABULARIES, _truncated_softmax),
    "TOPK_KD_LOSS": (VOCABULARIES, _topk_kd_loss),
    "TOPK_KD_LOSS_OF_MANY": (
        VOCABULARIES[2:4],
        lambda *of: _topk_kd_loss(*of, k=512),
    ),
    "HIDDEN_MSE": (WIDTHS, _hidden("hidden_mse")),
    "HIDDEN_COSINE": (WIDTHS, _hidden("hidden_cosine")),
    "SCALE_GRADIENT": (VOCABULARIES, _scaled_gradient),
}


@contextmanager
def _replaced(table: tuning.Tuning, element_size: int, rows: tuning.Rows) -> Iterator[None]:
    with patch.dict(table, {element_size: rows}), patch.object(table, "measured", {}):
        yield


def rows_by_width(name: str, setting: Setting) -> Iterator[Row]:
    table = getattr(tuning, name)
    widths, trial = BY_WIDTH[name]
    for element_size, dtype in DTYPES.items():
        above = 0
        for largest, launch in table[element_size]:
            yield Row(
                name,
                f"{dtype}, up to {largest}",
                launch,
                neighbours(launch),
                {
                    f"{setting.rows(width)}×{width}": lambda width=width, dtype=dtype: trial(
                        setting, width, dtype
                    )
                    for width in setting.some([w for w in widths if above < w <= largest])
                },
                lambda launch, size=element_size: _replaced(table, size, ((math.inf, launch),)),
            )
            above = largest


# By launch of attention_mse: the method that takes it; samples and tokens, so that it does.
ATTENTION = {
    "grams": ("gram", 4, 2048),
    "products": ("gram", 4, 2048),
    "scores": ("tiled", 32, 512),
    "fused": ("gram", 64, 512),
}


def rows_of_attention_mse(setting: Setting) -> Iterator[Row]:
    heads = 1 if setting.quick else 16
    for element_size, dtype in DTYPES.items():
        for largest, launches in tuning.ATTENTION_MSE[element_size]:
            # Columns of both models together.
            width = 64 if largest <= 128 else 128
            for kind, (method, samples, tokens) in ATTENTION.items():
                if setting.quick:
                    samples, tokens = 1, 24
                case = attention_mse_peers.AttentionCase(
                    samples, heads, tokens, width, width, dtype, setting.device
                )

                def trial(
                    case: attention_mse_peers.AttentionCase = case, method: str = method
                ) -> Trial:
                    return _in_triton(
                        bench_attention_mse.trial_of,
                        case,
                        lambda case: attention_mse_peers.kdfast_loss(case, method=method),
                    )

                def launching(
                    launch: Launch,
                    size: int = element_size,
                    launches: dict = launches,
                    kind: str = kind,
                ) -> Any:
                    changed = ((math.inf, launches | {kind: launch}),)
                    return _replaced(tuning.ATTENTION_MSE, size, changed)

                yield Row(
                    "ATTENTION_MSE",
                    f"{dtype}, up to {largest} columns, {kind}",
                    launches[kind],
                    neighbours(launches[kind]),
                    {case.shape: trial},
                    launching,
                )


def rows_of_entry_products(setting: Setting) -> Iterator[Row]:
    def trial(width: int) -> Trial:
        case = linear_topk_kd_loss_peers.LinearTopKCase(
            # A token reads k rows of the weight.
            max(1, setting.rows(width) // 32),
            1000 if setting.quick else 32000,
            "bfloat16",
            setting.device,
            tail="support",
            k=64,
            width=width,
        )
        loss = linear_topk_kd_loss_peers.kdfast_loss
        return _in_triton(bench_linear_topk_kd_loss.trial_of, case, loss)

    yield Row(
        "ENTRY_PRODUCTS",
        "bfloat16",
        tuning.ENTRY_PRODUCTS,
        neighbours(tuning.ENTRY_PRODUCTS),
        {f"width {width}": lambda width=width: trial(width) for width in setting.some([896, 2048])},
        lambda launch: patch.dict(tuning.ENTRY_PRODUCTS, launch),
    )


def rows_of_cluster_blocks(setting: Setting) -> Iterator[Row]:
    """The blocks of a cluster at each vocabulary, of those whose shared memory the device has."""
    if "cuda" not in kdfast.available_backends():
        return
    extension = kd_loss_operation.registry.extension()
    most_bytes = torch.cuda.get_device_properties().shared_memory_per_block_optin
    for dtype in DTYPES.values():
        for vocab in VOCABULARIES:
            case = kd_loss_peers.Case(setting.rows(vocab), vocab, dtype, setting.device)
            planned, _ = extension.plan_kd_loss_cluster(0, vocab, dtype, dtype, 0)
            if planned == 0:
                continue
            # A block waits for 31 chunks of 2048 columns at the most.
            fitting = [
                blocks
                for blocks in (1, 2, 4, 8, 16)
                if vocab <= blocks * 31 * 2048
                and extension.kd_loss_block_bytes(vocab, blocks, dtype, dtype) <= most_bytes
            ]

            def trial(case: kd_loss_peers.Case = case) -> Trial:
                member = Member("kdfast", kd_loss_peers.kdfast_loss, backend="cuda")
                return bench_kd_loss.trial_of(case, member)

            def launching(launch: Launch) -> Any:
                plan = launch["blocks"], ""
                return patch.object(kd_loss_operation, "_cluster_blocks", lambda *_: plan)

            yield Row(
                "CLUSTER_BLOCKS",
                f"{dtype}, {vocab}",
                {"blocks": planned},
                [{"blocks": blocks} for blocks in fitting if blocks != planned],
                {case.shape: trial},
                launching,
            )


TABLES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    **{name: lambda setting, name=name: rows_by_width(name, setting) for name in BY_WIDTH},
    "ATTENTION_MSE": rows_of_attention_mse,
    "ENTRY_PRODUCTS": rows_of_entry_products,
    "CLUSTER_BLOCKS": rows_of_cluster_blocks,
}


def seconds_of(trial: Trial, setting: Setting) -> float:
    """The median; an error says why a launch is out."""
    trial.reset()
    trial.step()
    if wrong := trial.wrong(trial.errors()):
        raise ArithmeticError(f"wrong {' and '.join(wrong)}")
    timed = measure.timed(trial.step, setting.device)
    seconds = []
    for _ in range(setting.rounds):
        trial.reset()
        seconds.append(timed())
    trial.reset()
    return statistics.median(seconds)


def measured(row: Row, setting: Setting) -> dict[str, Any]:
    """The row's launch first, each with its seconds by shape or with what went wrong."""
    found = [
        {"launch": launch, "seconds": {}} for launch in (row.launch, *setting.some(row.candidates))
    ]
    for shape, make in row.trials.items():
        trial = make()
        # The row's own once more: the first is measured while the clocks still rise.
        for entry in (found[0], *found):
            if "problem" in entry:
                continue
            try:
                with row.launching(entry["launch"]):
                    entry["seconds"][shape] = seconds_of(trial, setting)
            except Exception as error:
                # A launch may ask for more than the device has, in ways that only it knows.
                entry["problem"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    own = found[0]["seconds"]
    for entry in found:
        if own and entry["seconds"].keys() == own.keys():
            ratios = [entry["seconds"][shape] / own[shape] for shape in own]
            entry["relative"] = statistics.geometric_mean(ratios)
    return {"place": row.place, "launches": found}


def verdict(found: dict[str, Any]) -> list[str]:
    own, *_ = found["launches"]
    right = [entry for entry in found["launches"] if "relative" in entry]
    if not right:
        return [found["place"], f"{own['launch']}", "–", "–", own.get("problem", "not measured")]
    best = min(right, key=lambda entry: entry["relative"])
    changes = best["relative"] < 1 - MARGIN
    return [
        found["place"],
        f"{own['launch']}",
        f"{best['launch']}" if changes else "the same",
        f"{best['relative']:.2f}" if changes else "1",
        "change" if changes else "stays",
    ]


def keep(folder: Path, facts: dict[str, Any], name: str, rows: list[dict[str, Any]]) -> None:
    path = folder / f"tuning-{report.device_slug(facts)}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = {"facts": facts, "date": f"{datetime.date.today()}", "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", choices=TABLES, help="default: all, one after the other")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=report.ROOT / "bench" / "results")
    parser.add_argument(
        "--quick", action="store_true", help="one short row, once: whether everything works"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device found: nothing was measured")
        return 0
    setting = Setting(arguments.device, arguments.quick)
    for name in [arguments.table] if arguments.table else TABLES:
        rows = []
        for row in TABLES[name](setting):
            rows.append(measured(row, setting))
            torch.cuda.empty_cache()
        if rows:
            keep(arguments.results, facts_of(arguments.device), name, rows)
            header = f"{name} | now | best | of the time | row"
            print(report.table(header, [verdict(row) for row in rows]), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
