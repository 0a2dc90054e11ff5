"""Checkpoints: killed runs, disks that are full, and folders that are not whole."""

import errno
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from kdfast.trainer import AttentionMSE, DistillationTrainer, HiddenMSE, Objective
from kdfast.trainer.checkpoints import (
    UNFINISHED,
    CheckpointError,
    WholeCheckpoints,
    flaw_of,
    last_checkpoint,
)
from kdfast.trainer.projections import FILE

VOCAB = 41
LENGTH = 10


def bert(width: int, layers: int) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.3,
            # A resumed run has to draw what an uninterrupted one draws.
            hidden_dropout_prob=0.1,
        )
    )


def make_trainer(folder: str | Path, **arguments: object) -> DistillationTrainer:
    """A trainer that differs in nothing but its arguments."""
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(1, VOCAB, (LENGTH,))} for _ in range(16)]
    return DistillationTrainer(
        model=bert(8, 1),
        teacher=bert(16, 2),
        objective=Objective([AttentionMSE(), HiddenMSE()]),
        args=TrainingArguments(
            str(folder),
            **{
                "use_cpu": True,
                "disable_tqdm": True,
                "log_level": "error",
                "report_to": "none",
                "logging_strategy": "no",
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "max_steps": 4,
                "save_steps": 2,
                **arguments,
            },
        ),
        data_collator=default_data_collator,
        train_dataset=rows,
        eval_dataset=rows[:4],
    )


def train_on(folder: str | Path, **arguments: object) -> int:
    """Goes on where there is a checkpoint; the step from which it did."""
    trainer = make_trainer(folder, **arguments)
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=last is not None)
    trainer.save_model()
    return 0 if last is None else int(last.rpartition("-")[2])


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Of every file that training goes on from, by path and name."""

    def flat(name: str, value: object) -> dict[str, object]:
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        else:
            return {name: value}
        return {k: v for key, part in items for k, v in flat(f"{name}.{key}", part).items()}

    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.suffix in (".pt", ".pth"):
            found |= flat(name, torch.load(path, weights_only=False))
    return found


def assert_same(folder: Path, whole: Path) -> None:
    own, other = tensors_in(folder), tensors_in(whole)
    assert own.keys() == other.keys()
    for name, value in other.items():
        same = torch.equal(own[name], value) if isinstance(value, Tensor) else own[name] == value
        assert same if isinstance(same, bool) else same.all(), name


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    # Trainer collects garbage at each start: not among all that was imported.
    gc.freeze()
    yield
    gc.unfreeze()


def assert_whole(folder: str) -> None:
    """Nothing that has a name is without a part, whoever reads it."""
    for path in Path(folder).glob("checkpoint-*"):
        assert flaw_of(path) is None, (path, flaw_of(path))
    for path in Path(folder).glob("*.safetensors"):
        assert load_file(path)


# Interruptions. The script imports once and forks a process per attempt.

KILLER = """
import gc, json, os, random, signal, socket, sys, time
import torch
# A pool of threads would not survive the forks.
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import safetensors.torch, transformers.modeling_utils
import test_checkpoints as cases
from kdfast.trainer import projections

folder = sys.argv[2]
WRITES = os.O_WRONLY | os.O_RDWR
# Trainer collects garbage: not among all that was imported, in every process.
gc.freeze()


def stop(at, output, changes=("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")):
    # Before whatever changes the output directory, or in the middle of it.
    seen = 0

    def event():
        nonlocal seen
        seen += 1
        return seen - 1 == at

    def watch(name, arguments):
        if name not in changes or name == "open" and not arguments[2] & WRITES:
            return
        if output in os.path.abspath(str(arguments[0])) and event():
            os.kill(os.getpid(), signal.SIGKILL)

    def halved(save):
        def call(thing, path, *arguments, **options):
            save(thing, path, *arguments, **options)
            if output in os.path.abspath(path) and event():
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        return call

    sys.addaudithook(watch)
    torch.save = halved(torch.save)
    save_file = halved(safetensors.torch.save_file)
    transformers.modeling_utils.safe_save_file = save_file
    projections.save_file = save_file


