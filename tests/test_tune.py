"""Launches are measured, wrong ones are out, and what was measured reaches the kernels."""

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("triton")

import measure
import tune
from kdfast.kernels import tuning

SETTING = tune.Setting("cpu", quick=True)
OWN = {"BLOCK_V": 64, "num_warps": 4, "maxnreg": 64}


def test_a_device_has_the_rows_that_were_measured_on_its_kind(monkeypatch):
    chosen, faster = ((math.inf, OWN),), ((math.inf, OWN | {"num_warps": 8}),)
    table = tuning.Tuning({2: chosen, 4: chosen}, {(9, 0): {2: faster}})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert table[2] == chosen
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capability, warps in (((9, 0), 8), ((8, 0), 4)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at=capability: at)
        assert tuning.row_launch(table, 2, 50257)["num_warps"] == warps
        assert tuning.row_launch(table, 4, 50257)["num_warps"] == 4


def test_a_launch_that_is_tried_comes_before_all_others(monkeypatch):
    rows = ((math.inf, OWN),)
    table = tuning.Tuning({2: rows, 4: rows}, {(9, 0): {2: rows}})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    tried = ((math.inf, {"BLOCK_V": 128}),)
    with tune._replaced(table, 2, tried):
        assert (table[2], table[4]) == (tried, rows)
    assert (table[2], table[4]) == (rows, rows)
    assert table.measured == {(9, 0): {2: rows}}


def test_neighbours_differ_by_one_step_and_stay_within_limits():
    found = tune.neighbours(OWN | {"num_warps": 32, "maxnreg": 128})
    assert found == [
        {"BLOCK_V": 32, "num_warps": 32, "maxnreg": 128},
        {"BLOCK_V": 128, "num_warps": 32, "maxnreg": 128},
        {"BLOCK_V": 64, "num_warps": 16, "maxnreg": 128},
        {"BLOCK_V": 64, "num_warps": 32, "maxnreg": 64},
        {"BLOCK_V": 32, "num_warps": 16, "maxnreg": 128},
    ]


def _row(step) -> tune.Row:
    """Work that takes as long as its launch says, and goes wrong where it says so."""
    now = {}

    def trial() -> measure.Trial:
        return measure.Trial(
            step=lambda: step(now), reset=lambda: None, tolerances={"loss": 0.1},
            errors=lambda: {"loss": now.get("error", 0.0)}, bytes_moved=1, about={},
            copy_rate=1.0, product_rate=1.0,
        )  # fmt: skip

    def launching(launch):
        now.clear()
        now.update(launch)
        return nullcontext()

    candidates = [{"wait": 5}, {"wait": 1}, {"wait": 0, "error": 1.0}, {"wait": -1}]
    return tune.Row("T", "place", {"wait": 2}, candidates, {"one": trial, "two": trial}, launching)


def test_the_fastest_right_launch_is_named(monkeypatch):
    monkeypatch.setattr(measure, "timed", lambda step, device: lambda: 1.0 + step())
    refused = ValueError("not so many\nwarps")

    def step(now):
        if now["wait"] < 0:
            raise refused
        return now["wait"]

    found = tune.measured(_row(step), tune.Setting("cpu"))
    by_wait = {entry["launch"]["wait"]: entry for entry in found["launches"]}
    assert by_wait[2]["seconds"] == {"one": 3.0, "two": 3.0}
    assert [by_wait[wait]["relative"] for wait in (2, 5, 1)] == pytest.approx([1, 2, 2 / 3])
    assert by_wait[0]["problem"] == "ArithmeticError: wrong loss"
    assert by_wait[-1]["problem"] == "ValueError: not so many"
    assert tune.verdict(found) == ["place", "{'wait': 2}", "{'wait': 1}", "0.67", "change"]

    # What is hardly faster is noise.
    found["launches"] = [by_wait[2], by_wait[1] | {"relative": 0.98}]
    assert tune.verdict(found)[2:] == ["the same", "1", "stays"]


def test_every_table_is_measured():
    tables = {name for name, value in vars(tuning).items() if isinstance(value, tuning.Tuning)}
    assert tables | {"ENTRY_PRODUCTS", "CLUSTER_BLOCKS"} == {*tune.TABLES}
    for name in tables:
        rows = [*tune.TABLES[name](SETTING)]
        # In attention_mse four kernels share an entry.
        entries = sum(map(len, getattr(tuning, name).values()))
        assert len(rows) == entries * (4 if name == "ATTENTION_MSE" else 1)
        assert all(row.trials and row.candidates for row in rows)


def test_clusters_that_fit_are_tried(monkeypatch):
    """Of a device whose blocks have 200 KB, for rows of two sides."""
    extension = SimpleNamespace(
        plan_kd_loss_cluster=lambda device, vocab, student, teacher, kind: (8, ""),
        kd_loss_block_bytes=lambda vocab, blocks, student, teacher: (
            2 * vocab // blocks * getattr(torch, student).itemsize
        ),
    )
    monkeypatch.setattr(tune.kdfast, "available_backends", lambda: ("cuda", "torch"))
    monkeypatch.setattr(tune.kd_loss_operation.registry, "extension", lambda: extension)
    properties = SimpleNamespace(shared_memory_per_block_optin=200_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    rows = {row.place: row for row in tune.TABLES["CLUSTER_BLOCKS"](SETTING)}
    tried = {
        place: [launch["blocks"] for launch in (row.launch, *row.candidates)]
        for place, row in rows.items()
    }
    assert tried["bfloat16, 32000"] == [8, 1, 2, 4, 16]
    assert tried["bfloat16, 262144"] == [8, 16]
    assert tried["float32, 128256"] == [8, 16]
    row = rows["bfloat16, 32000"]
    with row.launching({"blocks": 4}):
        assert tune.kd_loss_operation._cluster_blocks(0, 32000, "bfloat16", "bfloat16", 0)[0] == 4


@pytest.mark.parametrize("table", ["HIDDEN_MSE", "SCALE_GRADIENT"])
def test_the_command_in_the_interpreter(table, tmp_path):
    command = [Path(tune.__file__), "--device=cpu", "--quick", f"--table={table}"]
    shown = subprocess.run(
        [sys.executable, *command, "--results", tmp_path],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (path,) = tmp_path.glob("tuning-cpu-*core.json")
    kept = json.loads(path.read_text())[table]
    assert kept["facts"]["code"]
    rows = sum(map(len, getattr(tuning, table).values()))
    assert len(kept["rows"]) == rows
    assert shown.count("\n| ") == rows + 1
    for row in kept["rows"]:
        assert [entry.get("problem") for entry in row["launches"]] == [None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_cuda_device_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    assert tune.main() == 0
    assert capsys.readouterr().out == "no CUDA device found: nothing was measured\n"
