"""Time, memory and bandwidth of a step: what every benchmark here is made of.

A step is a function of no arguments. Whoever measures warms it up first and clears what an earlier
call left behind (a gradient on a leaf, say): memory that is already resident is part of the level
that a peak is counted from.
"""

import ctypes
import functools
import gc
import importlib.util
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Step = Callable[[], object]
Case = TypeVar("Case")
Problem = TypeVar("Problem")

# Short enough to see a temporary of a millisecond, long enough to leave the cores to the step.
SAMPLING_PERIOD = 2e-4

# Before a round on a GPU: of twice its L2 at a time, some 30 µs each.
FLUSHES = 20

# A GPU copies smaller buffers at less than its rate: the launch shows.
LEAST_COPY = {"cpu": 0, "cuda": 2**30}

# Rows and columns of the square product whose rate is the limit of a step that is made of products:
# large enough for the device's best.
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Trial:
    """One way to do a piece of work, ready to be checked and measured.

    Args:
        step: one round.
        reset: makes the next round like the first, untimed.
        errors: after a round, how far its results are from the reference, by name.
        tolerances: the largest error of each that is still agreement.
        bytes_moved: what every implementation has to read and write, however it works.
        about: the parameters of the work, to be kept with its measurement.
        copy_rate: bytes per second of a copy, measured in this process.
        product_rate: operations per second of a matrix product in the dtype of the work, likewise.
        gradient_bytes: what of the step's memory is the gradients that it returns.
        operations: floating-point operations of the matrix products that it cannot do without.
        parts: steps that are a part of this one, timed in turns with it: medians that are minutes
            apart differ by more than what is left of the work.
    """

    step: Step
    reset: Callable[[], None]
    errors: Callable[[], Mapping[str, float]]
    tolerances: Mapping[str, float]
    bytes_moved: int
    about: Mapping[str, object]
    copy_rate: float
    product_rate: float
    gradient_bytes: int = 0
    operations: int = 0
    parts: Mapping[str, Step] = field(default_factory=dict)

    @property
    def limit_seconds(self) -> float:
        """What nobody gets below: the bytes at a copy's rate, or the products at a product's."""
        return max(self.bytes_moved / self.copy_rate, self.operations / self.product_rate)

    def wrong(self, errors: Mapping[str, float]) -> list[str]:
        """The results that disagree with the reference. A NaN does: it compares as False."""
        return [name for name, most in self.tolerances.items() if not errors[name] <= most]


def one_at_a_time(make: Callable[[Case], Problem]) -> Callable[[Case], Problem]:
    """Remember what `make` made of the last case, and forget it before the next one is made.

    Members of a case follow one another, and two of the largest problems do not fit on a device.
    """
    last = {}

    @functools.wraps(make)
    def problem_of(case: Case) -> Problem:
        if case not in last:
            last.clear()
            release_memory()
            last[case] = make(case)
        return last[case]

    return problem_of


def release_memory() -> None:
    """Give back what nobody holds any more, so that the next one finds it in one piece."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64, a few rows at a time."""
    squared_distance = squared_norm = 0.0
    for f, e in zip(found.split(64), expected.split(64), strict=True):
        squared_distance += (f.double() - e).square().sum().item()
        squared_norm += e.double().square().sum().item()
    return math.sqrt(squared_distance / squared_norm)


def synchronize() -> None:
    """Wait for the GPU, if this process uses one: a launch returns before its kernel has run."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(step: Step, device: str) -> Callable[[], float]:
    """A function that runs `step` and returns its seconds.

    On a GPU those between two events, between which nobody waits. Its caches are flushed before the
    first, so often that the host has launched the step when the flushing ends: what the host takes
    is not timed, up to half a millisecond or so.
    """

    def on_cpu() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def on_cuda() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            _cache_filler().zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_cuda if torch.device(device).type == "cuda" else on_cpu


@functools.cache
def _cache_filler() -> Tensor:
    """Twice what the L2 of this GPU holds."""
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def median_seconds(
    step: Step, *, device: torch.device | str = "cpu", repeats: int = 10, warmup: int = 3
) -> float:
    """The median seconds of `step` over `repeats` calls after `warmup` untimed ones."""
    seconds = timed(step, device)
    return statistics.median([seconds() for _ in range(warmup + repeats)][warmup:])


def peak_bytes(step: Step) -> int:
    """The most memory that `step` holds at once, in bytes, above what was held before the call.

    Counts allocated bytes on CUDA, once this process uses it, and resident pages elsewhere: those
    include what a first call touches besides its tensors, code and thread stacks, so warm it up.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        return _cuda_peak_bytes(step)
    _return_free_memory()
    try:
        return _high_water_bytes(step)
    except OSError:
        return _sampled_peak_bytes(step)


def copy_bandwidth(device: torch.device | str, size: int) -> float:
    """Bytes per second, read and written together, of copying `size` bytes; on a GPU 1 GiB or more.

    The ceiling of a step whose work is to move its bytes: shares are quoted of it.
    """
    size = max(size, LEAST_COPY[torch.device(device).type])
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device=device)


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, on random numbers.

    The ceiling of a step whose work is products. Of zeros a GPU makes some products faster.
    """
    size = PRODUCT_SIZE[torch.device(device).type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device=device)


def _cuda_peak_bytes(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _return_free_memory() -> None:
    # Blocks that the allocator kept for reuse are resident already: what is served from them would
    # not show.
    # musl and macOS have no malloc_trim, and return large blocks by themselves.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _high_water_bytes(step: Step) -> int:
    """The kernel's own record, which misses nothing however short; OSError where there is none."""
    with open("/proc/self/clear_refs", "w") as clear_refs:
        # Sets the high-water mark back to what is resident now.
        clear_refs.write("5")
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _sampled_peak_bytes(step: Step) -> int:
    before = peak = _resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLING_PERIOD):
            peak = max(peak, _resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        returned = step()
        # What the step returns is still held here, and may never have been sampled.
        peak = max(peak, _resident_bytes())
        del returned
    finally:
        done.set()
        sampler.join()
    return max(0, peak - before)


def _resident_bytes() -> int:
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if importlib.util.find_spec("psutil") is None:
        raise RuntimeError("measuring memory on this system needs psutil: pip install psutil")
    import psutil

    return psutil.Process().memory_info().rss