def started(output, stop_at=None, environment=None, **arguments):
    child = os.fork()
    if child == 0:
        try:
            os.environ.update(environment or {})
            if stop_at is not None:
                # Who makes a folder is chance where there are two processes.
                stop(stop_at, output, *([("os.rename",)] if environment else []))
            step = cases.train_on(output, **arguments)
            if environment:
                torch.distributed.destroy_process_group()
            os._exit(step)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(99)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(output, **options):
    # The step from which it went on, or a signal's negative number.
    status = ended(started(output, **options))
    cases.assert_whole(output)
    return status


# At every step of a run with two checkpoints, of which one stays, and a model at the end.
options = dict(save_total_limit=1)
assert forked(f"{folder}/steps/whole", **options) == 0
steps = []


def attempt():
    return forked(f"{folder}/steps/{len(steps)}", stop_at=len(steps), **options)


while (status := attempt()) < 0:
    steps.append([status, forked(f"{folder}/steps/{len(steps)}", **options)])
assert status == 0

# At random moments, again and again until it gets through.
options = dict(max_steps=12, save_steps=1, save_total_limit=2)
start = time.perf_counter()
assert forked(f"{folder}/moments/whole", **options) == 0
duration = time.perf_counter() - start
chance, moments, runs = random.Random(0), [], 0
while len(moments) < 8:
    status = -signal.SIGKILL
    while status < 0:
        child = started(f"{folder}/moments/{runs}", **options)
        time.sleep(chance.uniform(0, duration * 0.6))
        os.kill(child, signal.SIGKILL)
        status = ended(child)
        cases.assert_whole(f"{folder}/moments/{runs}")
        moments += [status] if status < 0 else []
    runs += 1


