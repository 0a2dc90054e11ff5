"""The benchmark suite measures what it says, and says so when a result is wrong."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

import attention_mse_peers
import bench_attention_mse
import bench_hidden
import bench_kd_loss
import bench_linear_kd_loss
import bench_linear_topk_kd_loss
import bench_topk_kd_loss
import bench_training_step
import bench_truncated_softmax
import hidden_peers
import kd_loss_peers
import linear_kd_loss_peers
import linear_topk_kd_loss_peers
import measure
import peers
import report
import topk_kd_loss_peers
import training_step_peers
import truncated_softmax_peers

BENCH = Path(measure.__file__).parent
MIB = 2**20

# Pages that a step touches for the first time beside its tensors, and huge pages at their ends.
PEAK_TOLERANCE = 4 * MIB

# A member that forgets the temperature's square, as somebody's private loss might.
WRONG_MEMBER = """
import kd_loss_peers, linear_kd_loss_peers, peers, topk_kd_loss_peers

for peers_of_operation in (kd_loss_peers, linear_kd_loss_peers, topk_kd_loss_peers):
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


def _nothing() -> None:
    pass


def _peaks(step: Callable[[], object]) -> list[int]:
    step()
    # What the warm-up freed must not hide the same allocation: each time counts alike.
    return [measure.peak_bytes(step) for _ in range(3)]


@pytest.fixture(scope="module")
def fresh_process():
    """One in whose heap no test has left a gap that is large enough for a tensor to stay in."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (_hold_and_release, 100 * MIB),
        (_return, 100 * MIB),
        (_two_at_once_then_one, 120 * MIB),
        (_many_small, 100 * MIB),
        (_nothing, 0),
    ],
)
def test_peak_bytes_is_what_the_step_holds_at_once(step, expected, fresh_process):
    for peak in fresh_process.submit(_peaks, step).result():
        assert abs(peak - expected) < PEAK_TOLERANCE


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


def _trial(bench, peers_of_operation, case: peers.Case, name: str) -> measure.Trial:
    """A member's trial, of its upcast variant where it has one; skipped where it is absent."""
    members = {member.name: member for member in peers_of_operation.members_of(case)}
    try:
        return bench.trial_of(case, members.get(f"{name} float32", members[name]))
    except peers.Absent as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["kdfast", "eager", "eager log-target", "trl", "textbrewer"])
def test_every_member_has_the_same_definition(peer, dtype):
    trial = _trial(bench_kd_loss, kd_loss_peers, peers.Case(5, 211, dtype), peer)
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
    trial = _trial(bench_linear_kd_loss, linear_kd_loss_peers, case, peer)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["kdfast", "eager", "eager logsumexp"])
def test_every_member_selects_the_same(name, dtype):
    case = truncated_softmax_peers.TruncatedCase(5, 211, dtype, k=7)
    trial = _trial(bench_truncated_softmax, truncated_softmax_peers, case, name)
    trial.step()
    assert trial.wrong(trial.errors()) == []
    assert trial.bytes_moved == 5 * (211 * case.torch_dtype.itemsize + 7 * (4 + 8))


def test_half_precision_selects_the_wrong_entries_and_log_probabilities():
    case = truncated_softmax_peers.TruncatedCase(64, 5003, "bfloat16", k=32)
    members = {member.name: member for member in truncated_softmax_peers.members_of(case)}
    trial = bench_truncated_softmax.trial_of(case, members["eager"])
    trial.step()
    assert trial.wrong(trial.errors()) == ["log-probability", "selection"]


def _right_but(change):
    """A member that selects as torch does, and then spoils it."""

    def write(case):
        def select(logits):
            every = logits.float().log_softmax(-1)
            return change(*every.topk(case.k), every)

        return select

    return peers.Member("spoilt", write)


def _next_best(log_probs, indices, every):
    last = every.topk(indices.shape[-1] + 1).indices[:, -1:]
    indices = torch.cat([indices[:, :-1], last], -1)
    return every.gather(-1, indices), indices


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda log_probs, indices, every: (log_probs + 1e-5, indices), ["log-probability"]),
        (lambda log_probs, indices, every: (log_probs * torch.nan, indices), ["log-probability"]),
        (_next_best, ["selection"]),
        (lambda log_probs, indices, every: (log_probs.flip(-1), indices.flip(-1)), ["selection"]),
    ],
    ids=["shifted", "nan", "next best", "smallest first"],
)
def test_a_spoilt_selection_is_wrong(change, wrong):
    case = truncated_softmax_peers.TruncatedCase(5, 211, "float32", k=2)
    trial = bench_truncated_softmax.trial_of(case, _right_but(change))
    trial.step()
    assert trial.wrong(trial.errors()) == wrong


