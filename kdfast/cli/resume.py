"""What stands in a run's output when it begins, and whether the run may go on there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kdfast import files
from kdfast.cli import config
from kdfast.cli.errors import CommandError
from kdfast.trainer.checkpoints import UNFINISHED, last_checkpoint

# Written last: a run that has this needs nothing done again.
RESULTS = "results.json"

# What a checkpoint was made with, and goes on with. How long training lasts, and how fast it
# learns, may change.
LASTING = (
    "objective",
    "teacher",
    "teacher_cache",
    "teacher_weights",
    "student",
    "initialise",
    "vectors",
    "dataset",
    "eval_dataset",
    "task",
    "text_column",
    "text_pair_column",
    "label_column",
    "block_size",
    "mlm_probability",
    "eval_fraction",
    "seed",
    "optimizer",
)

# What makes no other student.
PASSING = ("output", "versions", "offload")


class Before:
    """The output as it is before anything is written, the same on every process.

    Args:
        output: of a run.
        resume: whether to go on in it.
        stage: whether the run is one of several: such a one may not have begun, or been killed
            before its first checkpoint.

    Attributes:
        checkpoint: the last, if there is one.
    """

    def __init__(self, output: Path, *, resume: bool, stage: bool) -> None:
        if os.path.exists(output) and not output.is_dir():
            raise CommandError(f"--output {output} is not a directory")
        _check_writable(output)
        self._output = output
        made = output / config.FILE
        left = [path for path in output.glob("*") if not _is_unfinished(path)]
        if left and not resume:
            advice = "--resume to go on from its last checkpoint, or " if made.exists() else ""
            raise CommandError(f"--output {output} is not empty: pass {advice}another directory")
        if left and not made.exists():
            raise CommandError(
                f"--resume: {output} is not empty and holds no {config.FILE}: no run began there"
            )
        if resume and not left and not stage:
            raise CommandError(f"--resume: there is no checkpoint in {output}")
        self.checkpoint = last_checkpoint(output)
        self._settings = config.read(made) if made.exists() else None
        self._has_results = (output / RESULTS).is_file()

    def check_goes_on(self, settings: Mapping[str, object]) -> None:
        """That nothing is different but what may be."""
        if self._settings is None:
            return
        different = [
            name for name in LASTING if not _same(self._settings.get(name), settings.get(name))
        ]
        if different:
            raise CommandError(
                f"--resume: {self._output} was made with another {', '.join(different)}: pass "
                "another directory, or remove it"
            )

    def is_finished(self, settings: Mapping[str, object]) -> bool:
        """Whether these very settings have been run to their end."""
        if not self._has_results or self._settings is None:
            return False
        names = (self._settings.keys() | settings.keys()) - {*PASSING}
        return all(_same(self._settings.get(name), settings.get(name)) for name in names)


def _check_writable(output: Path) -> None:
    """Tried where the output will be, with a folder that is gone at once."""
    existing = next(path for path in (output, *output.parents) if os.path.exists(path))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=UNFINISHED, dir=existing))
    except OSError as error:
        raise CommandError(
            f"--output {output} cannot be made in {existing}: {error.strerror}"
        ) from error


def _is_unfinished(path: Path) -> bool:
    """What a run that was killed was about to write."""
    return path.name.startswith(UNFINISHED) or path.name.endswith(files.TEMPORARY)


def _same(one: object, other: object) -> bool:
    """Whether two settings are equal, or the same paths."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_same, one, other))
    if isinstance(one, str) and isinstance(other, str):
        return one == other or os.path.abspath(one) == os.path.abspath(other)
    return one == other
