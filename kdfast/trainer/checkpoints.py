"""Checkpoints and models that are whole or not there."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    SaveStrategy,
    TrainOutput,
)
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from kdfast.files import fsync, fsync_all, rename

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
# In an output directory, what is being written, and with a name behind it, what is being deleted.
# Trainer uploads nothing that begins with an underscore.
UNFINISHED = "_kdfast_unfinished"

# Of a checkpoint, whichever way its model is wrapped.
WEIGHTS = ("model*.safetensors", "*adapter_model.*", "*/adapter_model.*", "*pytorch_model*")
TORCH_FILES = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "pytorch_model*.bin",
    "training_args.bin",
)
MODEL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# What torch.save says when it cannot write, and not why.
TORCH_MESSAGES = ("PytorchStreamWriter", "inline_container", "iostream error")


class CheckpointError(OSError):
    """A checkpoint or a model that cannot be written, or a checkpoint that is not whole."""


class WholeCheckpoints(Trainer):
    """A `Trainer` that can be killed at any moment, with every checkpoint it leaves whole.

    A checkpoint is written under another name, put on the disk, and renamed when nothing of it is
    missing; before it is deleted it loses its name. The files of a model that `save_model` writes
    are treated alike.

    Attributes:
        beside: texts by the names of files, which go into every checkpoint.
    """

    beside: Mapping[str, str] = MappingProxyType({})
    _staging = False

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """`Trainer.train`, from checkpoints that are whole.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last whole one in the output
                directory.

        Raises:
            CheckpointError: there is none, or the one that was named is not whole; a checkpoint
                cannot be written.
        """
        if self.is_local_process_zero():
            # Of a run that was killed.
            for folder in Path(self._get_output_dir(trial)).glob(f"{UNFINISHED}*"):
                _remove(folder)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"there is no whole checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint and (flaw := flaw_of(resume_from_checkpoint)):
            raise CheckpointError(f"{resume_from_checkpoint} is no whole checkpoint: {flaw}")
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _run_epoch(self, *, trial: object, ignore_keys_for_eval: object, **options: object) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, **options)
            return
        # Trainer looks whether to stop after each step. Resumed behind the last one, it would train
        # one more.
        self.control.should_training_stop = True
        step = self.state.global_step
        evaluated = any("eval_loss" in e and e["step"] == step for e in self.state.log_history)
        if self.args.eval_strategy == IntervalStrategy.EPOCH and not evaluated:
            # A checkpoint in the middle of the epoch was written before its evaluation.
            self._evaluate(trial, ignore_keys_for_eval)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """`Trainer.evaluate`, which leaves training its random numbers.

        A data loader draws one when it begins. A training that is resumed from a checkpoint at the
        end of an epoch does not evaluate that epoch again.
        """
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: object) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, UNFINISHED) if self._staging else directory

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        directory = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = Path(directory, UNFINISHED, name), Path(directory, name)
        with self._saving(final, Path(directory)):
            self._staging = True
            try:
                # Deletes no other checkpoints: it sees none.
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            # Every process writes its own random state.
            self.accelerator.wait_for_everyone()
            self._look_for_best(directory, name)
            if self.args.should_save:
                for file, text in self.beside.items():
                    (staged / file).write_text(text, encoding="utf-8")
                self.state.save_to_json(str(staged / STATE))
                fsync_all(staged)
                _discard(final)
                rename(staged, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            self._rotate(directory, final)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _saving(self, path: Path, directory: Path) -> Iterator[None]:
        """A disk that is full: one error that names `path`, and nothing left of what was begun."""
        if self._staging:
            # Part of a checkpoint, whose error it will be.
            yield
            return
        unfinished = directory / UNFINISHED
        try:
            yield
        except Exception as error:
            reason = _why_not_written(error, unfinished)
            if reason is None:
                raise
            last = last_checkpoint(directory) or last_checkpoint(self.args.output_dir)
            rest = (
                f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint"
            )
            raise CheckpointError(f"cannot save {path}: {reason}; {rest}") from error
        finally:
            if self.args.should_save:
                _remove(unfinished)

    def _look_for_best(self, directory: str, name: str) -> None:
        # As Trainer does, which looked into the staging folder.
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        path = os.path.join(directory, best)
        if (
            self.args.save_strategy != SaveStrategy.NO
            and self.state.best_global_step
            and (best == name or os.path.isdir(path))
        ):
            self.state.best_model_checkpoint = path

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload goes on while training does: from where the checkpoint stays.
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _rotate(self, directory: str, newest: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        kept = {newest} if best is None else {newest, Path(best)}
        # Oldest first: the steps of an earlier run in the same directory say nothing.
        checkpoints = sorted(_checkpoints(directory), key=lambda path: path.stat().st_mtime_ns)
        others = [path for path in checkpoints if path not in kept]
        for path in others[: max(0, len(checkpoints) - max(limit, len(kept)))]:
            _discard(path)

    def _finalize_training(self, trial: object, *args: object) -> TrainOutput:
        # What Trainer then does, deleting a checkpoint's name last.
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None:
            for path in _checkpoints(self._get_output_dir(trial)):
                if not path.samefile(best):
                    _discard(path)
        return super()._finalize_training(trial, *args)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._staging or not self.args.should_save:
            super()._save(str(directory), state_dict)
            return
        staged = directory / UNFINISHED / "model"
        with self._saving(directory, directory):
            _remove(staged)
            super()._save(str(staged), state_dict)
            fsync_all(staged)
            _put_in_place(staged, directory)


def last_checkpoint(directory: str | Path) -> str | None:
    """The whole checkpoint of the latest step in an output directory; None if there is none.

    A warning names each later one that is not whole.
    """
    for path in reversed(_checkpoints(directory)):
        flaw = flaw_of(path)
        if flaw is None:
            return str(path)
        logger.warning(f"{path} is no whole checkpoint, and is skipped: {flaw}")
    return None


def flaw_of(checkpoint: str | Path) -> str | None:
    """What keeps a checkpoint from being whole; None if nothing does.

    Trainer writes its state last, and what kdfast writes has its name only when it is whole. What
    others wrote, copied or deleted in part shows in what is there, in the sizes of the files and in
    their tables of contents. No tensor is read.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE} is missing, which is written last"
    except ValueError:
        return f"{STATE} is damaged"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{STATE} is damaged"

    def found(*patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in folder.glob(pattern)]

    for path in found("*.safetensors"):
        try:
            # Compares the size with the tensors' offsets.
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{path.name} is damaged"
    for path in found(*TORCH_FILES):
        # The table of contents stands at the end.
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"{path.name} is damaged"
    for path in found("*.index.json"):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return f"{path.name} is damaged"
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"{missing[0]} is missing, which {path.name} lists"
    # DeepSpeed has weights and optimiser in folders of its own.
    elsewhere = found("global_step*")
    if not found(*WEIGHTS) and not elsewhere:
        return "the model's weights are missing"
    if found("rng_state*", "scheduler.pt") and not found("*optimizer*") and not elsewhere:
        return "the optimiser's state is missing"
    if (folder / "optimizer.pt").exists():
        for pattern in ("scheduler.pt", "rng_state*"):
            if not found(pattern):
                return f"{pattern} is missing"
    return None


