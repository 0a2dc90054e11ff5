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
import measure
import peers
import report

BENCH = Path(measure.__file__).parent
MIB = 2**20

# Pages that a step touches for the first time beside its tensors, and huge pages at their ends.
PEAK_TOLERANCE = 4 * MIB

# A member that forgets the temperature's square, as somebody's private loss might.
WRONG_MEMBER = """
import peers

def build(case):
    loss = peers.eager_loss(case)
    return lambda *tensors: loss(*tensors) / case.temperature**2

peers.PEERS += (peers.Member("forgetful", build),)
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
    members = {member.name: member for member in peers.members_of(case)}
    member = members.get(f"{peer} float32", members[peer])
    try:
        trial = bench_kd_loss.trial_of(case, member)
    except peers.Absent as reason:
        pytest.skip(str(reason))
    trial.step()
    assert trial.wrong(trial.errors()) == []


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


def test_suite_from_run_to_report(tmp_path):
    (tmp_path / "wrong_member.py").write_text(WRONG_MEMBER)
    run, readme = tmp_path / "run.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- kd_loss:begin -->\nold\n<!-- kd_loss:end -->\nafter\n")
    pytest_arguments = (
        *("-m", "pytest", BENCH, "-p", "wrong_member", f"--benchmark-json={run}"),
        *("--shape=8x97:float32", "-k", "kdfast or eager or forgetful or speculators or tvd"),
    )
    _run(*pytest_arguments, PYTHONPATH=os.pathsep.join((str(tmp_path), str(BENCH))))
    shown = _run(
        *(BENCH / "report.py", run, "--results", tmp_path, "--plots", tmp_path, "--into", readme)
    ).stdout

    (kept_path,) = (path for path in tmp_path.glob("*.json") if path != run)
    kept = json.loads(kept_path.read_text())
    members = [m for m in kept["measurements"] if m["group"] == "kd_loss 8×97 float32"]
    verdicts = {m["member"]: m["wrong"] for m in members}
    assert verdicts == {
        "kdfast": [],
        "eager": [],
        "eager log-target": [],
        "forgetful": ["loss", "gradient"],
    }
    assert members[0]["bytes_moved"] == 3 * 8 * 97 * 4
    assert members[0]["share_of_copy"] > 0
    assert any(m["divergence"] == "tvd" for m in kept["measurements"])

    assert "| forgetful |" in shown
    assert "**wrong loss and gradient**" in shown
    assert "Absent: speculators: its Triton kernels need a CUDA device." in shown
    assert "forgetful" not in report.summary(report.grouped(kept["measurements"]))
    text = readme.read_text()
    assert text.startswith("before\n<!-- kd_loss:begin -->\n| case | kdfast |")
    assert text.endswith("|\n<!-- kd_loss:end -->\nafter\n")
    plots = sorted(path.name for path in tmp_path.glob("kd_loss-*.svg"))
    assert [name.rpartition("-")[2] for name in plots] == ["dark.svg", "light.svg"]
    assert report.load(kept_path) == report.load(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_cuda_device_nothing_is_measured_and_nothing_fails(tmp_path):
    run = tmp_path / "run.json"
    told = _run("-m", "pytest", BENCH, "--device=cuda", f"--benchmark-json={run}").stdout
    assert "no CUDA device found: nothing was measured" in told
    assert "nothing was measured" in _run(BENCH / "report.py", run).stdout
