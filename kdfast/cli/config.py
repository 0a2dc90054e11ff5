"""Configuration files: the flags of `kdfast distill` by name, and what flags cannot say.

    recipe: hinton
    temperature: 4.0
    teacher: models/teacher
    student: models/student.json
    dataset: [corpus.txt]
    output: runs/hinton
    training: {warmup_steps: 100, weight_decay: 0.01}

A key is a flag with underscores for its dashes, and goes through the flag's own checks. Mappings
and lists of mappings are for files alone, or for `--set`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import yaml

from kdfast.cli.errors import CommandError

# What a file may hold besides flags: settings of the recipe, an objective in a recipe's place,
# arguments of transformers.TrainingArguments, one of torch's optimisers, runs behind each other,
# and what a resolved file says of its origin.
SECTIONS = ("settings", "objective", "training", "optimizer", "stages", "versions")

# Next to a student, the configuration that made it.
FILE = "kdfast.yaml"

# What a setting puts in the place of others that stand behind it: a file behind the command line,
# and what a file says for all behind what it says for a stage.
RIVALS = {
    "recipe": ("objective",),
    "objective": ("recipe",),
    "teacher": ("teacher_cache", "teacher_weights"),
    "teacher_cache": ("teacher", "teacher_weights", "offload"),
    "fp16": ("bf16",),
    "bf16": ("fp16",),
}


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number; YAML 1.1 wants a point in it, and takes it for text.

    A key that is given twice is an error, as YAML has it.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


def stages_of(
    given: argparse.Namespace, flags: argparse.ArgumentParser
) -> list[argparse.Namespace]:
    """The runs that a command line asks for, each with all flags and sections as attributes.

    Args:
        given: what stood on the command line; it wins over the file.
        flags: the parser of the flags alone, all of which default to None.
    """
    config = {} if given.config is None else read(given.config)
    stages = config.pop("stages", None)
    if stages is None:
        return [_merged(config, given, flags)]
    if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages) or not stages:
        raise CommandError(f"{given.config}: stages must be a list of mappings")
    return _chained(config, stages, given, flags)


def _chained(
    config: dict, stages: list[dict], given: argparse.Namespace, flags: argparse.ArgumentParser
) -> list[argparse.Namespace]:
    """Each stage in a folder of its own, and its student where the next one begins."""
    runs: list[argparse.Namespace] = []
    for number, stage in enumerate(stages, 1):
        name = str(stage.pop("name", None) or stage.get("recipe") or f"stage-{number}")
        where = f"{given.config}: stage {name}: "
        if name in (run.name for run in runs):
            raise CommandError(f"{given.config}: two stages are called {name!r}: give them names")
        if name in (".", "..") or set(name) & {"/", "\\"}:
            raise CommandError(f"{where}its name is that of its folder, and must be no path")
        if "stages" in stage:
            raise CommandError(f"{where}a stage has no stages of its own")
        own_output = stage.pop("output", None)
        own = {
            key: {**_section(config, key, f"{given.config}: "), **_section(stage, key, where)}
            for key in ("settings", "training")
            if key in stage
        }
        base = _without_rivals(config, stage)
        run = _merged({**base, **stage, **own}, given, flags, where)
        if run.output is None:
            raise CommandError("--output is required: where the stages' folders go")
        run.output = Path(own_output) if own_output else run.output / name
        for other in runs:
            if os.path.abspath(other.output) == os.path.abspath(run.output):
                raise CommandError(f"{where}{run.output} is the output of stage {other.name} too")
        if runs and "student" not in stage:
            run.student = runs[-1].output
        run.name = name
        runs.append(run)
    return runs


def _section(config: Mapping, name: str, where: str) -> dict:
    """A mapping in a file; nothing behind its key is an empty one."""
    section = config.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise CommandError(f"{where}{name} must be a mapping")
    return dict(section)


def _without_rivals(config: dict, above: Mapping[str, object]) -> dict:
    """What is left of a configuration under another that wins over it."""
    given = {key for key, value in above.items() if value is not None and value is not False}
    rivals = {rival for key in given for rival in RIVALS.get(key, ())}
    return {key: value for key, value in config.items() if key not in rivals}


def read(path: Path) -> dict:
    """The mapping in a file."""
    if not path.is_file():
        raise CommandError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path} is no YAML: {reason}") from error
    if not isinstance(config, dict):
        raise CommandError(f"{path} must hold a mapping, as in 'recipe: hinton'")
    return config


def _merged(
    config: dict, given: argparse.Namespace, flags: argparse.ArgumentParser, where: str = ""
) -> argparse.Namespace:
    """A file's keys under the command line's flags."""
    where = where or (f"{given.config}: " if given.config else "")
    config = _without_rivals(config, vars(given))
    sections = {name: config.pop(name, None) for name in SECTIONS}
    # A student that is spelt out.
    inline = config.pop("student") if isinstance(config.get("student"), Mapping) else None
    try:
        merged = flags.parse_args(_as_flags(config, flags))
    except CommandError as error:
        raise CommandError(f"{where}{error}") from error
    for name, value in vars(given).items():
        if hasattr(merged, name) and value is not None:
            setattr(merged, name, value)
    if merged.student is None:
        merged.student = inline
    for name in ("settings", "training", "optimizer"):
        setattr(merged, name, _section(sections, name, where))
    merged.objective = sections["objective"]
    for assignment in given.set or ():
        _assign(merged, assignment)
    for name, value in merged.training.items():
        # What YAML makes of `no`.
        if value is False and name.endswith("_strategy"):
            merged.training[name] = "no"
    if merged.recipe and merged.objective:
        raise CommandError(f"{where}recipe and objective exclude each other")
    merged.name = None
    return merged


def _as_flags(config: dict, flags: argparse.ArgumentParser) -> list[str]:
    actions: dict[str, argparse.Action] = {}
    for action in flags._actions:
        # The first: a flag's negation has the same destination.
        actions.setdefault(action.dest, action)
    argv = []
    for key, value in config.items():
        action = actions.get(key)
        if action is None:
            near = difflib.get_close_matches(str(key), [*actions, *SECTIONS], 1)
            advice = f": did you mean {near[0]}?" if near else ""
            raise CommandError(f"there is no setting {key!r}{advice}")
        if value is None:
            continue
        if isinstance(value, Mapping):
            raise CommandError(f"{key} must be a value, got a mapping")
        flag = action.option_strings[0]
        switch = isinstance(action, argparse.BooleanOptionalAction)
        if switch and not isinstance(value, bool):
            raise CommandError(f"{key} must be true or false, got {value!r}")
        if value is False:
            negation = f"--no-{flag.removeprefix('--')}"
            if negation not in flags._option_string_actions:
                raise CommandError(f"{key} must be a value, got {value}")
            argv.append(negation)
        elif value is True or isinstance(value, list):
            argv += [flag, *map(str, value if isinstance(value, list) else ())]
        else:
            # In one word, so that a value may begin with a dash.
            argv.append(f"{flag}={value}")
    return argv


def _assign(merged: argparse.Namespace, assignment: str) -> None:
    """`--set training.warmup_steps=100`"""
    path, equals, text = assignment.partition("=")
    section, dot, name = path.partition(".")
    if not (equals and dot and name) or section not in ("settings", "training"):
        raise CommandError(
            f"--set {assignment}: must be training.NAME=VALUE or settings.NAME=VALUE"
        )
    try:
        getattr(merged, section)[name] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise CommandError(f"--set {assignment}: {text!r} is no YAML") from error


def text_of(settings: Mapping[str, object]) -> str:
    """A configuration as the text of a file."""
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    # Versions of torch are a kind of str that YAML does not know.
    return str(value) if isinstance(value, Path | str) else value
