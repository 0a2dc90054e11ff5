"""A training step of every operation, for what holds of all of them: no wait for the device, CUDA
graphs, streams."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import TruncatedSoftmax
from kdfast.reference import TAIL_DIVERGENCES, TAILS

ROWS, VOCAB, WIDTH, ENTRIES = 24, 1003, 64, 8
IGNORED = -100


@dataclass(frozen=True)
class Step:
    """Inputs by name, on the CPU, those that are trained as leaves, and a loss of them by name.

    Args:
        backends: that serve it on a CUDA device, "torch" left out.
    """

    inputs: dict[str, Tensor]
    loss: Callable[..., Tensor]
    backends: tuple[str, ...] = ("triton",)

    def run(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The loss, and the gradient of everything that is trained, times 3."""
        trained = [tensor for tensor in inputs.values() if tensor.requires_grad]
        for tensor in trained:
            tensor.grad = None
        loss = self.loss(**inputs)
        # Incoming gradients of another kind than 1, and without a reduction one per token.
        (3 * (loss if loss.dim() == 0 else loss * loss.detach()).sum()).backward()
        return [loss.detach(), *(tensor.grad for tensor in trained)]


def _normal(*shape: int, dtype: torch.dtype = torch.float32, trained: bool = False) -> Tensor:
    return (2 * torch.randn(shape)).to(dtype).requires_grad_(trained)


def _labels() -> Tensor:
    labels = torch.randint(VOCAB, (ROWS,))
    labels[::5] = IGNORED
    return labels


def _indices() -> Tensor:
    return torch.rand(ROWS, VOCAB).topk(ENTRIES).indices


def _log_probs() -> Tensor:
    return torch.randn(ROWS, ENTRIES).log_softmax(-1) - 0.1


def dense(dtype: torch.dtype, *, per_token: bool = False, **options: object) -> Step:
    inputs = {
        "student_logits": _normal(ROWS, VOCAB, dtype=dtype, trained=True),
        "teacher_logits": _normal(ROWS, VOCAB, dtype=dtype),
        "labels": _labels(),
    }
    if per_token:
        inputs["temperature"] = torch.rand(ROWS) + 0.5
        inputs["token_weight"] = torch.rand(ROWS)
    overwrite = options.pop("overwrite", False)

    def loss(student_logits: Tensor, **others: Tensor) -> Tensor:
        # The logits of a leaf are its owner's.
        logits = 1 * student_logits if overwrite else student_logits
        return kdfast.kd_loss(logits, **others, overwrite_student_logits=overwrite, **options)

    return Step(inputs, loss, ("triton", "cuda"))


def linear(dtype: torch.dtype, **options: object) -> Step:
    inputs = {}
    for owner, width in (("student", WIDTH), ("teacher", 2 * WIDTH)):
        trained = owner == "student"
        inputs[f"{owner}_hidden"] = _normal(ROWS, width, dtype=dtype, trained=trained)
        weight = width**-0.5 * torch.randn(VOCAB, width)
        inputs[f"{owner}_weight"] = weight.to(dtype).requires_grad_(trained)
        inputs[f"{owner}_bias"] = _normal(VOCAB, dtype=dtype, trained=trained)
    inputs["labels"] = _labels()
    return Step(
        inputs, partial(kdfast.linear_kd_loss, chunk_size=10, **options), ("triton", "cuda")
    )


def truncated(dtype: torch.dtype) -> Step:
    inputs = {
        "student": _normal(ROWS, VOCAB, dtype=dtype, trained=True),
        "teacher": _normal(ROWS, VOCAB, dtype=dtype),
        "indices": _indices(),
    }

    def loss(student: Tensor, teacher: Tensor, indices: Tensor) -> Tensor:
        found = kdfast.truncated_softmax(teacher, ENTRIES, temperature=2.0)
        # What the kernel found is there, and what it would find is not on a pretended device.
        top = TruncatedSoftmax(found.log_probs, torch.where(found.indices < 0, 0, indices))
        return kdfast.topk_kd_loss(student, top)

    return Step(inputs, loss)


def sampled(dtype: torch.dtype) -> Step:
    inputs = {
        "student": _normal(ROWS, VOCAB, dtype=dtype, trained=True),
        "teacher": _normal(ROWS, VOCAB, dtype=dtype),
    }

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        sample = kdfast.sampled_softmax(teacher, 12, proposal_temperature=1.5)
        return kdfast.topk_kd_loss(student, sample, tail="none")

    return Step(inputs, loss)


