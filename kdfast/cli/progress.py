"""What a training says of itself while it runs: bars on a terminal, and lines everywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging


def on_terminal() -> bool:
    """Whether somebody watches: neither of the outputs is a file or a pipe."""
    return sys.stdout.isatty() and sys.stderr.isatty()


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """For models that are loaded in every step."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Lines(TrainerCallback):
    """One line for each entry of the log: `general, step 20 of 600, epoch 0.1: loss 3.112`.

    Args:
        name: of what trains; empty of a run that is alone.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        values = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in (logs or {}).items()
            if name not in ("epoch", "total_flos") and not name.endswith("_per_second")
        ]
        if not (values and state.is_world_process_zero):
            return
        name = f"{self.name}, " if self.name else ""
        epoch = f", epoch {state.epoch:.3g}" if state.epoch else ""
        # At once: what is piped is read while it trains, and after it was killed.
        place = f"{name}step {state.global_step} of {state.max_steps}{epoch}"
        print(f"{place}: {', '.join(values)}", flush=True)


def print_lines(trainer: Trainer, name: str = "") -> None:
    """Where a trainer has no bars, lines in the place of its dictionaries."""
    if trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(Lines(name))