def test_one_of_two_equal_logits_may_not_stand_for_both():
    case = truncated_softmax_peers.TruncatedCase(5, 211, "bfloat16", k=64)

    def repeat(log_probs, indices, every):
        same = log_probs[:, 1:] == log_probs[:, :-1]
        assert same.any()
        first, others = indices.split([1, case.k - 1], -1)
        return log_probs, torch.cat([first, torch.where(same, indices[:, :-1], others)], -1)

    trial = bench_truncated_softmax.trial_of(case, _right_but(repeat))
    trial.step()
    assert trial.wrong(trial.errors()) == ["selection"]


# Not in the suite's main groups, "renormalize" is a tail that its members serve all the same.
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("tail", ["bucket", "none", "support", "renormalize"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_member_has_the_same_definition_of_a_tail(dtype, tail, alpha):
    case = topk_kd_loss_peers.TopKCase(5, 211, dtype, tail=tail, alpha=alpha, k=7)
    found = {}
    for member in topk_kd_loss_peers.members_of(case):
        if member.compiled:
            continue
        try:
            trial = bench_topk_kd_loss.trial_of(case, member)
            trial.reset()
            trial.step()
        except peers.Absent:
            continue
        found[member.name] = trial.wrong(trial.errors())
        trial.reset()
    # TRL's normalises in the logits' dtype.
    half = found.pop("trl", [])
    assert (half != []) == (dtype == "bfloat16" and "trl float32" in found)
    assert {"kdfast", "kdfast overwrite", "eager"} <= {*found}
    assert not any(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tail", "name"),
    [
        ("support", "kdfast"),
        ("support", "kdfast sparse gradient"),
        ("support", "eager"),
        ("support", "eager sparse gradient"),
        ("support", "eager full head"),
        ("bucket", "kdfast"),
        ("bucket", "full head + topk_kd_loss"),
        ("bucket", "eager full head"),
    ],
)
def test_every_member_on_a_head_has_the_same_definition_of_a_tail(tail, name, dtype):
    case = linear_topk_kd_loss_peers.LinearTopKCase(48, 1009, dtype, tail=tail, k=16, width=24)
    trial = _trial(bench_linear_topk_kd_loss, linear_topk_kd_loss_peers, case, name)
    trial.step()
    assert trial.wrong(trial.errors()) == []
    columns = 16 if tail == "support" else 1009
    assert trial.operations == 3 * 2 * 48 * columns * 24
    trial.reset()
    problem = bench_linear_topk_kd_loss.problem_of(case)
    assert problem.hidden.grad is None
    assert problem.weight.grad is None


@pytest.mark.parametrize("variant", [{}, {"causal": True}, {"padded": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("teacher_width", [8, 12])
def test_every_member_compares_the_same_scores(teacher_width, dtype, variant):
    case = attention_mse_peers.AttentionCase(3, 4, 37, 8, teacher_width, dtype, **variant)
    found = {}
    for member in attention_mse_peers.members_of(case):
        if member.compiled:
            continue
        try:
            trial = bench_attention_mse.trial_of(case, member)
            trial.reset()
            trial.step()
        except peers.Absent:
            continue
        found[member.name] = trial.wrong(trial.errors())
        trial.reset()
    rounded = [name for name in found if f"{name} float32" in found]
    assert bool(rounded) == (dtype == "bfloat16")
    assert all(found.pop(name) for name in rounded)
    by_hand = "tinybert" if case.padded else "eager"
    assert {"kdfast", "kdfast gram", "kdfast tiled"} <= {*found}
    assert any(name.startswith(by_hand) for name in found)
    assert not any(found.values())
    problem = bench_attention_mse.problem_of(case)
    assert problem.student_query.grad is None
    assert problem.student_key.grad is None


def test_suite_on_attention_maps(tmp_path):
    shown, kept = _measure_and_report(
        tmp_path,
        "(kdfast or eager or tinybert or textbrewer) and not compile",
        "2x3x40x8x12:float32",
    )
    assert [*kept] == ["attention_mse"]
    groups = report.grouped(kept["attention_mse"]["measurements"])
    shape = "attention_mse 2×3×40×8/12 float32"
    assert [*groups] == [shape, f"{shape}, causal", f"{shape}, padded"]
    assert [entry["member"] for entry in groups[shape]][:4] == [
        "kdfast",
        "kdfast gram",
        "kdfast tiled",
        "eager",
    ]
    assert not any(entry["wrong"] for members in groups.values() for entry in members)
    fused = groups[shape][0]
    assert fused["gradient_bytes"] == 2 * (2 * 3 * 40 * 8) * 4
    assert fused["bytes_moved"] == 2 * (2 * 3 * 40) * (8 + 8 + 12) * 4
    header, _, row, causal = report.summary("attention_mse", groups).splitlines()
    assert row.count("|") == causal.count("|") == header.count("|")
    assert "| textbrewer |" in shown or "Absent: textbrewer: " in shown
    text = (tmp_path / "README.md").read_text()
    assert f"<!-- attention_mse:begin -->\n{header}\n" in text


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("operation", "width"), [("hidden_mse", 24), ("hidden_mse", 40), ("hidden_cosine", 40)]
)
def test_every_member_between_hidden_states_has_the_same_definition(
    operation, width, dtype, masked
):
    case = hidden_peers.HiddenCase(operation, 200, width, 40, dtype, masked=masked)
    found = {}
    for member in hidden_peers.members_of(case):
        if member.compiled:
            continue
        try:
            trial = bench_hidden.trial_of(case, member)
            trial.reset()
            trial.step()
        except peers.Absent:
            continue
        found[member.name] = trial.wrong(trial.errors())
        trial.reset()
    # Who computes in half precision rounds the loss.
    half = {name for name in found if name in ("eager", "textbrewer")} if dtype != "float32" else {}
    assert all("loss" in found.pop(name) for name in half)
    assert "eager float32" in found or dtype == "float32"
    assert ("bare products" in found) == (width == 24)
    assert "kdfast" in found
    assert not any(found.values())


# As in the suite, the teacher's layers are no multiple of the student's.
STEP_SIZES = (3, 20, 101, 2, 24, 3, 36, "float32")


@pytest.mark.parametrize("recipe", bench_training_step.RECIPES)
def test_every_step_is_the_literal_one(recipe):
    case = training_step_peers.StepCase(recipe, *STEP_SIZES)
    problem = bench_training_step.problem_of(case)
    with_gradient = {"tinybert_general": "projection.weight", "hinton": "cls.predictions.bias"}
    for name, parameter in with_gradient.items():
        assert (parameter in problem.gradients) == (name == recipe)
    names = []
    for member in training_step_peers.members_of(case):
        trial = bench_training_step.trial_of(case, member)
        # What a member leaves behind must not change the next one.
        for _ in range(2):
            trial.reset()
            trial.step()
            assert trial.wrong(trial.errors()) == []
        for name, part in trial.parts.items():
            trial.reset()
            part()
            # The last of the student's parameters, in the part and out of it.
            for leaf, inside in (
                ("projection.weight", name == "projected models"),
                ("cls.predictions.bias", recipe == "hinton"),
                ("bert.encoder.layer.1.output.dense.weight", True),
            ):
                assert (problem.leaves[leaf].grad is not None) == inside
        names.append(member.name)
        trial.reset()
        assert all(leaf.grad is None for leaf in problem.leaves.values())
    assert {"kdfast", "bare models", "eager"} <= {*names}


def test_a_step_that_forgets_a_layer_or_a_parameter_is_wrong():
    case = training_step_peers.StepCase("tinybert_general", *STEP_SIZES)
    trial = bench_training_step.trial_of(case, training_step_peers.EAGER)
    trial.reset()
    trial.step()
    leaves = bench_training_step.problem_of(case).leaves
    leaf = leaves["bert.encoder.layer.0.attention.self.query.weight"]
    leaf.grad *= 1.01
    assert trial.wrong(trial.errors()) == ["gradient"]
    leaf.grad = None
    assert trial.wrong(trial.errors()) == ["gradient"]
    trial.reset()

    short = training_step_peers.Member(
        "short", lambda case: lambda models: lambda: training_step_peers.tinybert_loss(models) / 2
    )
    trial = bench_training_step.trial_of(case, short)
    trial.step()
    assert trial.wrong(trial.errors()) == ["loss", "gradient"]


def test_suite_on_training_steps(tmp_path):
    shown, kept = _measure_and_report(
        tmp_path, "kdfast or bare or eager", "3x20x101x2x24x3x36:float32"
    )
    assert [*kept] == ["training_step"]
    groups = report.grouped(kept["training_step"]["measurements"])
    shape = "3×20×101 2×24 from 3×36 float32"
    assert [*groups] == [
        f"training_step {recipe} {shape}" for recipe in bench_training_step.RECIPES
    ]
    assert not any(entry["wrong"] for members in groups.values() for entry in members)
    assert shown.count("| a part of the work |") == 2
    header, _, *rows = report.summary("training_step", groups).splitlines()
    assert len(rows) == 2
    assert all(row.count("|") == header.count("|") for row in rows)
    assert f"<!-- training_step:begin -->\n{header}\n" in (tmp_path / "README.md").read_text()


def test_the_share_of_a_loss_is_what_its_own_models_leave():
    def member(name: str, seconds: float, **parts: float) -> dict:
        sizes = {"peak_bytes": 3 * MIB, "gradient_bytes": MIB, "is_ceiling": not parts}
        taken = {"part_seconds": {n.replace("_", " "): part for n, part in parts.items()}}
        return {"group": "g", "member": name, "seconds": seconds, "wrong": [], **sizes, **taken}

    models = member("bare models", 0.9)
    plain = member("kdfast", 1.0, models=0.8), models, member("eager", 2.0, models=0.9)
    projected = (
        member("kdfast", 1.0, models=0.9, projected_models=0.95),
        models,
        member("eager", 2.0, models=1.2, projected_models=1.25),
    )
    for members, shown in (
        (plain, ["800 ms / 900 ms", "20.0% / 55.0%", "–"]),
        (projected, ["900 ms / 1200 ms", "10.0% / 40.0%", "5.0% / 37.5%"]),
    ):
        (group,) = report.grouped([*members]).values()
        assert report.LAYOUTS["training_step"].summary_cells(group) == [
            "2000 ms (2.00×)",
            *shown,
            "2 / 2 MiB",
        ]


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
        # pytest-benchmark measures nothing in a process that looks like one of several workers.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | environment,
        # Not the root, which `-m` would make importable: its kernels/ is no package by itself.
        cwd=BENCH,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def _measure_and_report(tmp_path: Path, members: str, *shapes: str) -> tuple[str, dict]:
    """What a run of the whole suite on a few shapes shows, and what is kept after it."""
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
        *(f"--shape={shape}" for shape in shapes),
        *("--quick", "-k", members),
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
        tmp_path, "kdfast or eager or forgetful or speculators or tvd", "8x97:float32"
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
    assert "\nold linear_kd_loss\n<!-- linear_kd_loss:end -->\n" in text
    assert text.endswith("-->\nafter\n")
    plots = sorted(path.name for path in tmp_path.glob("kd_loss-*.svg"))
    assert [name.rpartition("-")[2] for name in plots] == ["dark.svg", "light.svg"]


def test_suite_from_hidden_states_leaves_what_is_kept_of_other_operations(tmp_path):
    (tmp_path / "results").mkdir()
    slug = report.device_slug({"cores": os.cpu_count()})
    earlier = {"facts": {"cores": 64}, "date": "2026-01-01", "absent": {}, "measurements": []}
    kept_path = tmp_path / "results" / f"{slug}.json"
    kept_path.write_text(json.dumps({"kd_loss": earlier, "linear_kd_loss": earlier}))
    shown, kept = _measure_and_report(
        tmp_path, "kdfast or bare or eager or forgetful or fused", "8x12x20x97:bfloat16"
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
    assert "| a part of the work |" in shown
    header, _, row, _ = report.summary("linear_kd_loss", groups).splitlines()
    assert header.startswith("| case | kdfast | bare products | eager | torch.compile | Liger |")
    assert row.count("|") == header.count("|")
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"linear_kd_loss-{slug}-{theme}.svg" for theme in ("dark", "light")
    }
    text = (tmp_path / "README.md").read_text()
    assert "\nold kd_loss\n" in text
    assert f"<!-- linear_kd_loss:begin -->\n{header}\n" in text


def test_suite_on_truncated_teachers(tmp_path):
    shown, kept = _measure_and_report(
        tmp_path,
        "(kdfast or eager or alone or bare or forgetful or distillkit)"
        " and not (none or labels or logsumexp or full or overwrite)",
        *("8x97:float32:k5", "8x12x97:float32:k5"),
    )
    assert {*kept} == {"truncated_softmax", "topk_kd_loss", "linear_topk_kd_loss"}
    groups = {}
    for run in kept.values():
        groups |= report.grouped(run["measurements"])
    verdicts = {
        group: {entry["member"]: entry["wrong"] for entry in members}
        for group, members in groups.items()
    }
    right = {"kdfast": [], "eager": []}
    wrong = {"forgetful": ["loss", "gradient"]}
    assert verdicts == {
        "truncated_softmax 8×97 float32 k=5": right | {"torch.topk alone": []},
        "topk_kd_loss 8×97 float32 k=5 bucket": right | wrong,
        "topk_kd_loss 8×97 float32 k=5 support": right | wrong,
        "linear_topk_kd_loss 8×12×97 float32 k=5 support": right
        | {"kdfast sparse gradient": [], "eager sparse gradient": []},
        "linear_topk_kd_loss 8×12×97 float32 k=5 bucket": {"kdfast": [], "bare products": []},
    }
    entries = 8 * 5 * (4 + 8)
    bytes_moved = {group: members[0]["bytes_moved"] for group, members in groups.items()}
    assert bytes_moved["topk_kd_loss 8×97 float32 k=5 bucket"] == 2 * 8 * 97 * 4 + entries
    assert bytes_moved["topk_kd_loss 8×97 float32 k=5 support"] == 8 * 97 * 4 + entries
    assert "Absent: distillkit: " in shown
    assert shown.count("| a part of the work |") == 2

    for operation in kept:
        of_operation = report.grouped(kept[operation]["measurements"])
        header, _, *rows = report.summary(operation, of_operation).splitlines()
        assert rows
        assert all(row.count("|") == header.count("|") for row in rows)
        text = (tmp_path / "README.md").read_text()
        assert f"<!-- {operation}:begin -->\n{header}\n" in text
        assert len([*tmp_path.glob(f"{operation}-*.svg")]) == 2
    (plot,) = tmp_path.glob("linear_topk_kd_loss-*-dark.svg")
    assert ">8×12×97 float32 k=5 support<" in plot.read_text()


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


def _dense_member(name: str, seconds: float, wrong: tuple[str, ...] = (), **more: object) -> dict:
    return {
        **{"group": "kd_loss 1", "member": name, "seconds": seconds, "wrong": [*wrong]},
        **{"peak_bytes": 3 * MIB, "gradient_bytes": MIB, "iqr_seconds": 0.1 * seconds},
        **{"bytes_per_second": 2e9, "share_of_copy": 0.5, **more},
    }


def test_a_table_shows_the_fastest_right_one_of_each_family():
    members = [
        _dense_member("kdfast", 1.0),
        _dense_member("eager", 4.0, peak_bytes=9 * MIB),
        _dense_member("compile", 3.0),
        _dense_member("compile log-target", 2.0),
        _dense_member("liger chunked", 2.5),
        _dense_member("trl", 0.5, wrong=("gradient",)),
    ]
    assert report.summary("kd_loss", report.grouped(members)).splitlines()[-1] == (
        "| kd_loss 1 | 1000 ms | 4000 ms (4.0×) | log-target 2000 ms (2.0×) "
        "| liger chunked 2500 ms (2.5×) | 2.0 GB/s | 50% | 2 / 8 MiB |"
    )


def test_the_headline_is_the_fastest_right_one_of_everybody_else(monkeypatch):
    monkeypatch.setattr(report, "HEADLINES", ("kd_loss 1",))
    members = [
        _dense_member("kdfast", 1.0),
        _dense_member("kdfast overwrite", 0.5),
        _dense_member("quack softmax", 0.7, is_ceiling=True),
        _dense_member("eager", 4.0),
        _dense_member("compile", 3.0),
        _dense_member("trl", 0.5, wrong=("gradient",)),
        _dense_member("kdfast", 1.0, group="kd_loss 2"),
    ]
    _, _, row = report.headline({"kd_loss": {"measurements": members}}).splitlines()
    assert row == (
        "| kd_loss 1 | 1000 ms | 4000 ms (4.0×) | torch.compile 3000 ms (3.0×) | 2 / 2 MiB |"
    )


def test_every_headline_is_measured():
    kept = report.load(BENCH / "results" / "cpu-2core.json")
    shown = report.headline(kept)
    assert [group for group in report.HEADLINES if f"| {group} |" not in shown] == []


def test_rounds_that_differ_much_are_named():
    members = [_dense_member("kdfast", 1.0), _dense_member("eager", 4.0, iqr_seconds=2.0)]
    assert report.unsteady(report.grouped(members)) == [
        "Unsteady: kd_loss 1: eager: its middle half spans 50% of its median."
    ]


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
