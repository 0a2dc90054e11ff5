import math

import pytest
import torch
from tolerances import LOSS

import kdfast
from kdfast import reference
from kdfast.ops.sampled_softmax import PROPOSAL_BYTES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in ("cpp", "torch") if name in kdfast.available_backends()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kdfast.backend(request.param):
        yield request.param


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(dtype)


def oracle(scores, k, temperature=1.0, **options):
    """In float64."""
    return reference.truncated_softmax_rows(scores.double(), k, temperature, **options)


def assert_truncates(scores, k, temperature=1.0, tolerance=None, **options):
    result = kdfast.truncated_softmax(scores, k, temperature=temperature, **options)
    log_probs, indices = oracle(scores, k, temperature, **options)
    assert result.indices.dtype == torch.int64
    assert torch.equal(result.indices, indices)
    expected = torch.float64 if scores.dtype == torch.float64 else torch.float32
    assert result.log_probs.dtype == expected
    tolerance = LOSS[scores.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(
        result.log_probs.double(), log_probs, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return result


# The specification itself.


def test_reference_on_hand_worked_values():
    # exp of (ln 4, 0, ln 3, 0) is (4, 1, 3, 1), which sum to 9.
    scores = torch.tensor([math.log(4), 0.0, math.log(3), 0.0], dtype=torch.float64)
    log_probs, indices = reference.truncated_softmax_rows(scores, 3)
    assert indices.tolist() == [0, 2, 1]
    torch.testing.assert_close(log_probs.exp() * 9, torch.tensor([4.0, 3.0, 1.0]).double())


def test_reference_is_log_softmax_and_topk():
    scores = logits(5, 6, 40).double()
    log_probs, indices = reference.truncated_softmax_rows(scores, 7, 2.0)
    expected = (scores / 2).log_softmax(-1).topk(7)
    torch.testing.assert_close(log_probs, expected.values)
    assert torch.equal(indices, expected.indices)


# Every precision, vocabulary and k against it.


@pytest.mark.parametrize("vocab", [1, 7, 2047, 2048, 2049, 6145, 32003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype, vocab, backend):
    scores = logits(3, vocab, dtype=dtype)
    for k in {1, min(vocab, 2), min(vocab, 64), min(vocab, 128), min(vocab, 200), vocab}:
        for temperature in (1.0, 3.0):
            assert_truncates(scores, k, temperature)


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"), [(8, 50257, torch.float32), (4, 128256, torch.bfloat16)]
)
@pytest.mark.parametrize("k", [1, 64, 1000, 5000])
def test_large_vocabularies(rows, vocab, dtype, k, backend):
    # PyTorch sums a row of exponentials in float32.
    assert_truncates(
        logits(rows, vocab, dtype=dtype), k, tolerance=1e-6 if backend == "cpp" else 1e-5
    )


@pytest.mark.parametrize("k", [1, 5, 64, 129, 3000])
@pytest.mark.parametrize("vocab", [3000, 20000])
def test_rows_in_an_order_that_hides_the_largest(vocab, k, backend):
    up = torch.arange(vocab).float() / 300
    scores = torch.stack(
        [
            up,
            up.flip(0),
            # The largest stand together, at the end of a chunk and over its boundary.
            torch.zeros(vocab).index_fill_(0, torch.arange(2000, 2100), 1.0),
            up.remainder(7),
            torch.randperm(vocab) / 300,
        ]
    )
    assert_truncates(scores, k)


# Ties.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_of_equal_logits_the_lower_index_comes_first(levels, dtype, backend):
    scores = torch.randint(levels, (4, 10007)).to(dtype)
    for k in (1, 3, 64, 500, 2500, 10007):
        assert_truncates(scores, k)


def test_zero_has_no_sign(backend):
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0] * 700])
    assert kdfast.truncated_softmax(scores, 5).indices.tolist() == [[0, 1, 2, 3, 4]]


# Extremes.


@pytest.mark.parametrize("k", [1, 10, 200, 5000])
@pytest.mark.parametrize("kept", [1, 9, 3000])
def test_minus_infinity_is_listed_when_there_is_nothing_else(kept, k, backend):
    scores = torch.full((3, 5000), -math.inf)
    scores[:, torch.randperm(5000)[:kept]] = logits(kept)
    result = assert_truncates(scores, k)
    assert result.log_probs.isfinite().sum(-1).tolist() == [min(k, kept)] * 3
    assert all(row.unique().numel() == k for row in result.indices)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 2047, 4999])
def test_a_row_without_a_softmax_is_nan(column, value, backend):
    scores = logits(4, 5000)
    clean = kdfast.truncated_softmax(scores, 70)
    scores[1, column], scores[2] = value, -math.inf
    result = kdfast.truncated_softmax(scores, 70)
    assert result.log_probs.isnan().all(-1).tolist() == [False, True, True, False]
    assert result.indices[1:3].tolist() == [list(range(70))] * 2
    for part, expected in zip(result, clean, strict=True):
        assert torch.equal(part[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e3])
