"""A GPU's table: runs that end early and go on, members that fail, the comparison and its targets.

There need be no GPU: runs are of the CPU, and a GPU's numbers are made up.
"""

import gc
import json
import os
import signal
import stat
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

import bench_attention_mse
import bench_hidden
import bench_kd_loss
import bench_linear_kd_loss
import bench_linear_topk_kd_loss
import bench_topk_kd_loss
import bench_training_step
import bench_truncated_softmax
import facts
import kd_loss_peers
import linear_kd_loss_peers
import measure
import peers
import report
import side_by_side

BENCH = Path(measure.__file__).parent
MIB = 2**20
MORE_TO_DO = 75

SUITES = (
    bench_attention_mse,
    bench_hidden,
    bench_kd_loss,
    bench_linear_kd_loss,
    bench_linear_topk_kd_loss,
    bench_topk_kd_loss,
    bench_training_step,
    bench_truncated_softmax,
)

# A processor that passes for a GPU, a library and a kernel that fail on it, and a machine that goes
# away in a run's second test.
PLUGIN = """
import dataclasses, os, signal
import bench_kd_loss, facts, kd_loss_peers, measure, peers, pytest, torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *_: (8, 0)
torch.cuda.get_device_name = lambda *_: "NVIDIA A100"
torch.cuda.synchronize = lambda *_: None
facts.nvidia_smi = lambda query: ["1755"] * (query.count(",") + 1)
# Whoever edits a file meanwhile starts nothing anew.
facts._code = lambda: "one"
timed, trial_of = measure.timed, bench_kd_loss.trial_of
measure.timed = lambda step, device: timed(step, "cpu")
bench_kd_loss.trial_of = lambda case, member: trial_of(
    dataclasses.replace(case, device="cpu"), member
)

def broken(case):
    raise LookupError("no such device\\nand more")

kd_loss_peers.PEERS += tuple(peers.Member(name, broken) for name in ("broken", "kdfast broken"))
begun = []

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    begun.append(item)
    if len(begun) == 2 and "KILLED" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def _run(tmp_path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    (tmp_path / "broken_peer.py").write_text(PLUGIN)
    # pytest-benchmark measures nothing in a process that looks like one of several workers.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    path = os.pathsep.join((str(tmp_path), str(BENCH)))
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", BENCH / "bench_kd_loss.py", "-p", "broken_peer"),
            *("--device=cuda", "--quick", "--shape=8x97:float32"),
            *("--keep", tmp_path / "results"),
            *("-k", "(kdfast or broken or eager) and not (labels or alone or log-target)"),
            *map(str, arguments),
        ],
        env=kept | {"PYTHONPATH": path} | environment,
        cwd=BENCH,
        capture_output=True,
        text=True,
        check=False,
    )


def _kept(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "results").iterdir()
    return json.loads(path.read_text())["kd_loss"]


def _places(run: dict) -> list[tuple[str, str]]:
    return [(entry["group"].partition(" float32")[2], entry["member"]) for entry in run]


def test_a_run_goes_on_where_the_last_one_ended(tmp_path, monkeypatch, capsys):
    """However that was: killed, out of time, or done."""
    assert _run(tmp_path, KILLED="1").returncode == -signal.SIGKILL
    assert _places(_kept(tmp_path)["measurements"]) == [("", "kdfast")]

    # Without any time a run takes one member, or it would never come to an end.
    result = _run(tmp_path, "--minutes=0")
    assert result.returncode == MORE_TO_DO, result.stdout + result.stderr
    assert "left to the next run: 6 members" in result.stdout
    assert _places(_kept(tmp_path)["measurements"]) == [("", "kdfast")]

    # Of those that fail, kdfast alone fails the run.
    result = _run(tmp_path)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    assert "1 failed, 3 passed, 2 skipped" in result.stdout
    run = _kept(tmp_path)
    assert _places(run["measurements"]) == [
        ("", "kdfast"),
        ("", "eager"),
        (", overwriting", "kdfast"),
        (", overwriting", "kdfast overwrite"),
    ]
    error = "fails: LookupError: no such device"
    absent = dict(run["absent"]["kd_loss 8×97 float32"])
    assert "need compute capability 9.0 or newer" in absent.pop("kdfast cuda")
    assert "it works on CUDA tensors" in absent.pop("kdfast triton")
    assert absent == {"broken": error, "kdfast broken": f"kdfast {error}"}
    assert run["facts"]["device"] == "NVIDIA A100"
    assert run["facts"]["driver"] == "1755"
    for entry in run["measurements"]:
        assert entry["wrong"] == []
        assert entry["rounds"] == 10
        assert entry["clocks"] == {"cores": "1755", "memory": "1755", "watts": "1755"}
        assert entry["limit_seconds"] > 0
        assert entry["limit_seconds"] == pytest.approx(
            entry["bytes_moved"] / entry["copy_bytes_per_second"]
        )

    path = tmp_path / "results" / "nvidia-a100.json"
    status, shown = _shown(path, monkeypatch, capsys)
    assert status == 1
    header, _, first, *_ = shown.splitlines()
    assert header == "| case | kdfast | of the limit | extra MiB | eager |"
    assert first.startswith("| kd_loss 8×97 float32 | ")
    assert shown.count("| not measured | – |") == len(side_by_side.TARGETS)
    absent = "Absent: broken: fails: LookupError: no such device (kd_loss 8×97 float32)."
    assert absent in shown


def _shown(path: Path, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", str(path)])
    return side_by_side.main(), capsys.readouterr().out


def _member(group: str, name: str, seconds: float, **more: object) -> dict:
    return {
        "group": group,
        "member": name,
        "ours": name.startswith("kdfast"),
        "is_ceiling": False,
        "seconds": seconds,
        "wrong": [],
        "peak_bytes": 3 * MIB,
        "gradient_bytes": MIB,
        "limit_seconds": 0.9,
        "share_of_copy": 0.9 / seconds,
        "clocks": {"cores": "1755", "memory": "2619", "watts": "400.00"},
        **more,
    }


def _run_of(measurements: list[dict], absent: dict | None = None, **facts: object) -> dict:
    return {
        "facts": {
            "device": "NVIDIA H200",
            "driver": "580.1",
            "cuda": "13.0",
            "python": "3.12",
            "versions": {"torch": "2.13"},
            "code": "abc",
            **facts,
        },
        "date": "2026-11-21",
        "absent": absent or {},
        "measurements": measurements,
    }


@pytest.fixture
def of_a_gpu():
    dense = {"rows": 8192, "vocab": 128256, "dtype": "bfloat16"}
    head = dense | {"student_width": 4096, "teacher_width": 4096, "peak_bytes": 10**9 + MIB}
    attention = {"dtype": "bfloat16", "tokens": 512}
    one, two = "kd_loss 8192×128256 bfloat16", "kd_loss 4096×262144 bfloat16"
    linear = "linear_kd_loss 8192×4096/4096×128256 bfloat16"
    short, causal = "attention_mse 32×12×512×64 bfloat16", "attention_mse 8×12 bfloat16, causal"
    return {
        "kd_loss": _run_of(
            [
                _member(one, "kdfast", 1.0, **dense),
                _member(one, "kdfast triton", 1.2, **dense),
                _member(one, "eager", 5.0, **dense),
                _member(one, "liger jsd", 2.0, **dense),
                _member(one, "liger kl_div", 0.5, **dense, wrong=["loss"]),
                _member(one, "quack softmax", 0.5, **dense, is_ceiling=True),
                _member(two, "kdfast", 1.0, **dense | {"vocab": 262144}),
                _member(two, "kdfast triton", 2.0, **dense | {"vocab": 262144}),
                _member(two, "speculators", 1.6, **dense | {"vocab": 262144}),
            ],
            absent={
                two: {"eager": "CUDA out of memory. Tried", "quack softmax": "no quack-kernels"},
                one: {"trl": "no trl"},
            },
        ),
        "linear_kd_loss": _run_of(
            [
                _member(linear, "kdfast", 1.2, **head),
                _member(linear, "bare products", 1.0, **head, is_ceiling=True),
                _member(linear, "trl", 1.1, **head),
            ]
        ),
        "attention_mse": _run_of(
            [
                _member(short, "kdfast", 1.0, **attention),
                _member(short, "eager", 6.0, **attention, wrong=["loss"]),
                _member(short, "eager float32", 8.0, **attention),
                _member(causal, "kdfast", 1.0, **attention),
                _member(causal, "eager float32", 0.8, **attention),
            ]
        ),
    }


def _cells(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines() if "---" not in line]


def test_comparison_has_everybodys_multiple(of_a_gpu):
    header, *rows = _cells(side_by_side.comparison(of_a_gpu))
    assert header == [
        *("case", "kdfast", "of the limit", "extra MiB", "kdfast triton", "bare products"),
        *("eager", "liger", "trl", "speculators"),
    ]
    shown = {case: dict(zip(header[1:], cells, strict=True)) for case, *cells in rows}
    assert len(shown) == 5
    first = shown["kd_loss 8192×128256 bfloat16"]
    assert first["kdfast"] == "1000 ms"
    assert first["of the limit"] == "90%"
    assert first["extra MiB"] == "2"
    assert first["kdfast triton"] == "1.20×"
    assert first["eager"] == "5.0×"
    # A right result before a faster wrong one.
    assert first["liger"] == "2.0×"
    assert first["trl"] == first["speculators"] == "–"
    assert shown["kd_loss 4096×262144 bfloat16"]["eager"] == "no memory"
    assert shown["attention_mse 32×12×512×64 bfloat16"]["eager"] == "8.0×"
    assert _cells(side_by_side.yardsticks(of_a_gpu))[1:] == [
        ["kd_loss 8192×128256 bfloat16", "quack softmax", "500 ms", "180%", "3"]
    ]


def test_every_target_has_a_row_of_the_worst_case(of_a_gpu):
    _, *rows = _cells(side_by_side.targets(of_a_gpu))
    assert [row[1:] for row in rows] == [
        ["≥ 85%", "90%", "yes"],
        ["≥ 60%", "45%", "no"],
        ["≥ 1.50×", "1.60×", "yes"],
        ["≤ 1.15×", "1.20×", "no"],
        ["≤ 1.50 GB", "1.00 GB", "yes"],
        ["≥ 1.00×", "0.92×", "no"],
        ["≤ 1.50×", "not measured", "–"],
        ["≥ 5.00×", "not measured", "–"],
        ["≥ 4.00×", "8.00×", "yes"],
        ["≥ 40.00×", "not measured", "–"],
        ["≥ 1.00×", "0.80×", "no"],
    ]
    of_a_gpu["kd_loss"]["measurements"][0]["wrong"] = ["loss"]
    _, first, *_ = _cells(side_by_side.targets(of_a_gpu))
    assert first[1:] == ["≥ 85%", "wrong", "no"]


def test_a_wrong_or_failed_result_of_kdfast_fails_the_command(
    of_a_gpu, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(of_a_gpu))
    status, shown = _shown(path, monkeypatch, capsys)
    assert status == 0
    assert "The cores ran at 1755 to 1755 MHz." in shown
    assert "Absent: trl: no trl (kd_loss 8192×128256 bfloat16)." in shown

    failed = of_a_gpu["attention_mse"]["absent"]
    failed["attention_mse 1 bfloat16"] = {"kdfast": f"{report.OWN_FAILURE}RuntimeError: no"}
    path.write_text(json.dumps(of_a_gpu))
    status, shown = _shown(path, monkeypatch, capsys)
    assert status == 1
    assert "attention_mse 1 bfloat16: kdfast: kdfast fails: RuntimeError: no" in shown

    failed.clear()
    of_a_gpu["kd_loss"]["measurements"][1]["wrong"] = ["gradient"]
    path.write_text(json.dumps(of_a_gpu))
    status, shown = _shown(path, monkeypatch, capsys)
    assert status == 1
    assert "kd_loss 8192×128256 bfloat16: kdfast triton: wrong gradient" in shown


def test_what_is_kept_is_of_one_state_of_the_code(tmp_path):
    group = "kd_loss 1"
    first = _run_of([_member(group, "kdfast", 1.0)], {group: {"eager": "no memory", "trl": "no"}})
    report.keep({"kd_loss": first, "hidden_mse": first}, tmp_path)
    again = _run_of([_member(group, "eager", 3.0), _member(group, "kdfast", 2.0)], driver="580.2")
    report.keep({"kd_loss": again}, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "nvidia-h200.json"
    kept = report.load(path)
    assert [(e["member"], e["seconds"]) for e in kept["kd_loss"]["measurements"]] == [
        ("kdfast", 2.0),
        ("eager", 3.0),
    ]
    assert kept["kd_loss"]["absent"] == {group: {"trl": "no"}}
    assert kept["kd_loss"]["facts"]["driver"] == "580.1, 580.2"
    assert kept["hidden_mse"] == first
    assert report.done(kept, again["facts"]) == {
        (group, "kdfast"),
        (group, "eager"),
        (group, "trl"),
    }

    other = _run_of([_member(group, "eager", 4.0)], code="def")
    assert report.done(kept, other["facts"]) == set()
    report.keep({"kd_loss": other}, tmp_path)
    assert report.load(path) == {"kd_loss": other, "hidden_mse": first}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_no_two_members_have_one_place(suite, device):
    places = Counter(
        (group, name) for group, name, *_ in suite.groups(device, suite.SHAPES[device])
    )
    assert places.most_common(1)[0][1] == 1


def test_a_gpu_measures_its_kernels_beside_each_other():
    found = {}
    for suite in (bench_kd_loss, bench_linear_kd_loss):
        for group, name, case, member in suite.groups("cuda", suite.SHAPES["cuda"]):
            assert case.device == "cuda"
            found.setdefault(group, {})[name] = member
    kernels = {"kdfast cuda", "kdfast triton"}
    for group, members in found.items():
        if "divergences" not in group and "overwriting" not in group and "labels" not in group:
            assert kernels <= {*members}
    members = found["kd_loss 8192×128256 bfloat16"]
    assert [members[name].backend for name in sorted(kernels)] == ["cuda", "triton"]
    vocabularies = {
        case.vocab for *_, case, _ in bench_kd_loss.groups("cuda", bench_kd_loss.SHAPES["cuda"])
    }
    assert vocabularies == {30522, 32000, 50257, 128256, 151936, 262144}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_kernel_that_does_not_work_here_is_absent():
    case = peers.Case(5, 211, "float32")
    for name in ("cuda", "triton"):
        member = peers.Member("kdfast", kd_loss_peers.kdfast_loss, backend=name)
        with pytest.raises(peers.Absent, match=f"'{name}', which does not work here"):
            member.build(case)


def test_a_kernel_that_cannot_serve_a_case_is_absent():
    def write(case):
        def loss(*_):
            raise RuntimeError(f"kd_loss: the backend 'torch' cannot serve {case.vocab} columns")

        return loss

    case = peers.Case(5, 211, "float32")
    with pytest.raises(peers.Absent, match="cannot serve 211 columns"):
        peers.Member("kdfast", write, backend="torch").build(case)()
    with pytest.raises(RuntimeError, match="cannot serve 211 columns"):
        peers.Member("kdfast", write).build(case)()


def test_a_kernel_is_chosen_for_its_member_alone():
    case = peers.Case(5, 211, "float32")
    chosen = []

    def write(case):
        def loss(*inputs):
            chosen.append(kd_loss_peers.kdfast.ops.registry.chosen())
            return kd_loss_peers.kdfast_loss(case)(*inputs)

        return loss

    for backend in (None, "torch"):
        trial = bench_kd_loss.trial_of(case, peers.Member("kdfast", write, backend=backend))
        trial.reset()
        trial.step()
        assert trial.wrong(trial.errors()) == []
    assert chosen == ["auto", "torch"]


def _identity(function, **_):
    return function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_that_are_compiled_have_the_same_definition(dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", _identity)
    # The last chunk is shorter.
    monkeypatch.setattr(kd_loss_peers, "CHUNK_ROWS", 20)
    case = peers.Case(48, 211, dtype)
    dense = bench_kd_loss.trial_of(case, kd_loss_peers.COMPILED_CHUNKS)
    head = linear_kd_loss_peers.LinearCase(48, 1009, dtype, student_width=24, teacher_width=40)
    (*_, member) = peers.in_both_precisions([linear_kd_loss_peers.COMPILED_CHUNKS], head)
    for trial in (dense, bench_linear_kd_loss.trial_of(head, member)):
        trial.reset()
        trial.step()
        assert trial.wrong(trial.errors()) == []


def test_a_yardstick_has_bytes_of_its_own_and_no_errors():
    case = peers.Case(5, 211, "float32")
    member = peers.Member(
        "quack", lambda case: lambda student, *_: student.softmax(-1), is_ceiling=True, passes=2
    )
    trial = bench_kd_loss.trial_of(case, member)
    trial.reset()
    trial.step()
    assert trial.wrong(trial.errors()) == []
    assert trial.bytes_moved == 2 * 5 * 211 * 4
    assert trial.about["is_ceiling"]


def test_the_limit_is_the_longer_of_bytes_and_products():
    def trial(bytes_moved: int, operations: int) -> measure.Trial:
        return measure.Trial(
            step=lambda: None, reset=lambda: None, errors=dict, tolerances={}, about={},
            bytes_moved=bytes_moved, operations=operations, copy_rate=10.0, product_rate=100.0,
        )  # fmt: skip

    assert trial(20, 100).limit_seconds == 2
    assert trial(20, 300).limit_seconds == 3
    # No processor makes fewer than a million products a second, or more than 10¹⁸.
    assert 1e6 < measure.product_rate("cpu", torch.float32) < 1e18


def test_a_problem_is_forgotten_before_the_next_one_is_made():
    alive = []

    @measure.one_at_a_time
    def problem_of(case):
        assert all(problem() is None for problem in alive)
        problem = torch.zeros(1)
        alive.append(weakref.ref(problem))
        return problem

    first = problem_of("a")
    assert problem_of("a") is first
    del first
    problem_of("b")
    gc.collect()
    assert [problem() is None for problem in alive] == [True, False]


def test_a_gpu_is_timed_between_events_that_nobody_waits_between(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    filler = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(measure, "_cache_filler", lambda: filler)
    assert measure.timed(lambda: log.append("step"), "cuda")() == 1.5
    assert log == ["flush"] * measure.FLUSHES + ["event", "step", "event", "wait"]


@pytest.mark.parametrize("renumbered", [False, True])
def test_a_gpu_is_asked_for_its_clocks(renumbered, tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    # With another number than the one that PyTorch has, it knows no such GPU.
    known = "GPU-other" if renumbered else "GPU-ab-12"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{known}*) ;; *--id*) exit 6 ;; esac\n'
        "echo '1980, 2619, 700.12'; echo '1, 2, 3'\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    device = SimpleNamespace(uuid="ab-12")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    assert facts.nvidia_smi("clocks.sm,clocks.mem,power.draw") == ["1980", "2619", "700.12"]
    monkeypatch.setenv("PATH", "")
    assert facts.nvidia_smi("driver_version") == []