def topk(dtype: torch.dtype, **options: object) -> Step:
    inputs = {
        "student": _normal(ROWS, VOCAB, dtype=dtype, trained=True),
        "log_probs": _log_probs(),
        "indices": _indices(),
        "labels": _labels(),
    }

    def loss(student: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        teacher = TruncatedSoftmax(log_probs, indices)
        return kdfast.topk_kd_loss(student, teacher, labels, **options)

    return Step(inputs, loss)


def linear_topk(dtype: torch.dtype, **options: object) -> Step:
    inputs = {
        "hidden": _normal(ROWS, WIDTH, dtype=dtype, trained=True),
        "weight": _normal(VOCAB, WIDTH, dtype=dtype, trained=True),
        "bias": _normal(VOCAB, dtype=dtype, trained=True),
        "log_probs": _log_probs(),
        "indices": _indices(),
        "labels": _labels(),
    }

    def loss(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_probs: Tensor,
        indices: Tensor,
        labels: Tensor,
    ) -> Tensor:
        return kdfast.linear_topk_kd_loss(
            hidden,
            weight,
            TruncatedSoftmax(log_probs, indices),
            labels,
            student_bias=bias,
            chunk_size=10,
            **options,
        )

    return Step(inputs, loss)


def attention(
    dtype: torch.dtype,
    *,
    teacher_heads: int = 4,
    teacher_width: int = WIDTH,
    masked: bool = False,
    length: int = 96,
    **options: object,
) -> Step:
    inputs = {}
    for owner, heads, width in (("student", 4, WIDTH), ("teacher", teacher_heads, teacher_width)):
        for part in ("query", "key"):
            inputs[f"{owner}_{part}"] = _normal(
                2, heads, length, width, dtype=dtype, trained=owner == "student"
            )
    if masked:
        inputs["key_mask"] = inputs["query_mask"] = torch.rand(2, length) < 0.8
    if teacher_heads != 4:
        inputs["head_map"] = torch.randn(4, teacher_heads)
    return Step(inputs, partial(kdfast.attention_mse, **options))


def states(name: str, dtype: torch.dtype, *, masked: bool = True, **options: object) -> Step:
    width = 2 * WIDTH if name == "projected" else WIDTH
    inputs = {
        "student": _normal(ROWS, WIDTH, dtype=dtype, trained=True),
        "teacher": _normal(ROWS, width, dtype=dtype),
    }
    if name == "projected":
        inputs["weight"] = _normal(width, WIDTH, dtype=dtype, trained=True)
        inputs["bias"] = _normal(width, dtype=dtype, trained=True)
    if masked:
        inputs["mask"] = torch.rand(ROWS) < 0.7
    function = kdfast.hidden_cosine if name == "hidden_cosine" else kdfast.hidden_mse
    return Step(inputs, partial(function, **options))


FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
HARD = {"alpha": 0.5, "temperature": 2.0}

STEPS: dict[str, Callable[[], Step]] = {
    "kd_loss, float32": partial(dense, FLOAT32, divergence="jsd"),
    "kd_loss, bfloat16": partial(dense, BFLOAT16, **HARD),
    "kd_loss, float16": partial(dense, FLOAT16, **HARD),
    "kd_loss, overwritten": partial(dense, BFLOAT16, overwrite=True, **HARD),
    "kd_loss, per token": partial(dense, BFLOAT16, per_token=True, reduction="none"),
    "kd_loss, items": partial(dense, BFLOAT16, num_items=17),
    "linear_kd_loss, float32": partial(linear, FLOAT32, **HARD),
    "linear_kd_loss, bfloat16": partial(linear, BFLOAT16, **HARD),
    "linear_kd_loss, float16": partial(linear, FLOAT16, student_softcap=5.0, **HARD),
    "linear_kd_loss, per token": partial(linear, BFLOAT16, reduction="none"),
    "truncated_softmax": partial(truncated, BFLOAT16),
    "sampled_softmax": partial(sampled, BFLOAT16),
    **{
        f"topk_kd_loss, {tail}": partial(
            topk, BFLOAT16, tail=tail, divergence=TAIL_DIVERGENCES[tail][-1], **HARD
        )
        for tail in TAILS
    },
    "topk_kd_loss, float16": partial(topk, FLOAT16, reduction="none"),
    "linear_topk_kd_loss": partial(linear_topk, BFLOAT16, **HARD),
    "linear_topk_kd_loss, support": partial(linear_topk, BFLOAT16, tail="support"),
    "linear_topk_kd_loss, support per token": partial(
        linear_topk, FLOAT32, tail="support", student_softcap=5.0, reduction="none"
    ),
    "attention_mse, gram": partial(attention, FLOAT32, method="gram", masked=True),
    "attention_mse, tiled": partial(attention, BFLOAT16, method="tiled", masked=True),
    "attention_mse, causal": partial(attention, BFLOAT16, method="gram", causal=True),
    "attention_mse, tinybert": partial(attention, BFLOAT16, reduction="tinybert"),
    "attention_mse, per sample": partial(attention, FLOAT32, reduction="none", length=600),
    "attention_mse, mixed heads": partial(attention, FLOAT32, teacher_heads=6, masked=True),
    "attention_mse, wide heads": partial(attention, BFLOAT16, teacher_width=160, causal=True),
    "hidden_mse, float32": partial(states, "hidden_mse", FLOAT32),
    "hidden_mse, bfloat16": partial(states, "hidden_mse", BFLOAT16, masked=False),
    "hidden_mse, per token": partial(states, "hidden_mse", BFLOAT16, reduction="none"),
    "hidden_mse, projected, float32": partial(states, "projected", FLOAT32),
    "hidden_mse, projected, bfloat16": partial(states, "projected", BFLOAT16),
    "hidden_mse, projected, float16": partial(states, "projected", FLOAT16),
    "hidden_cosine, float32": partial(states, "hidden_cosine", FLOAT32),
    "hidden_cosine, bfloat16": partial(states, "hidden_cosine", BFLOAT16, reduction="sum"),
}

# A loss that a sum of half precision makes of it, where an order of sums may differ between runs.
TOLERANCE = {FLOAT32: 1e-5, BFLOAT16: 2.0**-7, FLOAT16: 2.0**-10, torch.float64: 1e-12}


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to the order of sums in a library's products."""
    for result, other in zip(found, expected, strict=True):
        assert result.isfinite().all()
        error = (result.double() - other.double()).norm()
        assert error <= TOLERANCE[result.dtype] * other.double().norm().clamp_min(math.ulp(1.0))


def needs_memory(gibibytes: float) -> None:
    """Skip a test on a device that has no room for its tensors."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of device memory, and {free:.0f} are free")
