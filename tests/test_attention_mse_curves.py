"""What docs/attention-mse.md shows: the errors near convergence, to their orders of magnitude, and
growth with the sequence.
"""

import pytest
import torch

pytest.importorskip("matplotlib")

import attention_mse_curves as curves
import report
from attention_mse_curves import BASES, EPSILONS, SIZES

# float32's unit, and bfloat16's.
UNIT, HALF_UNIT = 2.0**-24, 2.0**-9


@pytest.fixture(scope="module")
def precisions():
    return curves.precisions(torch.float32)


@pytest.fixture(scope="module")
def half_precisions():
    return curves.precisions(torch.bfloat16, ("one basis", "rotated"))


@pytest.mark.parametrize("basis", BASES)
def test_the_student_has_its_teacher_s_scores(basis):
    student_query, student_key, query, key = curves.student_and_teacher(basis, 0.0)
    torch.testing.assert_close(student_query @ student_key.mT, query @ key.mT)
    assert student_query.shape[-1] == BASES[basis]


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("method", curves.METHODS)
def test_in_one_basis_nothing_is_lost(precisions, method, epsilon):
    error = precisions["one basis", method, epsilon]
    assert error.loss < 1e-6
    assert error.gradient < 2e-6


def test_a_student_smaller_than_its_teacher_loses_nothing():
    found = curves.small_precisions()
    assert set(found) == {(method, size) for method in curves.METHODS for size in SIZES}
    for error in found.values():
        assert error.loss < 1e-6
        assert error.gradient < 2e-6
    table = curves.small_table(found).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 1", "| 0.1", "| 0.01", "| 0.0001"]


@pytest.mark.parametrize("basis", ["rotated", "rotated, wider"])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_in_another_basis_each_method_loses_its_power_of_epsilon(precisions, basis, epsilon):
    tiled, gram = (precisions[basis, method, epsilon] for method in ("tiled", "gram"))
    # Scores that cancel lose u / ε of the gradient, and the value's square of it averages out.
    assert tiled.gradient < 10 * UNIT + 5 * UNIT / epsilon
    assert tiled.loss < 1e-6 + UNIT / epsilon
    # Gram matrices as much of the gradient, give or take a factor, and u / ε² of the value.
    assert gram.gradient < 20 * UNIT + 30 * UNIT / epsilon
    assert gram.loss < 10 * UNIT + 20 * UNIT / epsilon**2
    if epsilon <= 1e-3:
        assert gram.gradient > UNIT / epsilon
        # One value, which may be right by chance.
        assert gram.loss > 1e-4


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_auto_loses_neither(precisions, basis, epsilon):
    error = precisions[basis, "auto", epsilon]
    assert error.loss < 1e-4
    assert error.gradient < 1e-4
    if epsilon <= 1e-2:
        assert error.loss < 1e-6
        assert error.gradient < 1e-6


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("method", ["tiled", "auto"])
def test_half_precision_inputs_are_what_is_lost(half_precisions, method, epsilon):
    for basis in ("one basis", "rotated"):
        error = half_precisions[basis, method, epsilon]
        # Of the inputs as they are, one rounding of the gradient.
        assert error.loss < 1e-4
        assert error.gradient < HALF_UNIT
    # Of what they were before, no method gets back what they lost.
    assert half_precisions["rotated", "rounding", epsilon].gradient > HALF_UNIT / 10 / max(
        epsilon, HALF_UNIT
    )


def test_the_table_and_the_plot_show_every_method(precisions, tmp_path):
    table = curves.precision_table(precisions).splitlines()
    assert len(table) == 2 + len(EPSILONS)
    assert {line.count(" | ") for line in table} == {len(BASES) * 4}
    path = tmp_path / "plots" / "dark.svg"
    curves.plot_precision(precisions, "dark", path)
    for method in curves.METHODS:
        assert f">{method}<" in path.read_text()


def test_growth_is_linear_in_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "LONGEST_EAGER", 1024)
    lengths = (1024, 8192)
    found = curves.growths(lengths, repeats=3)
    for name in ("kdfast", "kdfast causal"):
        short, long = (found[name, length] for length in lengths)
        # Eight times as many tokens: quadratic growth would be 64 times the time.
        assert long.seconds < 24 * short.seconds
        assert long.peak_bytes < 8 * short.peak_bytes + 8 * report.MIB
    # A map of 12 heads, and another.
    assert found["eager", 1024].peak_bytes > 2 * 12 * 4 * 1024**2
    assert ("eager", 8192) not in found
    table = curves.growth_table(found).splitlines()
    assert len(table) == 4
    assert table[-1].endswith("| – | – | – |")
    path = tmp_path / "growth.svg"
    curves.plot_growth(found, "light", path)
    for name in ("kdfast", "kdfast causal", "eager"):
        assert f">{name}<" in path.read_text()
