"""The command `kdfast`: `kdfast distill`, `kdfast env`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

import kdfast
from kdfast.ops import registry

# transformers is imported by the commands that need it: `kdfast env` works without it.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import (
        DataCollator,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainingArguments,
    )

    from kdfast.trainer import Recipe

TASKS = ("causal-lm", "masked-lm")
MAX_DEFAULT_BLOCK = 512

# What a saved tokenizer consists of, by the names that its kinds give it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


# A parser's or a group's add_argument.
_AddArgument = Callable[..., argparse.Action]


class CommandError(Exception):
    """What the user has to put right: one line on stderr, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes the process's.

    Returns:
        The exit status: 0, or 2 for a `CommandError`, whose line went to stderr.

    Example:
        >>> kdfast.cli.main(["env"])
    """
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except CommandError as error:
        print(f"kdfast: error: {error}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _number(
    kind: type, low: float, high: float = float("inf"), *, open_low: bool = False
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if (
            number is None
            or not (low < number if open_low else low <= number)
            or not number <= high
        ):
            bounds = f"{'above' if open_low else 'at least'} {low}"
            bounds += "" if high == float("inf") else f" and at most {high}"
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, got {text!r}")
        return number

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kdfast", description="Knowledge distillation with fused losses.")
    parser.add_argument("--version", action="version", version=f"kdfast {kdfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    env = commands.add_parser("env", help="which backends and versions this installation has")
    env.set_defaults(run=_env)

    distill = commands.add_parser(
        "distill",
        help="train a small language model towards a large one",
        description="Train a student language model, causal or masked, towards a teacher's.",
    )
    distill.set_defaults(run=_distill)
    _add_distill_arguments(distill)
    return parser


def _add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    _add_required(parser.add_argument)
    _add_data_options(parser.add_argument_group("data").add_argument)
    _add_objective_options(parser.add_argument_group("objective").add_argument)
    _add_training_options(parser.add_argument_group("training"))


def _add_required(add: _AddArgument) -> None:
    def required(name: str, metavar: str, text: str, **options: object) -> None:
        add(name, required=True, metavar=metavar, help=text, **options)

    required("--recipe", "NAME", "what to train towards: hinton")
    required("--teacher", "PATH", "a checkpoint with its tokenizer", type=Path)
    required(
        "--student",
        "PATH|CONFIG",
        "a checkpoint, or a config (file or directory) for a fresh student",
        type=Path,
    )
    required(
        "--dataset",
        "FILE",
        ".txt (a blank line ends a document), or .json, .jsonl, .csv, .parquet (one per row)",
        type=Path,
        nargs="+",
    )
    required("--output", "DIR", "where checkpoints and the student go", type=Path)


def _add_data_options(add: _AddArgument) -> None:
    add(
        "--text-column",
        default="text",
        metavar="NAME",
        help="the column with the text (default: text)",
    )
    add("--task", choices=TASKS, help="default: what the teacher is")
    add(
        "--block-size",
        type=_number(int, 2),
        metavar="N",
        help=f"tokens per sequence (default: what both models take, at most {MAX_DEFAULT_BLOCK})",
    )
    add(
        "--mlm-probability",
        type=_number(float, 0, 1, open_low=True),
        default=0.15,
        metavar="P",
        help="share of tokens to mask for masked-lm (default: 0.15)",
    )
    add(
        "--eval-fraction",
        type=_number(float, 0, 0.9),
        default=0.05,
        metavar="F",
        help="share of documents held out and evaluated after every epoch (default: 0.05)",
    )


def _add_objective_options(add: _AddArgument) -> None:
    add("--temperature", type=float, default=2.0, metavar="T", help="default: 2.0")
    add(
        "--alpha", type=float, default=0.5, metavar="A", help="the soft term's share (default: 0.5)"
    )


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    count, positive = _number(int, 1), _number(float, 0, open_low=True)
    add("--epochs", type=positive, metavar="N", help="default: 3")
    add("--max-steps", type=count, metavar="N", help="stop after N steps instead of --epochs")
    add("--batch-size", type=count, metavar="N", help="sequences per device (default: 8)")
    add("--gradient-accumulation", type=count, metavar="N", help="batches per step (default: 1)")
    add(
        "--learning-rate",
        type=positive,
        metavar="LR",
        help="decays linearly to 0 (default: 1e-4)",
    )
    add("--seed", type=_number(int, 0), default=42, metavar="N", help="default: 42")
    add("--logging-steps", type=count, metavar="N", help="default: 10")
    add("--save-steps", type=count, metavar="N", help="steps between checkpoints (default: 500)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--device", choices=("cpu", "cuda"), help="default: the fastest there is")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="train in mixed bfloat16 precision")
    precision.add_argument("--fp16", action="store_true", help="train in mixed float16 precision")


def _env(arguments: argparse.Namespace) -> None:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"
    else:
        device = f"cpu ({platform.machine()})"
    rows = [
        ("kdfast", kdfast.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((package, version(package)) for package in ("triton", "transformers")),
        ("device", device),
        ("threads", str(torch.get_num_threads())),
    ]
    print(*(f"{name:<14}{value}" for name, value in rows), "backends", sep="\n")
    for backend in registry.BACKENDS:
        reason = _missing(backend)
        print(f"  {backend:<12}{'yes' if reason is None else f'no: {reason}'}")


def _missing(backend: str) -> str | None:
    reason = registry.missing(backend)
    if backend == "cpp" and reason is None:
        try:
            registry.extension()
        except ImportError as error:
            return str(error)
    return reason


def _distill(arguments: argparse.Namespace) -> None:
    _prepare_libraries()
    from transformers import set_seed

    from kdfast.trainer import DistillationTrainer

    recipe = _recipe(arguments)
    _check_paths(arguments)
    checkpoint = _checkpoint_to_resume(arguments.output, arguments.resume)
    training_arguments = _training_arguments(arguments, recipe.training_arguments)

    teacher_config = _load_config("teacher", arguments.teacher)
    student_config = _load_config("student", arguments.student)
    tokenizer = _load_tokenizer(arguments, student_config, teacher_config)
    task = arguments.task or _task_of(teacher_config)
    collator = _collator(task, tokenizer, arguments.mlm_probability)
    block_size = _block_size(arguments.block_size, tokenizer, student_config, teacher_config)
    train_blocks, eval_blocks = _load_blocks(
        arguments, tokenizer, block_size, masked=task == "masked-lm"
    )
    if len(eval_blocks) == 0:
        training_arguments.eval_strategy = "no"

    set_seed(arguments.seed)
    teacher = _load_model("teacher", arguments.teacher, teacher_config, task)
    student = _load_model("student", arguments.student, student_config, task)
    trainer = DistillationTrainer(
        model=student,
        args=training_arguments,
        teacher=teacher,
        objective=recipe.objective,
        # Widths may differ by padding alone, which holds no token.
        vocab_size=min(student_config.vocab_size, teacher_config.vocab_size),
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"student saved to {arguments.output}")


def _prepare_libraries() -> None:
    for package in ("transformers", "accelerate", "datasets", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"kdfast distill needs {package}: pip install 'kdfast[trainer]'")
    # Loading bars that nobody watches are noise, and would stand beside an error's one line.
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from kdfast.trainer import RECIPES

    if arguments.recipe not in RECIPES:
        raise CommandError(f"unknown recipe {arguments.recipe!r}: choose from {', '.join(RECIPES)}")
    with _reporting():
        return RECIPES[arguments.recipe](temperature=arguments.temperature, alpha=arguments.alpha)


def _collator(
    task: str, tokenizer: PreTrainedTokenizerBase, mlm_probability: float
) -> DataCollator:
    from transformers import DataCollatorForLanguageModeling, default_data_collator

    if task == "causal-lm":
        return default_data_collator
    if tokenizer.mask_token is None:
        raise CommandError("masked-lm needs a tokenizer with a mask token, and this one has none")
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)


def _training_arguments(
    arguments: argparse.Namespace, recipe_defaults: dict[str, object]
) -> TrainingArguments:
    from transformers import TrainingArguments

    given = {
        "num_train_epochs": arguments.epochs,
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "logging_steps": arguments.logging_steps,
        "save_steps": arguments.save_steps,
    }
    settings = {
        "learning_rate": 1e-4,
        "logging_steps": 10,
        **recipe_defaults,
        **{name: value for name, value in given.items() if value is not None},
        "output_dir": str(arguments.output),
        "eval_strategy": "epoch" if arguments.eval_fraction > 0 else "no",
        "prediction_loss_only": True,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.bf16,
        "fp16": arguments.fp16,
    }
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device")
    with _reporting():
        return TrainingArguments(**settings)


@contextlib.contextmanager
def _reporting(what: str = "") -> Iterator[None]:
    """Any error inside becomes one line: other people's files fail in too many ways to list."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CommandError(f"{what}: {reason}" if what else reason) from error
    finally:
        logging.set_verbosity(verbosity)


