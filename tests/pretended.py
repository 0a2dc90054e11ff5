"""A CUDA device that is not there, to see what Python does with its tensors.

Tensors say that they are on it and are on the CPU, where PyTorch's operators and autograd work on
them as ever. So kdfast takes the way of a GPU, and a value that it reads, for which a real device
would be waited for, raises.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kdfast.ops import (
    attention_mse,
    gradient,
    hidden,
    kd_loss,
    linear_kd_loss,
    linear_topk_kd_loss,
    registry,
    topk_kd_loss,
    truncated_softmax,
)

# Not the current one, so that a launch without a guard is seen.
DEVICE = torch.device("cuda:1")
CURRENT_DEVICE = 0
STREAM = 7

# Called here and not by the dispatcher, below which Python does not see what an operator does.
OPERATORS = {
    "attention_mse_forward": attention_mse._attention_mse_forward,
    "hidden_cosine_forward": hidden._hidden_cosine_forward,
    "hidden_mse_forward": hidden._hidden_mse_forward,
    "kd_loss_forward": kd_loss._kd_loss_forward,
    "linear_kd_loss_forward": linear_kd_loss._linear_kd_loss_forward,
    "linear_topk_kd_loss_forward": linear_topk_kd_loss._linear_topk_kd_loss_forward,
    "scale_gradient_": gradient._scale_gradient,
    "topk_kd_loss_forward": topk_kd_loss._topk_kd_loss_forward,
    "truncated_softmax": truncated_softmax._truncated_softmax,
}

# What hands a value to the host, or a tensor whose size is a value.
READS = {
    "_local_scalar_dense", "_unique", "_unique2", "argwhere", "bincount", "equal", "histc",
    "is_nonzero", "masked_select", "nonzero", "nonzero_numpy", "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostWaits(Exception):
    """The host would wait for the device."""


class OnDevice(Tensor):
    """A tensor of the CPU that says that it is on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    def get_device(self) -> int:
        return DEVICE.index


def on_device(tensor: Tensor) -> Tensor:
    """The same values, and the same leaf or not, on the device."""
    return tensor.detach().as_subclass(OnDevice).requires_grad_(tensor.requires_grad)


class _Device(TorchFunctionMode):
    """What PyTorch makes of its tensors, and what it is asked to make there, is on the device."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if isinstance(function, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
            qualified = str(function).split(".")
            if qualified[0] == "kdfast":
                with self:
                    return OPERATORS[qualified[1]](*args, **kwargs)
        if name == "backward":
            return self._backward(*args, **kwargs)
        values = [*args, *kwargs.values()]
        there = any(isinstance(value, OnDevice) for value in tree_leaves((args, kwargs)))
        devices = [torch.device(v) for v in values if _is_device(v)]
        asked = devices[-1].type if devices else None
        if name in ("tensor", "as_tensor", "asarray") and asked == "cuda" and not there:
            raise HostWaits(f"torch.{name} copies from the host")
        if name in ("to", "cpu", "cuda", "copy_", "tolist", "numpy") and args:
            _check_copy(name, args, asked, kwargs)
        if asked == "cuda":
            there = True
            args, kwargs = tree_map(_at_home, (args, kwargs))
        elif asked == "cpu":
            there = False
        if "out_dtype" in kwargs:
            return _widened_product(function, args, kwargs)
        result = function(*args, **kwargs)
        if name in ("__get__", "__set__"):
            return result
        return tree_map(_placed, result) if there else result

    def _backward(self, loss: Tensor, **options: object) -> None:
        assert not any(options.values()), options
        # PyTorch's own would run what is below it without this mode.
        engine, settings = torch.autograd.Variable._execution_engine, (False, False, ())
        with self:
            engine.run_backward(
                (loss,), (torch.ones_like(loss),), *settings, True, accumulate_grad=True
            )


def _is_device(value: object) -> bool:
    if isinstance(value, torch.device):
        return True
    return isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda")


def _at_home(value: object) -> object:
    return torch.device("cpu") if _is_device(value) else value


def _placed(value: object) -> object:
    if isinstance(value, Tensor) and not isinstance(value, OnDevice):
        return value.as_subclass(OnDevice)
    return value


def _check_copy(name: str, args: tuple, asked: str | None, kwargs: dict) -> None:
    to_device = asked == "cuda" or name == "cuda"
    to_host = asked == "cpu" or name in ("cpu", "tolist", "numpy")
    source = args[0]
    if name == "copy_":
        to_device, to_host = isinstance(args[0], OnDevice), not isinstance(args[0], OnDevice)
        source = args[1]
    is_there = isinstance(source, OnDevice)
    if (to_device and not is_there and not kwargs.get("non_blocking")) or (to_host and is_there):
        raise HostWaits(f"{name} copies between the host and the device")


def _widened_product(function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Products of half precision in float32, which a CPU does not have."""
    dtype, out = kwargs["out_dtype"], kwargs.get("out")
    found = function(*(factor.to(dtype) for factor in args))
    return _placed(found if out is None else out.copy_(found))


class _NoReads(TorchDispatchMode):
    """No operator hands a value to the host."""

    def __torch_dispatch__(
        self, function: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        boolean = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counts = function is torch.ops.aten.repeat_interleave.Tensor and not kwargs.get(
            "output_size"
        )
        if name in READS or boolean or counts:
            raise HostWaits(f"{function} reads a value")
        return function(*args, **kwargs)


class _Guards:
    """In place of torch.cuda's guards: which device is the current one."""

    def __init__(self) -> None:
        self.current = CURRENT_DEVICE

    @contextmanager
    def device_of(self, tensor: Tensor) -> Iterator[None]:
        before, self.current = self.current, tensor.get_device() if tensor.is_cuda else self.current
        try:
            yield
        finally:
            self.current = before


@contextmanager
def device(capability: tuple[int, int] = (9, 0)) -> Iterator[list[tuple[str, int]]]:
    """The device, for the time of a block, of some capability.

    Yields:
        A list that fills with each kernel's launch: its name, and the device that is current, which
        for the extension's own kernels is the one that they are told.
    """
    from triton.runtime.jit import JITFunction

    launches, guards = [], _Guards()

    def launch(kernel: JITFunction, *args: object, **kwargs: object) -> None:
        tensors = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
        assert all(isinstance(tensor, OnDevice) for tensor in tensors), kernel.__name__
        launches.append((kernel.__name__, guards.current))

    def launch_cluster(*, device: int, stream: int, **kwargs: object) -> None:
        assert stream == STREAM
        launches.append(("kd_loss_rows_cuda", device))

    def stream_of(of: torch.device) -> SimpleNamespace:
        assert of == DEVICE
        return SimpleNamespace(cuda_stream=STREAM)

    extension = SimpleNamespace(
        plan_kd_loss_cluster=lambda *_: (1, ""), kd_loss_rows_cuda=launch_cluster
    )
    kd_loss._cluster_blocks.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "missing", lambda backend: None)
        patch.setattr(registry, "extension", lambda: extension)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        patch.setattr(torch.cuda, "device_of", guards.device_of)
        patch.setattr(torch.cuda, "current_stream", stream_of)
        patch.setattr(JITFunction, "run", launch)
        with _NoReads(), _Device():
            yield launches
    kd_loss._cluster_blocks.cache_clear()
