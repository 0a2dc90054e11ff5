"""What a student is to be: a path, a configuration that a file spells out, or the recipe's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kdfast.cli.errors import CommandError, reporting
from kdfast.cli.inputs import load_config
from kdfast.trainer import BiLSTMConfig

# What a student has from its teacher, where nothing says what it is to have.
FROM_TEACHER = (
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

# Settings of every configuration that a default one does not have.
MORE_SETTINGS = ("attn_implementation",)


def student_config(
    chosen: Path | Mapping[str, object] | None,
    prescribed: PreTrainedConfig | None,
    teacher: PreTrainedConfig | None,
    vocab_size: int,
    *,
    pairs: bool,
    vectors: bool,
) -> PreTrainedConfig:
    """The config of a student, which reads what its teacher reads.

    Args:
        chosen: the user's.
        prescribed: the recipe's, which counts where there is no other.
        teacher: None of a teacher cache.
        vocab_size: the tokens there are, where there is no teacher.
        pairs: whether texts come in pairs.
        vectors: whether there are pretrained embeddings, for a BiLSTM's second channel.
    """
    if isinstance(chosen, Path):
        return load_config("student", chosen)
    if chosen is None:
        settings = prescribed.to_dict()
        # A recipe knows its student's size, and neither the tokens nor the task.
        for name in FROM_TEACHER:
            settings.pop(name, None)
        default = type(prescribed)()
        if isinstance(prescribed, BiLSTMConfig):
            settings["pairs"] = pairs
            if not vectors:
                settings["embeddings"] = "trained"
    else:
        settings, default = dict(chosen), _default(chosen)
    known = {name: getattr(teacher, name, None) for name in FROM_TEACHER}
    if teacher is None:
        known["vocab_size"] = vocab_size
    for name, value in known.items():
        names = {name, default.attribute_map.get(name)}
        if value is not None and hasattr(default, name) and names.isdisjoint(settings):
            settings[name] = value
    with reporting("student"):
        return type(default).from_dict(settings)


def _default(settings: Mapping[str, object]) -> PreTrainedConfig:
    """A default config of the kind that a file spells out, of which it names nothing else."""
    kind = settings.get("model_type")
    if kind is None:
        raise CommandError("student must have a model_type, as in a config.json")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING.keys(), 1)
        advice = f": did you mean {near[0]}?" if near else ""
        raise CommandError(f"student: there is no model_type {kind!r}{advice}")
    with reporting("student"):
        default = AutoConfig.for_model(kind)
    for name in settings:
        if name not in MORE_SETTINGS and not hasattr(default, str(name)):
            near = difflib.get_close_matches(str(name), default.to_dict(), 1)
            advice = f": did you mean {near[0]}?" if near else ""
            raise CommandError(f"student: a {kind} has no setting {name!r}{advice}")
    return default
