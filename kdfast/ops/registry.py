"""Which backends exist, which of them work here, and which one serves a call."""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor

library = torch.library.Library("kdfast", "FRAGMENT")

BACKENDS = ("cuda", "triton", "cpp", "torch")
_chosen: list[str] = []

# Thread-block clusters came with it.
CLUSTER_CAPABILITY = (9, 0)


@functools.cache
def extension() -> ModuleType:
    """The compiled module `kdfast._C`: present but not loadable is an error, not a slow path."""
    try:
        return importlib.import_module("kdfast._C")
    except ImportError as error:
        raise ImportError(
            f"kdfast's compiled extension was built but does not load: {error}. "
            "Reinstall kdfast, or set KDFAST_BACKEND=torch to do without it."
        ) from error


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def missing(backend: str) -> str | None:
    """Why `backend` cannot work in this process, or None if it can."""
    if backend == "cpp" and importlib.util.find_spec("kdfast._C") is None:
        return (
            "the C++ extension was not built: no C++ compiler was found when kdfast was installed"
        )
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "no CUDA device (TRITON_INTERPRET=1 runs its kernels on the CPU, for tests)"
    if backend == "cuda":
        return _missing_cuda()
    return None


def _missing_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    devices = range(torch.cuda.device_count())
    newest = max(torch.cuda.get_device_capability(device) for device in devices)
    if newest < CLUSTER_CAPABILITY:
        return f"its kernels need compute capability 9.0 or newer, and there is {_dotted(newest)}"
    if (reason := missing("cpp")) is not None:
        return reason
    if not hasattr(extension(), "cuda_runtime_problem"):
        return (
            "the extension was built without CUDA kernels: no nvcc was found when kdfast was "
            "installed, or KDFAST_BUILD_CUDA=0"
        )
    # A driver older than the CUDA runtime that was built in, for one.
    return extension().cuda_runtime_problem() or None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def available_backends() -> tuple[str, ...]:
    """The backends that work in this process, fastest first; "torch" is always among them."""
    return tuple(backend for backend in BACKENDS if missing(backend) is None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every call inside the block with one backend, in every thread.

    Args:
        name: "auto", "cuda", "triton", "cpp" or "torch".

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend does not work in this process; at a call, that it cannot serve
            these tensors.

    Example:
        >>> with kdfast.backend("torch"):
        ...     loss = kdfast.kd_loss(student_logits, teacher_logits)
    """
    _chosen.append(_checked(name, "backend(name)"))
    try:
        yield
    finally:
        _chosen.pop()


def _checked(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {name!r}")
    if name != "auto" and (reason := missing(name)) is not None:
        raise RuntimeError(f"{source} asks for {name!r}, which does not work here: {reason}")
    return name


def _cannot_serve(name: str, tensor: Tensor) -> str | None:
    """Why a backend that works here cannot take this tensor, or None if it can."""
    device = tensor.device.type
    if name == "cpp" and device != "cpu":
        return f"it works on CPU tensors, and these are on {device}"
    if name in ("triton", "cuda"):
        if tensor.dtype == torch.float64:
            return "it has no float64 kernels"
        if device != "cuda" and not (name == "triton" and device == "cpu" and _interpreted()):
            return f"it works on CUDA tensors, and these are on {device}"
    if name == "cuda":
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < CLUSTER_CAPABILITY:
            return (
                f"it needs compute capability 9.0 or newer, and {tensor.device} has "
                f"{_dotted(capability)}"
            )
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def chosen() -> str:
    """The backend that was chosen by hand, or "auto"."""
    if _chosen:
        return _chosen[-1]
    return _checked(os.environ.get("KDFAST_BACKEND", "auto"), "KDFAST_BACKEND")


def select(operation: str, backends: Mapping[str, Callable], tensor: Tensor) -> Callable:
    """The one of an operation's `backends` that serves tensors like `tensor`.

    A backend chosen by hand serves the call or says why it cannot. Otherwise the device decides,
    and what no fused backend serves goes to plain PyTorch, with one warning.
    """
    name = chosen()
    if name != "auto":
        reason = (
            "it does not implement this operation"
            if name not in backends
            else _cannot_serve(name, tensor)
        )
        if reason is not None:
            raise RuntimeError(
                f"{operation}: the backend {name!r} cannot serve this call: {reason}"
            )
        return backends[name]
    candidates = ("cpp",) if tensor.device.type == "cpu" else ("cuda", "triton")
    reasons = []
    for candidate in (candidate for candidate in candidates if candidate in backends):
        reason = missing(candidate) or _cannot_serve(candidate, tensor)
        if reason is None:
            return backends[candidate]
        reasons.append(f"{candidate}: {reason}")
    _warn_once(f"kdfast.{operation} runs in plain PyTorch, slowly ({'; '.join(reasons)})")
    return backends["torch"]
