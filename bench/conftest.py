"""What every benchmark here shares: the options, how a member is measured, what a run records."""

import datetime
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import measure
import peers
import pytest
import report
import torch
from facts import facts_of, nvidia_smi

# A median of ten rounds; a fast step gets as many as fit into SECONDS, up to the most.
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 10, 50, 2.0
# The first rounds of a process are slow for a second or more: a virtual machine gets its memory
# from its host as it touches it. A GPU has to raise its clocks.
WARMUP_ROUNDS, WARMUP_SECONDS = 2, {"cpu": 1.5, "cuda": 0.5}

# What a member takes about, from its first call on, to know whether a group can be finished.
MEMBER_SECONDS, COMPILED_MEMBER_SECONDS = 5.0, 30.0

# The exit status of a run that ran out of its minutes: the next one goes on from there.
MORE_TO_DO = 75

# A GPU's clocks are read while it works for so long. The host cannot launch shorter steps faster.
WORKING_SECONDS, SHORTEST_STEP = 0.3, 1e-3

# It needs more than the others: the trainer, and models.
collect_ignore = (
    []
    if all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))
    else ["bench_training_step.py"]
)


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
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="write each measurement to DEVICE.json in this folder as soon as it is made, and "
        "leave out those that the file has already of the same code, versions and device",
    )
    group.addoption(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin nothing after this long, nor a group that would take longer; exit status "
        f"{MORE_TO_DO} if that left anything out",
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
    config.deferred = []
    config.group = None
    config.deadline = time.monotonic() + 60 * config.getoption("--minutes")
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
    if _no_device(config):
        for item in items:
            item.add_marker(pytest.mark.skip(NO_DEVICE))
    elif (folder := config.getoption("--keep")) is not None:
        facts = facts_of(config.getoption("--device"))
        done = report.done(report.load(report.kept_path(folder, facts)), facts)
        kept = [item for item in items if _place(item) in done]
        items[:] = [item for item in items if _place(item) not in done]
        config.hook.pytest_deselected(items=kept)


NO_DEVICE = "no CUDA device found: nothing was measured"


def _no_device(config: pytest.Config) -> bool:
    return config.getoption("--device") == "cuda" and not torch.cuda.is_available()


def _place(item: pytest.Item) -> tuple[str, str]:
    """The group and the name of the member in it, as a kept file has them."""
    return item.callspec.params["group"], item.callspec.params["name"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave to the next run what does not fit into this one's minutes."""
    config = item.config
    (group, _), begun = _place(item), config.group
    needed = MEMBER_SECONDS
    if group != begun:
        names = [name for place, name in map(_place, item.session.items) if place == group]
        compiled = sum("compile" in name for name in names)
        needed = len(names) * MEMBER_SECONDS + compiled * COMPILED_MEMBER_SECONDS
    config.group = group
    # Something is measured in every run, or the next one would have as much to do.
    if config.deferred or (begun and config.deadline - time.monotonic() < needed):
        config.deferred.append(_place(item))
        pytest.skip("left to the next run")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.deferred:
        session.exitstatus = MORE_TO_DO


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if _no_device(config):
        terminalreporter.write_line(NO_DEVICE)
    absent = {pair for members in config.absent.values() for pair in members.items()}
    for member, reason in sorted(absent):
        terminalreporter.write_line(f"absent: {member}: {reason}")
    if config.deferred:
        terminalreporter.write_line(f"left to the next run: {len(config.deferred)} members")


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["absent"] = config.absent
    output_json["facts"] = facts_of(config.getoption("--device"))


def _keep(
    config: pytest.Config,
    group: str,
    *,
    measurement: report.Measurement | None = None,
    absent: dict[str, str] | None = None,
) -> None:
    """Write down what is known of a member, at once: whatever ends the run, it is not lost."""
    if (folder := config.getoption("--keep")) is not None:
        run = {
            "facts": facts_of(config.getoption("--device")),
            "date": f"{datetime.date.today()}",
            "absent": {group: absent} if absent else {},
            "measurements": [measurement] if measurement else [],
        }
        report.keep({report.operation_of(group): run}, folder)


def _end_if_broken(device: str) -> None:
    """After some errors a GPU does nothing more for this process, but for the next one."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the GPU is lost to this process: {error}", returncode=MORE_TO_DO)


def _clocks(trial: measure.Trial, seconds: float) -> dict[str, str]:
    """Of a GPU's cores and memory in MHz, and its power in W, while it works."""
    for _ in range(math.ceil(WORKING_SECONDS / max(seconds, SHORTEST_STEP))):
        trial.reset()
        trial.step()
    read = nvidia_smi("clocks.sm,clocks.mem,power.draw")
    torch.cuda.synchronize()
    return dict(zip(("cores", "memory", "watts"), read, strict=False))


@pytest.fixture
def measured(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Check a member against the reference, then measure its memory and its time.

    A member that disagrees is measured all the same and marked as wrong: the report says so. One
    that fails is absent, with what it said; if it is kdfast, that is a failure here too.
    """
    config = request.config
    ours = request.node.callspec.params["member"].name.startswith("kdfast")
    quick, device = config.getoption("--quick"), config.getoption("--device")
    warmup_seconds, most_rounds = WARMUP_SECONDS[device], MAX_ROUNDS
    if quick:
        warmup_seconds, most_rounds = 0.0, MIN_ROUNDS

    def measurement(group: str, member: str, trial: measure.Trial) -> dict | None:
        trial.reset()
        trial.step()
        errors = trial.errors()
        trial.reset()
        peak_bytes = measure.peak_bytes(trial.step)
        seconds_of = measure.timed(trial.step, device)
        seconds, start = [], time.perf_counter()
        while len(seconds) < WARMUP_ROUNDS or time.perf_counter() - start < warmup_seconds:
            trial.reset()
            seconds.append(seconds_of())
        rounds = min(most_rounds, max(MIN_ROUNDS, int(SECONDS / min(seconds))))
        seconds.clear()
        parts = {name: (measure.timed(step, device), []) for name, step in trial.parts.items()}

        def take_turns() -> None:
            for seconds_of_part, found in parts.values():
                trial.reset()
                found.append(seconds_of_part())
            trial.reset()

        benchmark.group, benchmark.name = group, member
        benchmark.pedantic(lambda: seconds.append(seconds_of()), setup=take_turns, rounds=rounds)
        if benchmark.disabled:
            return None
        stats = benchmark.stats.stats
        # On a GPU the device's own seconds, and not those that the host waited.
        stats.data[:] = seconds[:rounds]
        benchmark.extra_info |= {
            "member": member,
            "ours": ours,
            **trial.about,
            "wrong": trial.wrong(errors),
            "errors": dict(errors),
            "bytes_moved": trial.bytes_moved,
            "peak_bytes": peak_bytes,
            "gradient_bytes": trial.gradient_bytes,
            "operations": trial.operations,
            "copy_bytes_per_second": trial.copy_rate,
            "product_operations_per_second": trial.product_rate,
            "limit_seconds": trial.limit_seconds,
            "part_seconds": {name: statistics.median(found) for name, (_, found) in parts.items()},
            "bytes_per_second": trial.bytes_moved / stats.median,
            "share_of_copy": trial.bytes_moved / stats.median / trial.copy_rate,
        }
        if device == "cuda":
            benchmark.extra_info["clocks"] = _clocks(trial, stats.median)
        trial.reset()
        return report.measurement(group, benchmark.extra_info, stats.as_dict())

    def measured(group: str, member: str, build: Callable[[], measure.Trial]) -> None:
        reason = None
        try:
            _keep(config, group, measurement=measurement(group, member, build()))
        except peers.Absent as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:
            # Whatever other people's code raises on a device or with versions that it never saw.
            failure = report.OWN_FAILURE if ours else "fails: "
            reason = f"{failure}{type(error).__name__}: {error}"
            if ours:
                raise
        finally:
            if reason is not None:
                reason = reason.partition("\n")[0]
                config.absent.setdefault(group, {})[member] = reason
                _keep(config, group, absent={member: reason})
                _end_if_broken(device)
        # Not while an error is handled: it holds what the step had made.
        if reason is not None:
            pytest.skip(reason)

    return measured
