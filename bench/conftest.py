"""What every benchmark here shares: the options, how a member is measured, what a run records."""

import os
import platform
import subprocess
import time
from collections.abc import Callable

import measure
import peers
import pytest
import torch

import kdfast

# A median of ten rounds; a fast step gets as many as fit into SECONDS, up to the most.
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 10, 50, 2.0
# The first rounds of a process are slow for a second or more: a virtual machine gets its memory
# from its host as it touches it.
WARMUP_ROUNDS, WARMUP_SECONDS = 2, 1.5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kdfast")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--threads", type=int, help="CPU threads (default: torch's own choice)")
    group.addoption(
        "--quick",
        action="store_true",
        help="few rounds, and hardly a warm-up: whether everything works, not how fast",
    )
    group.addoption(
        "--shape",
        action="append",
        type=_shape,
        metavar="SIZES:DTYPE[:kK]",
        help="measure this shape instead of the suites' own, repeatable: 512x50257:bfloat16 (rows, "
        "vocabulary) for kd_loss, 512x384x768x30522:float32 (the models' widths between them) for "
        "linear_kd_loss, 512x50257:float32:k64 for truncated_softmax and topk_kd_loss, "
        "512x384x30522:float32:k64 for linear_topk_kd_loss, 8x12x128x64x64:float32 (batch, heads, "
        "tokens, both models' channels of a head) for attention_mse, 8192x312x768:float32 (rows, "
        "both widths) for hidden_mse and hidden_cosine, 8x128x30522x4x312x6x384:float32 (batch, "
        "tokens, vocabulary, both models' layers and widths) for training_step; a suite that no "
        "shape fits is skipped",
    )


def _shape(text: str) -> tuple:
    """`512x50257:bfloat16:k64` as (512, 50257, "bfloat16", 64), the way a suite's SHAPES has it."""
    sizes, dtype, *k = text.split(":")
    if len(k) > 1 or not all(entries.startswith("k") for entries in k):
        raise ValueError(text)
    return *map(int, sizes.split("x")), dtype, *(int(entries[1:]) for entries in k)


def _fits(shape: tuple, like: tuple) -> bool:
    """Where the dtype stands, and what stands around it, says whose shape it is."""
    return [type(item) for item in shape] == [type(item) for item in like]


def pytest_configure(config: pytest.Config) -> None:
    config.absent = {}
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each member of each of a suite's `groups`, on its SHAPES or the chosen ones."""
    device = metafunc.config.getoption("--device")
    shapes = metafunc.module.SHAPES[device]
    if chosen := metafunc.config.getoption("--shape"):
        shapes = [shape for shape in chosen if _fits(shape, shapes[0])]
    entries = list(metafunc.module.groups(device, shapes)) if shapes else []
    # What `pytest -k` can be given: letters, digits and words.
    ids = [f"{group}: {name}".replace("×", "x") for group, name, *_ in entries]
    metafunc.parametrize(("group", "name", "case", "member"), entries, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip("no CUDA device found: nothing was measured"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        terminalreporter.write_line("no CUDA device found: nothing was measured")
    absent = {pair for members in config.absent.values() for pair in members.items()}
    for member, reason in sorted(absent):
        terminalreporter.write_line(f"absent: {member}: {reason}")


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["absent"] = config.absent
    output_json["facts"] = _facts(config.getoption("--device"))


def _facts(device: str) -> dict[str, object]:
    if device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.partition("\n")[0]
        name = torch.cuda.get_device_name()
        settings = {"driver": driver, "cuda": torch.version.cuda}
    else:
        name = _processor()
        settings = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {
        "device": name,
        **settings,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "backends": list(kdfast.available_backends()),
        "versions": peers.versions(),
    }


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@pytest.fixture
def measured(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Check a member against the reference, then measure its memory and its time.

    A member that disagrees is measured all the same and marked as wrong: the report says so.
    """

    quick = request.config.getoption("--quick")
    warmup_seconds, most_rounds = (0.0, MIN_ROUNDS) if quick else (WARMUP_SECONDS, MAX_ROUNDS)

    def measured(
        group: str, member: str, build: Callable[[], measure.Trial], copy_rate: float
    ) -> None:
        try:
            trial = build()
            trial.reset()
            trial.step()
        except (peers.Absent, torch.OutOfMemoryError) as reason:
            request.config.absent.setdefault(group, {})[member] = str(reason).partition("\n")[0]
            pytest.skip(str(reason))
        errors = trial.errors()

        def timed() -> None:
            trial.step()
            measure.synchronize()

        trial.reset()
        peak_bytes = measure.peak_bytes(trial.step)
        seconds = []
        while len(seconds) < WARMUP_ROUNDS or sum(seconds) < warmup_seconds:
            trial.reset()
            start = time.perf_counter()
            timed()
            seconds.append(time.perf_counter() - start)
        rounds = int(SECONDS / min(seconds))
        benchmark.group, benchmark.name = group, member
        benchmark.pedantic(
            timed,
            setup=trial.reset,
            rounds=min(most_rounds, max(MIN_ROUNDS, rounds)),
        )
        trial.reset()
        benchmark.extra_info |= {
            "member": member,
            **trial.about,
            "wrong": trial.wrong(errors),
            "errors": dict(errors),
            "bytes_moved": trial.bytes_moved,
            "peak_bytes": peak_bytes,
            "gradient_bytes": trial.gradient_bytes,
            "operations": trial.operations,
            "copy_bytes_per_second": copy_rate,
        }
        if benchmark.enabled:
            rate = trial.bytes_moved / benchmark.stats.stats.median
            benchmark.extra_info |= {"bytes_per_second": rate, "share_of_copy": rate / copy_rate}

    return measured