def test_huge_logits(temperature, backend):
    scores = logits(4, 3000)
    scores[:, ::7], scores[1, 5] = -1e4, 1e4
    assert_truncates(scores, 100, temperature)


def test_probabilities_are_those_of_the_whole_vocabulary(backend):
    scores = logits(4, 3000)
    whole = kdfast.truncated_softmax(scores, 3000)
    torch.testing.assert_close(whole.log_probs.logsumexp(-1), torch.zeros(4), atol=1e-6, rtol=0)
    assert torch.equal(kdfast.truncated_softmax(scores, 9).log_probs, whole.log_probs[:, :9])


# The keywords and layouts.


def test_per_token_temperature(backend):
    assert_truncates(logits(3, 4, 500), 9, torch.rand(3, 4) + 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_columns_do_not_exist(dtype, backend):
    scores = logits(5, 40, dtype=dtype)
    scores[:, 37:] = math.nan
    for k in (4, 37):
        result = kdfast.truncated_softmax(scores, k, vocab_size=37)
        expected = kdfast.truncated_softmax(scores[:, :37], k)
        assert all(map(torch.equal, result, expected))


def test_strided_rows(backend):
    wide = logits(4, 6, 50)
    for view in (
        lambda x: x[:, :-1],
        lambda x: x[1:, 2:, 3:40],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., ::2],
        lambda x: x[0, 0],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.view(2, 2, 6, 50).transpose(0, 2),
    ):
        result = kdfast.truncated_softmax(view(wide), 5)
        expected = kdfast.truncated_softmax(view(wide).contiguous(), 5)
        assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 3, 9)])
def test_empty_batch(shape, backend):
    result = kdfast.truncated_softmax(torch.empty(shape), 4)
    assert result.log_probs.shape == result.indices.shape == (*shape[:-1], 4)


# torch.compile and the operator.


@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck(per_token):
    temperature = torch.rand(3, 4) + 1 if per_token else None
    settings = {"k": 5, "temperature": 1.0, "vocab_size": 18}
    torch.library.opcheck(
        torch.ops.kdfast.truncated_softmax.default, (logits(3, 4, 20), temperature), settings
    )


def test_compiles_whole_with_dynamic_shapes():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def truncated(scores):
        return kdfast.truncated_softmax(scores * 1.0, 5, temperature=2.0)

    for rows, vocab in ((4, 100), (6, 130), (9, 257)):
        scores = logits(rows, vocab)
        expected = kdfast.truncated_softmax(scores, 5, temperature=2.0)
        assert all(map(torch.equal, truncated(scores), expected))


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": torch.zeros(4, 9).long()}, TypeError, "logits must be one of"),
        ({"logits": torch.zeros(4, 9, requires_grad=True)}, ValueError, "logits requires grad"),
        ({"logits": torch.tensor(1.0)}, ValueError, "vocabulary dimension"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 10}, ValueError, "k must be at most the 9 columns that exist, got 10"),
        ({"k": 8, "vocab_size": 7}, ValueError, "k must be at most the 7 columns"),
        ({"k": 2.0}, TypeError, "k must be a whole number, got float"),
        ({"vocab_size": 10}, ValueError, "vocab_size must be .* got 10"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be .* got 0"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": torch.zeros(4)}, ValueError, "temperature must be finite and above 0 for"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature must have"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        kdfast.truncated_softmax(**{"logits": torch.zeros(4, 9), "k": 3, **change})


# sampled_softmax.


def test_sample_is_distinct_sorted_and_padded():
    sample = kdfast.sampled_softmax(logits(2, 3, 50), 40, temperature=0.7)
    assert sample.log_probs.shape == sample.indices.shape == (2, 3, 40)
    assert sample.log_probs.dtype == torch.float32
    assert sample.indices.dtype == torch.int64
    listed = sample.indices >= 0
    assert not listed.all()
    assert (sample.log_probs.diff(dim=-1)[listed[..., 1:]] <= 0).all()
    assert torch.equal(sample.log_probs == -math.inf, ~listed)
    for row, there in zip(sample.indices.view(-1, 40), listed.view(-1, 40), strict=True):
        assert row[there].unique().numel() == there.sum()
        # Padding stands behind everything else.
        assert torch.equal(there, there.sort(descending=True).values)


def test_sample_at_the_teachers_temperature_is_shares_of_draws():
    sample = kdfast.sampled_softmax(
        logits(4, 30, dtype=torch.bfloat16), 16, temperature=2.0, proposal_temperature=2.0
    )
    counts = sample.log_probs.exp() * 16
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(counts.sum(-1), torch.full((4,), 16.0))


