"""Every failure that a user can put right is one line on stderr."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from logging import CRITICAL


class CommandError(Exception):
    """What the user has to put right: one line on stderr, exit status 2."""


@contextlib.contextmanager
def reporting(what: str = "") -> Iterator[None]:
    """Any error inside becomes one line: other people's files fail in too many ways to list."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise CommandError(f"{what}: {reason}" if what else reason) from error
    finally:
        logging.set_verbosity(verbosity)


def reason_of(error: Exception) -> str:
    """What it says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def need(what: str, *packages: str, extra: str = "trainer") -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{what} needs {package}: pip install 'kdfast[{extra}]'")


def silence_libraries() -> None:
    # Loading bars that nobody watches are noise, and would stand beside an error's one line.
    import datasets

    from kdfast.cli.progress import on_terminal

    if not on_terminal():
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    # What it has to say of a file that is damaged comes with its error.
    datasets.utils.logging.set_verbosity(CRITICAL)