def _check_paths(arguments: argparse.Namespace) -> None:
    for name in ("teacher", "student"):
        path = getattr(arguments, name)
        if not path.exists():
            raise CommandError(f"--{name} {path} does not exist")
        if name == "teacher" and not path.is_dir():
            raise CommandError(f"--teacher {path} is not a directory")
        if path.is_dir() and not (path / "config.json").is_file():
            raise CommandError(f"--{name} {path} holds no config.json")
    if not _has_weights(arguments.teacher):
        raise CommandError(f"--teacher {arguments.teacher} holds no weights")
    for path in arguments.dataset:
        if not path.is_file():
            raise CommandError(
                f"--dataset {path} {'is not a file' if path.exists() else 'does not exist'}"
            )


def _has_weights(path: Path) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any((path / f"{name}{end}").exists() for name in names for end in ("", ".index.json"))


def _checkpoint_to_resume(output: Path, resume: bool) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output} is not a directory")
    checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
    if resume and checkpoint is None:
        raise CommandError(f"--resume: there is no checkpoint in {output}")
    if not resume and output.is_dir() and any(output.iterdir()):
        advice = "--resume to go on from its last checkpoint, or " if checkpoint else ""
        raise CommandError(f"--output {output} is not empty: pass {advice}another directory")
    return checkpoint