def test_weights_are_counts_times_probability_by_proposal():
    scores = logits(1, 6).double()
    sample = kdfast.sampled_softmax(scores, 100, temperature=1.0, proposal_temperature=2.0)
    log_ratio = scores.log_softmax(-1) - (scores / 2).log_softmax(-1)
    listed = sample.indices[0] >= 0
    counts = 100 * (sample.log_probs[0, listed] - log_ratio[0, sample.indices[0, listed]]).exp()
    torch.testing.assert_close(counts, counts.round())
    assert counts.round().sum() == 100


@pytest.mark.parametrize("proposal_temperature", [1.0, 2.0])
def test_sample_is_unbiased(proposal_temperature):
    """In expectation the weights are p, and so is the gradient of tail="none" the full one."""
    vocab, draws, samples = 40, 12, 20000
    teacher, student = logits(vocab, scale=1.5).double(), logits(vocab).double()
    sample = kdfast.sampled_softmax(
        teacher.expand(samples, -1), draws, proposal_temperature=proposal_temperature,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    p = teacher.softmax(-1)
    proposal = (teacher / proposal_temperature).softmax(-1)
    # Σ over draws of independent weights w with E w = p: Var = (p² / proposal − p²) / draws.
    deviation = ((p**2 / proposal - p**2) / draws / samples).sqrt()

    listed = sample.indices >= 0
    weights = torch.zeros(samples, vocab + 1, dtype=torch.float64)
    weights.scatter_(-1, torch.where(listed, sample.indices, vocab), sample.log_probs.exp())
    # Of 40 normal deviates one above 4.5 has a chance of 3e-4; the seed is fixed.
    assert ((weights[:, :vocab].mean(0) - p).abs() < 4.5 * deviation).all()

    rows = student.expand(samples, -1).contiguous().requires_grad_()
    kdfast.topk_kd_loss(rows, sample, tail="none").backward()
    full = student.clone().requires_grad_()
    kdfast.kd_loss(full, teacher).backward()
    # The gradient is q · Σ weights − weights, so its deviation is at most that of both.
    mass_deviation = ((p**2 / proposal).sum() - 1).clamp_min(0).div(draws * samples).sqrt()
    bound = 4.5 * (deviation + student.softmax(-1) * mass_deviation)
    assert ((rows.grad.sum(0) - full.grad).abs() < bound).all()


def test_truncation_is_not():
    """What the test above can see: the largest 12 are off by far more than its bound."""
    teacher, student = logits(40, scale=1.5).double(), logits(40).double()
    full, cut = (student.clone().requires_grad_() for _ in range(2))
    kdfast.kd_loss(full, teacher).backward()
    kdfast.topk_kd_loss(cut, kdfast.truncated_softmax(teacher, 12), tail="renormalize").backward()
    assert (cut.grad - full.grad).abs().max() > 0.01


def test_sample_depends_on_the_generator_alone(monkeypatch):
    scores = logits(7, 30)
    first = kdfast.sampled_softmax(scores, 9, generator=torch.Generator().manual_seed(3))
    # Two rows at a time.
    monkeypatch.setitem(PROPOSAL_BYTES, "cpu", 2 * 30 * 8)
    second = kdfast.sampled_softmax(scores, 9, generator=torch.Generator().manual_seed(3))
    assert all(map(torch.equal, first, second))


def test_sample_never_draws_what_has_no_probability():
    scores = logits(4, 30)
    scores[:, ::2] = -math.inf
    scores[:, -1] = -1e5
    sample = kdfast.sampled_softmax(scores, 2000)
    drawn = sample.indices[sample.indices >= 0]
    assert (drawn % 2 == 1).all()
    assert (drawn < 29).all()


def test_sample_of_a_row_of_nan():
    scores = logits(3, 30)
    scores[1, 4] = math.nan
    sample = kdfast.sampled_softmax(scores, 9)
    assert sample.log_probs[:, 0].isnan().tolist() == [False, True, False]
    assert kdfast.topk_kd_loss(logits(3, 30), sample, tail="none", reduction="none").isnan()[1]


def test_sample_of_no_rows():
    sample = kdfast.sampled_softmax(torch.empty(2, 0, 9), 4)
    assert sample.indices.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4, 9).long()}, TypeError, "logits must be one of"),
        ({"logits": torch.zeros(4, 9, requires_grad=True)}, ValueError, "logits requires grad"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "vocabulary dimension"),
        ({"draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"draws": 1.5}, TypeError, "draws must be a whole number"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"proposal_temperature": -1}, ValueError, "proposal_temperature must be finite"),
    ],
)
def test_bad_samples_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        kdfast.sampled_softmax(**{"logits": torch.zeros(4, 9), "draws": 3, **change})
