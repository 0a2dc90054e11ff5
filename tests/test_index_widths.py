"""That kernels count elements in 64 bits, read in what the Triton compiler makes of them.

A row's number times a stride passes 2**31 at 16k tokens x 128k vocabulary. Columns of a row do not:
they stay in 32 bits. tests/test_gpu*.py have the tensors for it, where there is memory.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton
import triton.language as tl
from kdfast.kernels.gradient import scale_gradient_
from kdfast.kernels.linear_topk_kd_loss import (
    entry_hidden_gradient,
    entry_logits,
    entry_weight_gradient,
)
from kdfast.kernels.truncated_softmax import truncated_softmax_rows
from test_codegen import (
    Device,
    launch_attention_mse,
    launch_hidden_cosine,
    launch_hidden_mse,
    launch_kd_loss,
    launch_topk_kd_loss,
)
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

BFLOAT16 = torch.bfloat16

LAUNCHES = {
    "kd_loss": [
        lambda: launch_kd_loss(32000, divergence="skew_reverse_kl"),
        lambda: launch_kd_loss(50257, divergence="forward_kl"),
    ],
    "scale_gradient": [lambda: scale_gradient_(torch.empty(4, 50257), torch.ones(4))],
    "truncated_softmax": [
        lambda: truncated_softmax_rows(
            torch.empty(1, 4, 50257, dtype=BFLOAT16), 64, torch.ones(4), vocab_size=50257
        )
    ],
    "topk_kd_loss": [lambda: launch_topk_kd_loss(50257, 64)],
    "linear_topk_kd_loss": [
        lambda: entry_logits(*_head(), _entries()),
        lambda: entry_hidden_gradient(
            torch.empty(8, 64), _head()[1], _entries(), torch.empty(8, 96)
        ),
        lambda: entry_weight_gradient(
            torch.empty(8, 64), _head()[0], _entries().flatten(), _entries()[0, :9],
            torch.empty(8, 96),
        ),
    ],
    "hidden_mse": [lambda: launch_hidden_mse(769, BFLOAT16)],
    "hidden_cosine": [lambda: launch_hidden_cosine(769, BFLOAT16)],
    "attention_mse": [
        lambda: launch_attention_mse((64, 64), torch.float32, "gram"),
        lambda: launch_attention_mse((64, 64), torch.float32, "gram", causal=True),
        lambda: launch_attention_mse((64, 64), BFLOAT16, "tiled", causal=True),
    ],
    "attention_mse, fused": [lambda: launch_attention_mse((64, 64), torch.float32, "gram")],
}  # fmt: skip

# Programs along the second axis that share a row, or a matrix of 128 × 128: their numbers stay
# below its width.
OF_ONE_ROW = {
    "entry_hidden_gradient_kernel",
    "entry_logits_kernel",
    "entry_weight_gradient_kernel",
    "join_kernel",
}

ASSIGNMENT = re.compile(r"^\s*(%\w+)(?::\d+)? = ([\w.]+)(.*?)(?: loc\(|$)")
NAME = re.compile(r"%\w+")

# What is 64 bits wide, or no number that an element is counted from.
ENDS = {"arith.extsi", "arith.cmpi", "arith.trunci", "tt.load", "tt.addptr"}
CONSTANT = frozenset({"constant"})


def _head():
    return torch.empty(8, 96, dtype=BFLOAT16), torch.empty(100, 96, dtype=BFLOAT16)


def _entries():
    return torch.zeros(8, 64, dtype=torch.long)


class _Compiled(Exception):
    """The code, where the compiler has got as far as it is read."""


@pytest.fixture
def code_of(monkeypatch):
    """Runs launchers; of every kernel that they would launch come its name and its code."""
    found = []
    run, add_stages = JITFunction.run, CUDABackend.add_stages

    def no_further(self, stages, *args):
        add_stages(self, stages, *args)
        make = stages["ttir"]

        def stop(*args):
            raise _Compiled(str(make(*args)))

        stages["ttir"] = stop

    def compile_only(self, *args, warmup, **kwargs):
        try:
            code = run(self, *args, warmup=True, **kwargs).asm["ttir"]
        except _Compiled as compiled:
            code = str(compiled)
        found.append((self.__name__, code))

    monkeypatch.setattr(triton.runtime.driver, "_active", Device(90))
    monkeypatch.setattr(CUDABackend, "add_stages", no_further)
    monkeypatch.setattr(JITFunction, "run", compile_only)

    def code(launch):
        found.clear()
        launch()
        return list(found)

    return code


def narrow_products(code):
    """Products in 32 bits: the axes of programs whose numbers are in them; and of the products of
    two other variables, the lines that take them."""
    lines = code.splitlines()
    variables, axes = {}, set()
    others = []
    # In their order: blocks beside each other use the same names.
    for number, line in enumerate(lines):
        if (match := ASSIGNMENT.match(line)) is None:
            continue
        name, operation, rest = match.groups()
        operands = NAME.findall(rest)
        if operation == "tt.get_program_id":
            variables[name] = {rest.split()[0]}
            continue
        inherited = set().union(*(variables.get(operand, set()) for operand in operands)) - CONSTANT
        if operation == "arith.muli" and "i64" not in rest.rpartition(":")[2]:
            axes |= inherited
            if not inherited and all(variables.get(operand) != CONSTANT for operand in operands):
                others += _uses(name, lines[number + 1 :])
        variables[name] = inherited if operation not in ENDS else set()
        if operation == "arith.constant":
            variables[name] = CONSTANT
    return axes, others


def _uses(name, lines):
    """The lines that take a value, until its name stands for another."""
    found = []
    for line in lines:
        if re.match(rf"\s*{name}(:\d+)? =", line):
            break
        if re.search(rf"{name}\b", line):
            found.append(line)
    return found


@pytest.mark.parametrize("operation", LAUNCHES)
def test_rows_are_counted_in_64_bits(operation, code_of, monkeypatch):
    if operation == "attention_mse, fused":
        monkeypatch.setattr("kdfast.kernels.attention_mse.FEWEST_FUSED_PROGRAMS", 1)
    for launch in LAUNCHES[operation]:
        for kernel, code in code_of(launch):
            axes, others = narrow_products(code)
            assert axes <= ({"y"} if kernel in OF_ONE_ROW else set()), kernel
            # How often a loop is gone through, or from which end.
            assert all(re.search(r"scf\.for|arith\.subi", line) for line in others), kernel


@triton.jit
def careless_kernel(values_ptr, stride, other_stride):
    row = tl.program_id(0)
    values = values_ptr + row * stride + other_stride * stride + tl.arange(0, 16)
    tl.store(values, 0.0)


@triton.jit
def careful_kernel(values_ptr, stride):
    row = tl.program_id(0).to(tl.int64)
    tl.store(values_ptr + row * stride + tl.arange(0, 16), 0.0)


def test_a_row_in_32_bits_is_seen(code_of):
    ((_, code),) = code_of(lambda: careless_kernel[(4,)](torch.empty(64), 16, 16))
    axes, others = narrow_products(code)
    assert axes == {"x"}
    assert others
    assert not any(re.search(r"scf\.for|arith\.subi", line) for line in others)
    ((_, code),) = code_of(lambda: careful_kernel[(4,)](torch.empty(64), 16))
    assert narrow_products(code) == (set(), [])