def _checkpoints(directory: str | Path) -> list[Path]:
    """By their steps."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {
        path: int(match[1])
        for path in (Path(directory).iterdir() if Path(directory).is_dir() else ())
        if (match := name.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(steps, key=steps.__getitem__)


def _discard(checkpoint: Path) -> None:
    """Delete it, its name first."""
    if not checkpoint.exists():
        return
    # Beside it, where a disk that is full takes a name.
    unnamed = checkpoint.with_name(f"{UNFINISHED}-{checkpoint.name}")
    _remove(unnamed)
    rename(checkpoint, unnamed)
    _remove(unnamed)


def _put_in_place(staged: Path, directory: Path) -> None:
    """A whole model's files to their places, those that make a model of them last.

    Readers find the model that was there or the new one. Where the two could mix, because there
    are several files of weights or another configuration, they find none for a moment.
    """
    names = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    weights = {str(name) for name in names if MODEL_FILE.fullmatch(str(name))}
    before = {path.name for path in directory.iterdir() if MODEL_FILE.fullmatch(path.name)}
    if SAFE_WEIGHTS_INDEX_NAME in weights or not _same(staged, directory, CONFIG_NAME):
        for name in before & {SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME}:
            (directory / name).unlink()
        fsync(directory)
    # The list of shards is the last in the alphabet too.
    for name in sorted(names, key=lambda name: (str(name) in weights, str(name))):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, directory / name)
    for name in before - weights if weights else ():
        (directory / name).unlink(missing_ok=True)
    fsync(directory)


def _same(folder: Path, other: Path, name: str) -> bool:
    """Whether a file is the same in both, or in neither."""
    contents = [
        path.read_bytes() if path.exists() else None for path in (folder / name, other / name)
    ]
    return contents[0] == contents[1]


def _why_not_written(error: Exception, folder: Path) -> str | None:
    """The operating system's reason; None for an error that is not about writing."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors, tokenizers.
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(number[1]))
    if not isinstance(error, RuntimeError) or not any(m in str(error) for m in TORCH_MESSAGES):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe").write_bytes(bytes(2**20))
    except OSError as found:
        return found.strerror
    return str(error).partition("\n")[0]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
