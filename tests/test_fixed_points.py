"""What a student learns from each tail of a truncated teacher, to the end: a student whose logits
are free and that begins with equal probabilities, as docs/truncated-softmax.md has it.
"""

import pytest
import torch

pytest.importorskip("matplotlib")

import fixed_points
from fixed_points import ENTRIES, VOCAB

from kdfast.reference import TAILS

TEACHER = fixed_points.teacher_logits()
SUPPORT = TEACHER.softmax(-1)[0, :ENTRIES]


@pytest.fixture(scope="module")
def points(one_thread):
    losses = fixed_points.losses(TEACHER)
    return {name: fixed_points.fixed_point(loss, TEACHER) for name, loss in losses.items()}


def test_the_teacher_keeps_three_tenths_in_its_largest_entries():
    assert SUPPORT.sum().item() == pytest.approx(0.301, abs=1e-5)
    assert (TEACHER.diff() <= 0).all()


@pytest.mark.parametrize("tail", TAILS)
def test_every_tail_teaches_the_proportions_within_the_support(points, tail):
    found = points[tail].student[:ENTRIES]
    torch.testing.assert_close(found / found.sum(), SUPPORT / SUPPORT.sum(), rtol=5e-3, atol=0)


def test_the_whole_teacher_is_learned_whole(points):
    assert points["full"].support == pytest.approx(0.301, abs=1e-3)
    assert points["full"].divergence < 5e-3


def test_a_bucket_teaches_the_probabilities_and_leaves_the_rest_as_it_was(points):
    point = points["bucket"]
    torch.testing.assert_close(point.student[:ENTRIES], SUPPORT, rtol=1e-3, atol=0)
    # The student began with equal probabilities off the support, and has them still.
    rest = (1 - point.support) / (VOCAB - ENTRIES)
    torch.testing.assert_close(
        point.student[ENTRIES:], torch.full_like(point.student[ENTRIES:], rest)
    )
    assert point.divergence == pytest.approx(0.790, abs=5e-3)


@pytest.mark.parametrize(
    ("tail", "outside", "divergence"), [("none", 1.1e-3, 4.96), ("renormalize", 2e-4, 6.14)]
)
def test_a_teacher_without_a_tail_empties_the_student_s(points, tail, outside, divergence):
    assert 1 - points[tail].support == pytest.approx(outside, rel=0.2)
    assert points[tail].divergence == pytest.approx(divergence, abs=0.2)


def test_a_softmax_over_the_support_alone_leaves_its_weight_nearly_as_it_was(points):
    assert points["support"].support == pytest.approx(ENTRIES / VOCAB, abs=2e-3)
    assert points["support"].divergence == pytest.approx(1.525, abs=1e-2)


def test_samples_teach_the_whole_teacher_with_no_tail_at_all(points):
    assert points["sampled"].support == pytest.approx(0.301, abs=3e-3)
    assert points["sampled"].divergence < 5e-3
    # Beyond what the draws of one token reach, where truncation teaches nothing: the second and the
    # third hundred.
    for start in (100, 200):
        part = slice(start, start + 100)
        expected = TEACHER.softmax(-1)[0, part].sum().item()
        assert points["sampled"].student[part].sum().item() == pytest.approx(expected, rel=0.05)


def test_the_table_and_the_plots_show_every_student(points, tmp_path):
    table = fixed_points.table(points).splitlines()
    assert len(table) == 2 + len(points)
    assert table[2 + list(points).index("bucket")] == "| `bucket` | 0.3010 | 0.790 |"
    path = tmp_path / "plots" / "dark.svg"
    fixed_points.plot(points, TEACHER, "dark", path)
    for name in ("teacher", "sampled", *TAILS):
        assert f">{name}<" in path.read_text()
