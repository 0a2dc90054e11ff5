"""The benchmark suite measures what it says, and says so when a result is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

import bench_kd_loss
import bench_linear_kd_loss
import kd_loss_peers
import linear_kd_loss_peers
import measure
import peers
import report

BENCH = Path(measure.__file__).parent
MIB = 2**20

# Pages that a step touches for the first time beside its tensors, and huge pages at their ends.
PEAK_TOLERANCE = 4 * MIB

# A member that forgets the temperature's square, as somebody's private loss might.
WRONG_MEMBER = """
import kd_loss_peers, linear_kd_loss_peers, peers

for peers_of_operation in (kd_loss_peers, linear_kd_loss_peers):
    def build(case, eager_loss=peers_of_operation.eager_loss):
        loss = eager_loss(case)
        return lambda *tensors: loss(*tensors) / case.temperature**2

    peers_of_operation.PEERS += (peers.Member("forgetful", build),)
"""


def _floats(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB // 4)


def _hold_and_release() -> None:
    _floats(100)


def _return() -> torch.Tensor:
    return _floats(100)


def _two_at_once_then_one() -> None:
    first = _floats(60)
    second = first + 1
    del first, second
    _floats(100)


def _many_small() -> None:
    tensors = [_floats(2) for _ in range(50)]
    del tensors


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (_hold_and_release, 100 * MIB),
        (_return, 100 * MIB),
        (_two_at_once_then_one, 120 * MIB),
        (_many_small, 100 * MIB),
        (lambda: None, 0),
    ],
)
def test_peak_bytes_is_what_the_step_holds_at_once(step, expected):
    step()
    # What the warm-up freed must not hide the same allocation: each time counts alike.
    for _ in range(3):
        assert abs(measure.peak_bytes(step) - expected) < PEAK_TOLERANCE


def test_peak_bytes_is_sampled_where_the_kernel_keeps_no_record(monkeypatch):
    def refuse(step):
        raise PermissionError("/proc/self/clear_refs")

    monkeypatch.setattr(measure, "_high_water_bytes", refuse)
    _return()
    assert abs(measure.peak_bytes(_return) - 100 * MIB) < PEAK_TOLERANCE


def test_a_step_is_timed_after_its_warm_up():
    calls = []
    seconds = measure.median_seconds(lambda: calls.append(None), repeats=5, warmup=2)
    assert len(calls) == 7
    assert 0 <= seconds < 1


def test_copy_bandwidth_counts_both_directions():
    # No memory reads and writes less than 10 MB/s, or more than 100 TB/s.
    assert 1e7 < measure.copy_bandwidth("cpu", MIB) < 1e14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["kdfast", "eager", "eager log-target", "trl", "textbrewer"])
def test_every_member_has_the_same_definition(peer, dtype):
    case = peers.Case(5, 211, dtype)
    members = {member.name: member for member in kd_loss_peers.members_of(case)}
    member = members.get(f"{peer} float32", members[peer])
    try:
        trial = bench_kd_loss.trial_of(case, member)
    except peers.Absent as reason:
        pytest.skip(str(reason))
    trial.step()
    assert trial.wrong(trial.errors()) == []


def _linear_case(dtype: str, alpha: float = 1.0) -> linear_kd_loss_peers.LinearCase:
    # Logits of the size that the suite's have, so that rounding them costs what it costs there.
    return linear_kd_loss_peers.LinearCase(
        48, 1009, dtype, alpha=alpha, student_width=24, teacher_width=40
    )


# Liger's loss compiles itself: what it computes is checked by the suite's own run.
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["kdfast", "eager", "trl"])
def test_every_member_from_hidden_states_has_the_same_definition(peer, dtype, alpha):
    case = _linear_case(dtype, alpha)
    members = {member.name: member for member in linear_kd_loss_peers.members_of(case)}
    member = members.get(f"{peer} float32", members[peer])
    try:
        trial = bench_linear_kd_loss.trial_of(case, member)
    except peers.Absent as reason:
        pytest.skip(str(reason))
    trial.step()
    assert trial.wrong(trial.errors()) == []
    trial.reset()
    problem = bench_linear_kd_loss.problem_of(case)
    assert problem.student_hidden.grad is None
    assert problem.student_weight.grad is None


def test_rounding_the_logits_to_bfloat16_is_wrong_and_costs_three_times_the_error():
    case = _linear_case("bfloat16")
    members = {member.name: member for member in linear_kd_loss_peers.members_of(case)}
    errors = {}
    for name in ("kdfast", "bfloat16 logits", "eager"):
        trial = bench_linear_kd_loss.trial_of(case, members[name])
        trial.reset()
        trial.step()
        errors[name] = trial.errors()
        assert ("weight gradient" in trial.wrong(errors[name])) == (name != "kdfast")
    rounded = errors["bfloat16 logits"]["weight gradient"]
    assert errors["kdfast"]["weight gradient"] <= rounded / 3
    # Rounding the logits is most of what is wrong with the loss that people write.
    assert errors["eager"]["weight gradient"] == pytest.approx(rounded, rel=0.2)


def test_the_bare_products_are_a_bound_and_nobodys_result():
    case = _linear_case("float32")
    products = linear_kd_loss_peers.PRODUCTS
    outputs = products.build(case)(*bench_linear_kd_loss.problem_of(case).inputs)
    assert [tuple(output.shape) for output in outputs] == [
        (48, 1009),
        (48, 1009),
        (48, 24),
        (1009, 24),
    ]
    trial = bench_linear_kd_loss.trial_of(case, products)
    trial.step()
    assert trial.errors() == {}
    assert trial.wrong({}) == []
    operations = sum(
        2 * rows * inner * columns
        for rows, inner, columns in (
            (48, 24, 1009),
            (48, 40, 1009),
            (48, 1009, 24),
            (1009, 48, 24),
        )
    )
    assert trial.operations == operations


def test_a_loss_without_a_number_is_wrong():
    case = peers.Case(3, 7, "float32")
    trial = bench_kd_loss.trial_of(
        case, peers.Member("nan", lambda case: lambda student, *_: (student * torch.nan).sum())
    )
    trial.step()
    assert trial.wrong(trial.errors()) == ["loss", "gradient"]


def _run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        # Not the root, which `-m` would make importable: its kernels/ is no package by itself.
        cwd=BENCH,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def _measure_and_report(tmp_path: Path, shape: str, members: str) -> tuple[str, dict]:
    """What a run of the whole suite on one shape shows, and what is kept after it."""
    (tmp_path / "wrong_member.py").write_text(WRONG_MEMBER)
    run, readme, results = tmp_path / "run.json", tmp_path / "README.md", tmp_path / "results"
    if not readme.exists():
        sections = (
            f"<!-- {operation}:begin -->\nold {operation}\n<!-- {operation}:end -->\n"
            for operation in report.LAYOUTS
        )
        readme.write_text("before\n" + "".join(sections) + "after\n")
    pytest_arguments = (
        *("-m", "pytest", BENCH, "-p", "wrong_member", f"--benchmark-json={run}"),
        *(f"--shape={shape}", "-k", members),
    )
    _run(*pytest_arguments, PYTHONPATH=os.pathsep.join((str(tmp_path), str(BENCH))))
    shown = _run(
        *(BENCH / "report.py", run, "--results", results, "--plots", tmp_path, "--into", readme)
    ).stdout
    (kept_path,) = results.iterdir()
    kept = report.load(kept_path)
    assert kept | report.load(run) == kept
    return shown, kept


def test_suite_from_run_to_report(tmp_path):
    shown, kept = _measure_and_report(
        tmp_path, "8x97:float32", "kdfast or eager or forgetful or speculators or tvd"
    )
    assert list(kept) == ["kd_loss"]
    measurements = kept["kd_loss"]["measurements"]
    members = [m for m in measurements if m["group"] == "kd_loss 8×97 float32"]
    verdicts = {m["member"]: m["wrong"] for m in members}
    assert verdicts == {
        "kdfast": [],
        "eager": [],
        "eager log-target": [],
        "forgetful": ["loss", "gradient"],
    }
    assert members[0]["bytes_moved"] == 3 * 8 * 97 * 4
    assert members[0]["share_of_copy"] > 0
    assert any(m["divergence"] == "tvd" for m in measurements)

    assert "| forgetful |" in shown
    assert "**wrong loss and gradient**" in shown
    assert "Absent: speculators: its Triton kernels need a CUDA device." in shown
    assert "forgetful" not in report.summary("kd_loss", report.grouped(measurements))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- kd_loss:begin -->\n| case | kdfast |")
    assert "|\n<!-- kd_loss:end -->\n" in text
    assert text.endswith("\nold linear_kd_loss\n<!-- linear_kd_loss:end -->\nafter\n")
    plots = sorted(path.name for path in tmp_path.glob("kd_loss-*.svg"))
    assert [name.rpartition("-")[2] for name in plots] == ["dark.svg", "light.svg"]


def test_suite_from_hidden_states_leaves_what_is_kept_of_other_operations(tmp_path):
    (tmp_path / "results").mkdir()
    slug = report.device_slug({"cores": os.cpu_count()})
    earlier = {"facts": {"cores": 64}, "date": "2026-01-01", "absent": {}, "measurements": []}
    kept_path = tmp_path / "results" / f"{slug}.json"
    kept_path.write_text(json.dumps({"kd_loss": earlier, "linear_kd_loss": earlier}))
    shown, kept = _measure_and_report(
        tmp_path, "8x12x20x97:bfloat16", "kdfast or bare or eager or forgetful or fused"
    )
    assert kept["kd_loss"] == earlier
    measured = kept["linear_kd_loss"]
    assert measured["date"] > earlier["date"]
    groups = report.grouped(measured["measurements"])
    group = "linear_kd_loss 8×12/20×97 bfloat16"
    assert list(groups) == [group, f"{group}, with labels, alpha=0.5"]
    members = {m["member"]: m for m in groups[group]}
    wrong = {name for name, m in members.items() if m["wrong"]}
    assert {"kdfast", "eager float32", "bare products", "bare products float32"} <= {*members}
    assert "forgetful" in wrong
    assert not wrong & {"kdfast", "eager float32", "bare products", "bare products float32"}
    assert members["bare products"]["of_ceiling"] == 1
    assert members["kdfast"]["operations"] == 2 * 8 * 97 * (3 * 12 + 20)
    assert members["kdfast"]["gradient_bytes"] == 2 * 12 * (8 + 97)

    assert "Absent: liger fused: its Triton kernels need a CUDA device." in shown
    assert "| a ceiling, no loss |" in shown
    header, _, row, _ = report.summary("linear_kd_loss", groups).splitlines()
    assert header.startswith("| case | kdfast | bare products | eager | torch.compile | Liger |")
    assert row.count("|") == header.count("|")
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"linear_kd_loss-{slug}-{theme}.svg" for theme in ("dark", "light")
    }
    text = (tmp_path / "README.md").read_text()
    assert "\nold kd_loss\n" in text
    assert f"<!-- linear_kd_loss:begin -->\n{header}\n" in text


def test_a_right_result_stands_for_its_family_before_a_faster_wrong_one():
    def member(name: str, seconds: float, wrong: tuple[str, ...] = ()) -> dict:
        sizes = {"peak_bytes": 3 * MIB, "gradient_bytes": MIB}
        return {
            **{"group": "linear_kd_loss 1", "member": name, "seconds": seconds, "wrong": [*wrong]},
            **sizes,
        }

    groups = report.grouped(
        [
            member("kdfast", 1.0),
            member("bare products", 0.875) | {"is_ceiling": True},
            member("eager", 2.0, wrong=("loss",)),
            member("eager float32", 3.0),
            member("liger chunked", 0.5, wrong=("loss",)),
        ]
    )
    assert report.summary("linear_kd_loss", groups).splitlines()[-1] == (
        "| linear_kd_loss 1 | 1000 ms | 875 ms (0.88×) | float32 3000 ms (3.0×) | – | wrong | – "
        "| 2 / 2 MiB |"
    )


def test_a_shape_that_makes_no_sense_is_refused():
    command = [sys.executable, "-m", "pytest", BENCH, "--shape=512:50257:float32"]
    result = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert "argument --shape" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_cuda_device_nothing_is_measured_and_nothing_fails(tmp_path):
    run = tmp_path / "run.json"
    told = _run("-m", "pytest", BENCH, "--device=cuda", f"--benchmark-json={run}").stdout
    assert "no CUDA device found: nothing was measured" in told
    assert "nothing was measured" in _run(BENCH / "report.py", run).stdout
