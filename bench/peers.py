"""Who is measured against kdfast, and on what: what the members of every operation have in common.

An operation's members stand in OPERATION_peers.py, hand-written code and other libraries alike. All
members of a case compute one definition from the same inputs. Where a library's definition differs,
its adapter makes up the difference as a user of that library would, and says so.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

import kdfast

# Of a case's inputs, labels last.
Loss = Callable[..., Tensor]

PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "trl",
    "textbrewer",
    "speculators",
    "quack-kernels",
    "cut-cross-entropy",
    "distillkit",
)


@dataclass(frozen=True)
class Case:
    """What every member of a group computes, and on what."""

    rows: int
    vocab: int
    dtype: str
    device: str = "cpu"
    temperature: float = 2.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 1.0
    backward: bool = True

    @property
    def shape(self) -> str:
        return f"{self.rows}×{self.vocab} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Member:
    """One way to compute a case: `write` gives the loss, or raises `Absent` with the reason."""

    name: str
    write: Callable[[Case], Loss]
    # Its loss is the cross-entropy of the teacher with the student: KL plus the teacher's entropy,
    # a constant to the student, so that the gradient is the same.
    adds_teacher_entropy: bool = False
    # The gradient lands in the storage of the logits, which must be written anew for each round.
    overwrites_student: bool = False
    # It computes in the dtype of its input: too coarse for half precision, where it is measured as
    # it is and once more on inputs taken to float32.
    computes_in_input_dtype: bool = False
    upcasts: bool = False
    compiled: bool = False
    # A part of the work that nobody can leave out: a bound to compare with, and no loss.
    is_ceiling: bool = False
    # How often it reads or writes the logits, where that is a part of what the case needs.
    passes: int | None = None
    # One of kdfast's own, instead of the one that it chooses.
    backend: str | None = None

    def build(self, case: Case) -> Loss:
        loss = self.write(case)
        if self.backend is not None:
            loss = _with_backend(self.backend, loss)
        if self.upcasts:
            loss = _upcasting(loss)
        # For one shape: nothing is lost to dynamic ones.
        return torch.compile(loss, dynamic=False) if self.compiled else loss


class Absent(Exception):
    """A member cannot take part, and why."""


def _with_backend(name: str, loss: Loss) -> Loss:
    try:
        with kdfast.backend(name):
            pass
    except RuntimeError as reason:
        raise Absent(str(reason)) from reason

    def by_backend(*inputs: Tensor) -> Tensor:
        with kdfast.backend(name):
            try:
                return loss(*inputs)
            except RuntimeError as error:
                if f"backend {name!r} cannot serve" in str(error):
                    raise Absent(str(error)) from error
                raise

    return by_backend


def in_both_kernels(
    fused: Member, case: Case, backends: Mapping[str, object]
) -> tuple[Member, ...]:
    """kdfast, and once more with each of an operation's GPU kernels if there are several.

    So one run decides between them, whichever kdfast chooses by itself.
    """
    kernels = [name for name in ("cuda", "triton") if name in backends]
    if case.device != "cuda" or len(kernels) < 2:
        return (fused,)
    return fused, *(replace(fused, name=f"{fused.name} {name}", backend=name) for name in kernels)


def _upcasting(loss: Loss) -> Loss:
    def upcasting(*inputs: Tensor) -> Tensor:
        return loss(*(x.float() if x.is_floating_point() else x for x in inputs))

    return upcasting


class GivenGradients(torch.autograd.Function):
    """A loss whose gradients are there already, for one that is the end of its graph.

    Without that they would have to be multiplied by what comes in: another pass over them.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients


def in_both_precisions(members: Iterable[Member], case: Case) -> tuple[Member, ...]:
    """The members, and once more upcast those that need it for the case's dtype."""
    found = []
    for member in members:
        found.append(member)
        if member.computes_in_input_dtype and case.torch_dtype.itemsize < 4:
            found.append(replace(member, name=f"{member.name} float32", upcasts=True))
    return tuple(found)


def imported(module: str, package: str) -> ModuleType:
    """A peer's module; `Absent` where it is not installed or does not import."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Absent(f"{package} is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise Absent(f"{package} does not import: {error}") from error


def only(case: Case, **served: object) -> None:
    """Refuse a case that differs from what a member serves."""
    for field, value in served.items():
        if getattr(case, field) != value:
            raise Absent(f"serves {field}={value} alone")


def needs_cuda(case: Case) -> None:
    if case.device != "cuda":
        raise Absent("its Triton kernels need a CUDA device")


def versions() -> dict[str, str]:
    """The installed version of every package that takes part."""
    found = {"kdfast": kdfast.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