def _load_config(owner: str, path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _reporting(f"cannot load the {owner}'s config from {path}"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise CommandError(f"--{owner} {path} is no language model: its config has no vocab_size")
    return config


def _load_tokenizer(
    arguments: argparse.Namespace,
    student_config: PreTrainedConfig,
    teacher_config: PreTrainedConfig,
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from kdfast.trainer.vocabulary import check_same_vocabulary, check_vocabulary_fits

    def load(owner: str, path: Path) -> PreTrainedTokenizerBase | None:
        # Without any of them, transformers makes up an empty tokenizer.
        if not any((path / name).exists() for name in TOKENIZER_FILES):
            return None
        with _reporting(f"cannot load the {owner}'s tokenizer from {path}"):
            return AutoTokenizer.from_pretrained(path, local_files_only=True)

    tokenizer = load("teacher", arguments.teacher)
    if tokenizer is None:
        raise CommandError(f"--teacher {arguments.teacher} holds no tokenizer")
    student_tokenizer = load("student", arguments.student)
    if student_tokenizer is not None:
        with _reporting():
            check_same_vocabulary(student_tokenizer, tokenizer)
        tokenizer = student_tokenizer
    with _reporting():
        check_vocabulary_fits(tokenizer, teacher_config.vocab_size, "the teacher")
        check_vocabulary_fits(tokenizer, student_config.vocab_size, "the student")
    return tokenizer


def _task_of(config: PreTrainedConfig) -> str:
    from transformers.models.auto import modeling_auto

    names = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    for task, mapping in zip(TASKS, names, strict=True):
        if set(config.architectures or ()) & set(mapping.values()):
            return task
    raise CommandError(
        f"the teacher ({', '.join(config.architectures or ['no architecture named'])}) is neither "
        "a causal nor a masked language model; pass --task if its config is wrong"
    )


def _block_size(
    asked: int | None, tokenizer: PreTrainedTokenizerBase, *configs: PreTrainedConfig
) -> int:
    # A tokenizer without a limit says 10**30.
    limit = tokenizer.model_max_length
    for config in configs:
        limit = min(limit, getattr(config, "max_position_embeddings", None) or limit)
    if asked is not None and asked > limit:
        raise CommandError(
            f"--block-size {asked} is longer than the {limit} tokens that both models take"
        )
    return asked or min(limit, MAX_DEFAULT_BLOCK)


def _load_blocks(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, block_size: int, masked: bool
) -> tuple[Dataset, Dataset]:
    from kdfast.trainer.text import load_documents, pack

    with _reporting("cannot read the dataset"):
        documents = load_documents(arguments.dataset, arguments.text_column)
    documents = documents.shuffle(seed=arguments.seed)
    held_out = 0
    if arguments.eval_fraction > 0:
        held_out = min(max(1, round(arguments.eval_fraction * len(documents))), len(documents) - 1)
    eval_blocks, train_blocks = (
        pack(documents.select(rows), tokenizer, block_size, masked=masked)
        for rows in (range(held_out), range(held_out, len(documents)))
    )
    if len(train_blocks) == 0:
        raise CommandError(
            f"the dataset's {len(documents) - held_out} training documents do not fill one block "
            f"of {block_size} tokens: lower --block-size"
        )
    if arguments.eval_fraction > 0 and len(eval_blocks) == 0:
        print(
            f"kdfast: the {held_out} held-out documents do not fill one block of {block_size} "
            "tokens: no evaluation",
            file=sys.stderr,
        )
    return train_blocks, eval_blocks


def _load_model(owner: str, path: Path, config: PreTrainedConfig, task: str) -> PreTrainedModel:
    import transformers

    auto = (
        transformers.AutoModelForMaskedLM
        if task == "masked-lm"
        else transformers.AutoModelForCausalLM
    )
    with _reporting(f"cannot load the {owner} from {path}"):
        if not _has_weights(path):
            return auto.from_config(config, dtype=torch.float32)
        model, info = auto.from_pretrained(
            path,
            # A teacher stays as it was saved; a student's weights must resolve small updates.
            dtype="auto" if owner == "teacher" else torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        if owner == "teacher":
            raise CommandError(f"the teacher in {path} has no weights for {missing[0]} of a {task}")
        print(f"kdfast: the student starts with random {', '.join(missing)}", file=sys.stderr)
    return model


if __name__ == "__main__":
    sys.exit(main())