# One of two processes, and then the other, as a launcher does: at the renaming of the first and of
# the second checkpoint, before the first is deleted, and in the middle of the random states.
def pair(output, rank=0, stop_at=None):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = [
        started(
            output,
            stop_at=stop_at if own == rank else None,
            environment={**common, "RANK": str(own), "LOCAL_RANK": str(own)},
            save_total_limit=1,
        )
        for own in range(2)
    ]
    if stop_at is None:
        return [ended(child) for child in children]
    status = ended(children[rank])
    # The other one gets as far as it can.
    for _ in range(50):
        if os.waitpid(children[1 - rank], os.WNOHANG)[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(children[1 - rank], signal.SIGKILL)
        ended(children[1 - rank])
    cases.assert_whole(output)
    return status


assert pair(f"{folder}/pairs/whole") == [0, 0]
pairs = []
for number, (rank, stop_at) in enumerate([(0, 7), (0, 15), (0, 16), (1, 0), (1, 1)]):
    output = f"{folder}/pairs/{number}"
    pairs.append([pair(output, rank, stop_at), pair(output)])
print(json.dumps([steps, moments, pairs]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list, list, list]:
    folder = tmp_path_factory.mktemp("killed")
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder, *json.loads(result.stdout.splitlines()[-1])


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_ended_alike(folder: Path) -> None:
    """Every run is as the one that was not interrupted."""
    whole = folder / "whole"
    runs = [run for run in folder.iterdir() if run != whole]
    assert runs
    for run in runs:
        for older in run.glob("checkpoint-*"):
            # One that was to be deleted when the process was killed, after its last checkpoint.
            if not (whole / older.name).exists():
                assert flaw_of(older) is None
                shutil.rmtree(older)
        assert names_in(run) == names_in(whole)
        assert_same(run, whole)


def test_killed_at_any_step_a_run_ends_with_the_same_bits(killed):
    folder, steps, _, _ = killed
    # Two checkpoints of nine files, one of which is deleted, and a model.
    assert len(steps) >= 45
    assert {status for status, _ in steps} == {-signal.SIGKILL}
    # From where it went on.
    resumed = [step for _, step in steps]
    assert resumed == sorted(resumed)
    assert set(resumed) == {0, 2, 4}
    assert_ended_alike(folder / "steps")


def test_killed_at_random_again_and_again_a_run_ends_with_the_same_bits(killed):
    folder, _, moments, _ = killed
    assert len(moments) >= 8
    assert {*moments} == {-signal.SIGKILL}
    assert_ended_alike(folder / "moments")


def test_two_processes_of_which_one_is_killed_end_with_the_same_bits(killed):
    folder, _, _, pairs = killed
    assert {status for status, _ in pairs} == {-signal.SIGKILL}
    assert [resumed for _, resumed in pairs] == [[0, 0], [2, 2], [4, 4], [0, 0], [2, 2]]
    random_states = {f"checkpoint-4/rng_state_{rank}.pth" for rank in range(2)}
    assert random_states < names_in(folder / "pairs" / "whole")
    assert_ended_alike(folder / "pairs")


def plain(folder: Path, cls: type[Trainer], **arguments: object) -> Trainer:
    """A student that is trained without a teacher."""
    torch.manual_seed(0)
    tokens = torch.randint(1, VOCAB, (16, LENGTH))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = {"learning_rate": 1e-2, "save_steps": 1, "max_steps": 4, **arguments}
    return cls(
        bert(8, 1),
        TrainingArguments(
            str(folder),
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
            report_to="none",
            logging_strategy="no",
            per_device_train_batch_size=4,
            **arguments,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
    )


class Theirs(Trainer):
    """A `Trainer` whose evaluations leave training its random numbers."""

    def evaluate(self, *args: object, **options: object) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **options)


BEST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"save_only_model": True},
        {"save_total_limit": 1},
        {"save_total_limit": 2},
        # The loss falls: the best one is the first, or each one when it is saved.
        {**BEST, "greater_is_better": True, "save_total_limit": 1},
        {**BEST, "greater_is_better": True, "save_total_limit": 2},
        {**BEST, "greater_is_better": False, "save_total_limit": 2},
        {**BEST, "greater_is_better": True, "save_steps": 2, "load_best_model_at_end": True},
        {**BEST, "greater_is_better": True, "save_strategy": "best"},
    ],
    ids=str,
)
def test_what_is_kept_is_what_transformers_keeps(tmp_path, arguments):
    states = []
    for cls in (Theirs, WholeCheckpoints):
        trainer = plain(tmp_path / cls.__name__, cls, **arguments)
        trainer.train()
        states.append(
            [
                {
                    "best": (state := json.loads(path.read_text()))["best_model_checkpoint"],
                    "step": state["global_step"],
                    "callbacks": state["stateful_callbacks"],
                }
                for path in sorted((tmp_path / cls.__name__).glob("*/trainer_state.json"))
            ]
        )
        for state in [*states[-1], {"best": trainer.state.best_model_checkpoint}]:
            assert state["best"] is None or Path(state["best"]).parent == tmp_path / cls.__name__
    theirs, ours = tmp_path / "Theirs", tmp_path / "WholeCheckpoints"
    assert names_in(ours) == names_in(theirs)
    assert_same(ours, theirs)
    for state in states[0]:
        state["best"] = state["best"] and state["best"].replace(str(theirs), str(ours))
    assert states[1] == states[0]


def test_the_best_model_comes_with_its_projections(tmp_path, monkeypatch):
    rmtree, deleted = shutil.rmtree, []

    def watched(folder: str | Path, **options: object) -> None:
        deleted.append(Path(folder).name)
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    trainer = make_trainer(
        tmp_path,
        **{**BEST, "eval_steps": 2},
        greater_is_better=True,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.save_model()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    # Trainer deletes the last one where one is to stay.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    # What is being deleted has no name that a reader would look for.
    assert f"{UNFINISHED}-checkpoint-4" in deleted
    assert not any(name.startswith("checkpoint-") for name in deleted)
    for name in ("model.safetensors", FILE):
        assert (tmp_path / name).read_bytes() == (best / name).read_bytes()


def test_what_stood_in_a_checkpoints_place_is_replaced(tmp_path):
    for name in ("checkpoint-2", UNFINISHED, f"{UNFINISHED}-checkpoint-1", "_other", "checkpoint"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    make_trainer(tmp_path).train()
    assert flaw_of(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "checkpoint-2" / "old").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-2", "checkpoint-4", "_other", "checkpoint"}


def test_pushed_is_the_checkpoint_in_its_place(tmp_path, monkeypatch):
    pushed = []

    def push(trainer: Trainer, checkpoint_folder: str) -> None:
        assert flaw_of(checkpoint_folder) is None
        pushed.append(checkpoint_folder)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = plain(tmp_path, WholeCheckpoints, save_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [str(tmp_path / f"checkpoint-{step}") for step in (2, 4)]


# Disks that are full: no file may become longer, which the system says with another number.


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Between the sizes of the files, in the order in which they are written.
TOO_LONG = {"config.json": 256, "model.safetensors": 4096, "optimizer.pt": 15000}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_disk_that_is_full_is_one_line(tmp_path, name, monkeypatch):
    make_trainer(tmp_path, max_steps=2).train()
    kept = tmp_path / "checkpoint-2"
    sizes = [(kept / name).stat().st_size for name in TOO_LONG]
    assert all(limit < size for limit, size in zip(TOO_LONG.values(), sizes, strict=True))
    assert all(size < limit for size, limit in zip(sizes[:2], [4096, 15000], strict=True))

    before = files_in(tmp_path)
    trainer = make_trainer(tmp_path)
    with pytest.raises(CheckpointError) as caught, no_file_above(TOO_LONG[name]):
        trainer.train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert message.startswith(f"cannot save {tmp_path / 'checkpoint-4'}: ")
    assert message.endswith(f"; the last whole checkpoint is {kept}")
    assert "\n" not in message
    assert UNFINISHED not in message
    if name != "optimizer.pt":
        # What torch.save says is another thing.
        assert "File too large" in message
    assert files_in(tmp_path) == before

    with (
        pytest.raises(CheckpointError, match=r"cannot save .*: File too large"),
        no_file_above(256),
    ):
        trainer.save_model()
    assert files_in(tmp_path) == before
    trainer = make_trainer(tmp_path / "new", save_steps=1)
    with pytest.raises(CheckpointError, match="is no whole checkpoint"), no_file_above(256):
        trainer.train()
    assert not any((tmp_path / "new").iterdir())


def test_where_torch_does_not_say_why_the_disk_is_asked(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    message = f"{tmp_path / 'checkpoint-2'}: No space left on device; there is no whole checkpoint"
    with pytest.raises(CheckpointError, match=re.escape(message)), no_file_above(15000):
        trainer.train()
    assert not any(tmp_path.iterdir())


def test_an_error_that_is_none_of_writing_stays_itself(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        make_trainer(tmp_path).train()
    assert not any(tmp_path.iterdir())


# Folders that others left.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Of transformers' own Trainer, which writes them in their places."""
    folder = tmp_path_factory.mktemp("foreign")
    plain(folder, Trainer, save_steps=2).train()
    return folder


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def in_shards(path: Path) -> None:
    folder = path.parent
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    path.unlink()
    next(folder.glob("model-00002-*")).unlink()


DAMAGES = [
    (Path.unlink, "trainer_state.json", "trainer_state.json is missing, which is written last"),
    (halve, "trainer_state.json", "trainer_state.json is damaged"),
    (halve, "model.safetensors", "model.safetensors is damaged"),
    (Path.unlink, "model.safetensors", "the model's weights are missing"),
    (in_shards, "model.safetensors", "is missing, which model.safetensors.index.json lists"),
    (halve, "optimizer.pt", "optimizer.pt is damaged"),
    (Path.unlink, "optimizer.pt", "the optimiser's state is missing"),
    (halve, "scheduler.pt", "scheduler.pt is damaged"),
    (Path.unlink, "scheduler.pt", "scheduler.pt is missing"),
    (halve, "rng_state.pth", "rng_state.pth is damaged"),
    (Path.unlink, "rng_state.pth", "rng_state* is missing"),
    (halve, "training_args.bin", "training_args.bin is damaged"),
]


@pytest.mark.parametrize(
    ("damage", "name", "flaw"), DAMAGES, ids=[f"{d.__name__}-{name}" for d, name, _ in DAMAGES]
)
def test_what_is_not_whole_is_not_resumed_from(
    checkpoints, tmp_path, damage, name, flaw, monkeypatch
):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    first, second = (tmp_path / f"checkpoint-{step}" for step in (2, 4))
    assert flaw_of(first) is None
    assert last_checkpoint(tmp_path) == str(second)
    damage(second / name)
    assert flaw_of(second).endswith(flaw)

    warnings = []
    monkeypatch.setattr("kdfast.trainer.checkpoints.logger.warning", warnings.append)
    trainer = plain(tmp_path, WholeCheckpoints)
    with pytest.raises(CheckpointError, match=re.escape(f"{second} is no whole checkpoint: ")):
        trainer.train(resume_from_checkpoint=second)
    assert not warnings
    trainer.train(resume_from_checkpoint=True)
    assert len(warnings) == 1
    assert str(second) in warnings[0]
    assert flaw in warnings[0]
    # Replaced on the way.
    assert flaw_of(second) is None


@pytest.mark.parametrize("existing", [(), ("checkpoint-3",)])
def test_nothing_to_resume_from(tmp_path, existing):
    for name in existing:
        (tmp_path / name).mkdir()
    trainer = plain(tmp_path / "out" if not existing else tmp_path, WholeCheckpoints)
    with pytest.raises(CheckpointError, match="there is no whole checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="nowhere is no whole checkpoint: there is no such f"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_checkpoint_of_weights_alone_is_whole(tmp_path):
    trainer = plain(tmp_path, WholeCheckpoints, save_only_model=True, save_steps=2)
    trainer.train()
    assert flaw_of(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    trainer = plain(tmp_path, WholeCheckpoints)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


# The model in the output directory.


class Stop(Exception):
    pass


@pytest.mark.parametrize("before", ["one file", "shards", "another model"])
@pytest.mark.parametrize("after", ["one file", "shards"])
def test_readers_find_the_model_before_or_the_new_one(tmp_path, monkeypatch, before, after):
    sizes = {"one file": "1GB", "another model": "1GB", "shards": "3KB"}
    trainer = plain(tmp_path, WholeCheckpoints)
    old = bert(16 if before == "another model" else 8, 1)
    with torch.no_grad():
        # Sharded alike, with other values.
        old.bert.embeddings.word_embeddings.weight.add_(1)
    student = trainer.model
    old.config.use_cache = student.config.use_cache
    student.save_pretrained = partial(student.save_pretrained, max_shard_size=sizes[after])
    replace = os.replace

    def stop(*_: object) -> None:
        raise Stop

    def found() -> str | None:
        try:
            model = BertForMaskedLM.from_pretrained(tmp_path)
        except OSError:
            return None
        for name, of in (("old", old), ("new", student)):
            states = model.state_dict(), of.state_dict()
            if all(torch.equal(states[0][key], value) for key, value in states[1].items()):
                return name
        raise AssertionError("a mixture of two models")

    seen, stop_at = [], 0
    while "new" not in seen:
        shutil.rmtree(tmp_path)
        old.save_pretrained(tmp_path, max_shard_size=sizes[before])
        calls = [replace] * stop_at + [stop]
        with monkeypatch.context() as patch, suppress(Stop):
            patch.setattr(os, "replace", lambda *paths, calls=calls: calls.pop(0)(*paths))
            trainer.save_model()
        seen.append(found())
        stop_at += 1
    assert stop_at > 3
    # Where the files of two models could mix, there is none in between.
    if before == "one file" and after == "one file":
        assert None not in seen
    weights = sorted(path.name for path in tmp_path.glob("model*"))
    if after == "one file":
        assert weights == ["model.safetensors"]
    else:
        assert weights[-1] == "model.safetensors.index.json"
        assert len(weights) > 2
        assert "model.safetensors" not in weights
