"""The command `kdfast`: `kdfast distill`, `kdfast cache`, `kdfast env`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import inspect
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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

    from kdfast.teacher_cache import TeacherCache
    from kdfast.trainer import Recipe

TASKS = ("causal-lm", "masked-lm")
MAX_DEFAULT_BLOCK = 512
DEFAULT_EVAL_FRACTION = 0.05
DEFAULT_DRAWS = 12

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

    cache = commands.add_parser(
        "cache",
        help="keep a teacher's outputs on disk, and train from there",
        description="A teacher's truncated outputs on disk, for kdfast distill --teacher-cache.",
    )
    _add_cache_commands(cache.add_subparsers(required=True, metavar="COMMAND", dest="command"))
    return parser


def _add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--recipe",
        required=True,
        metavar="NAME",
        help="what to train towards: hinton, truncated",
    )
    teacher = parser.add_mutually_exclusive_group(required=True)
    _add_teacher(teacher.add_argument)
    teacher.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="DIR",
        help="what `kdfast cache build` made of a teacher and the same --dataset",
    )
    add(
        "--student",
        required=True,
        type=Path,
        metavar="PATH|CONFIG",
        help="a checkpoint, or a config (file or directory) for a fresh student",
    )
    _add_dataset(add)
    _add_output(add, "where checkpoints and the student go")
    _add_data_options(parser.add_argument_group("data").add_argument)
    _add_objective_options(parser.add_argument_group("objective").add_argument)
    _add_training_options(parser.add_argument_group("training"))


def _add_cache_commands(commands: argparse._SubParsersAction) -> None:
    build = commands.add_parser(
        "build",
        help="run a teacher over a dataset once, and keep a few probabilities per token",
        description="Run a teacher over a dataset once. The same command again goes on where an "
        "interrupted one stopped.",
    )
    build.set_defaults(run=_cache_build)
    add = build.add_argument
    _add_teacher(add, required=True)
    _add_dataset(add)
    _add_output(add, "the cache: a new directory, or one with an unfinished cache")
    _add_data_options(build.add_argument_group("data").add_argument)
    _add_entries_options(build.add_argument_group("entries").add_argument)
    add = build.add_argument_group("run").add_argument
    count = _number(int, 1)
    add("--batch-size", type=count, default=8, metavar="N", help="default: 8")
    add(
        "--samples-per-shard",
        type=count,
        default=1024,
        metavar="N",
        help="sequences per file: what an interruption costs at most (default: 1024)",
    )
    _add_seed(add)
    _add_device(add)

    for name, run, text in (
        ("info", _cache_info, "what a cache holds, of what, and how large it is"),
        ("verify", _cache_verify, "compare every byte of a cache with its checksums"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.set_defaults(run=run)
        command.add_argument("directory", type=Path, metavar="DIR")


def _add_teacher(add: _AddArgument, **options: object) -> None:
    add("--teacher", type=Path, metavar="PATH", help="a checkpoint with its tokenizer", **options)


def _add_dataset(add: _AddArgument) -> None:
    add(
        "--dataset",
        required=True,
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".txt (a blank line ends a document), or .json, .jsonl, .csv, .parquet (one per row)",
    )


def _add_output(add: _AddArgument, text: str) -> None:
    add("--output", required=True, type=Path, metavar="DIR", help=text)


def _add_seed(add: _AddArgument) -> None:
    add("--seed", type=_number(int, 0), default=42, metavar="N", help="default: 42")


def _add_device(add: _AddArgument) -> None:
    add("--device", choices=("cpu", "cuda"), help="default: the fastest there is")


def _add_entries_options(add: _AddArgument) -> None:
    count = _number(int, 1)
    positive = _number(float, 0, open_low=True)
    add("--k", type=count, metavar="K", help="keep the K largest probabilities of each token")
    add("--sampled", action="store_true", help="or keep an unbiased sample of them")
    add("--draws", type=count, metavar="N", help="the sample's size (default: 12)")
    add("--temperature", type=positive, default=1.0, metavar="T", help="default: 1.0")
    add(
        "--proposal-temperature",
        type=positive,
        metavar="T",
        help="of the draws; above --temperature draws rare tokens more often (default: 1.0)",
    )
    add(
        "--bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="of a stored log-probability (default: 16)",
    )


def _add_data_options(add: _AddArgument) -> None:
    add("--text-column", metavar="NAME", help="the column with the text (default: text)")
    add("--task", choices=TASKS, help="default: what the teacher is")
    add(
        "--block-size",
        type=_number(int, 2),
        metavar="N",
        help=f"tokens per sequence (default: what the models take, at most {MAX_DEFAULT_BLOCK})",
    )
    add(
        "--mlm-probability",
        type=_number(float, 0, 1, open_low=True),
        metavar="P",
        help="share of tokens to mask for masked-lm (default: 0.15)",
    )
    add(
        "--eval-fraction",
        type=_number(float, 0, 0.9),
        metavar="F",
        help="share of documents held out and evaluated after every epoch (default: 0.05)",
    )


def _add_objective_options(add: _AddArgument) -> None:
    add("--temperature", type=float, metavar="T", help="default: the recipe's, or the cache's")
    add("--alpha", type=float, metavar="A", help="the soft term's share (default: the recipe's)")
    add("--k", type=_number(int, 1), metavar="K", help="entries per token, of recipe truncated")
    add(
        "--tail",
        choices=("bucket", "renormalize", "none", "support"),
        help="what becomes of the other entries, of recipe truncated",
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
    _add_seed(add)
    add("--logging-steps", type=count, metavar="N", help="default: 10")
    add("--save-steps", type=count, metavar="N", help="steps between checkpoints (default: 500)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    _add_device(add)
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


@dataclass(frozen=True)
class _Data:
    """How files become blocks: what a cache and the training from it must have in common."""

    task: str
    text_column: str
    block_size: int
    # Of masked language models alone.
    mlm_probability: float | None
    eval_fraction: float
    seed: int


def _distill(arguments: argparse.Namespace) -> None:
    _need("kdfast distill", "transformers", "accelerate", "datasets", "pyarrow")
    _silence_libraries()
    from transformers import default_data_collator, set_seed

    from kdfast.trainer import DistillationTrainer

    _check_paths(arguments, "student", "teacher" if arguments.teacher else None)
    cache = None
    if arguments.teacher_cache is not None:
        cache = _open_cache(arguments.teacher_cache)
        _take_data_from(cache, arguments)
    recipe = _recipe(arguments, cache)
    checkpoint = _checkpoint_to_resume(arguments.output, arguments.resume)
    training_arguments = _training_arguments(arguments, recipe.training_arguments)

    student_config = _load_config("student", arguments.student)
    if cache is None:
        teacher_config = _load_config("teacher", arguments.teacher)
        # Widths may differ by padding alone, which holds no token.
        vocab_size = min(student_config.vocab_size, teacher_config.vocab_size)
        tokenizer = _teachers_tokenizer(arguments.teacher, teacher_config.vocab_size)
        configs = (student_config, teacher_config)
    else:
        vocab_size = cache.vocab_size
        tokenizer = _cached_tokenizer(cache)
        configs = (student_config,)
    tokenizer = _students_tokenizer(arguments.student, student_config.vocab_size, tokenizer)
    # The order of cached blocks and their masks are the cache's; training has its own seed.
    seed = arguments.seed if cache is None else cache.manifest["data"]["seed"]
    data = _settle_data(arguments, seed, tokenizer, *configs)
    train_blocks, eval_blocks = _load_blocks(arguments.dataset, data, tokenizer)
    if cache is None:
        collator = _collator(data, tokenizer)
    else:
        train_blocks, eval_blocks = _fixed_blocks(train_blocks, eval_blocks, data, tokenizer)
        train_blocks, eval_blocks = _attach(cache, train_blocks, eval_blocks)
        collator = default_data_collator
    if len(eval_blocks) == 0:
        training_arguments.eval_strategy = "no"

    set_seed(arguments.seed)
    teacher = (
        {"teacher": _load_model("teacher", arguments.teacher, teacher_config, data.task)}
        if cache is None
        else {"teacher_cache": cache}
    )
    student = _load_model("student", arguments.student, student_config, data.task)
    with _reporting():
        trainer = DistillationTrainer(
            model=student,
            args=training_arguments,
            **teacher,
            objective=recipe.objective,
            vocab_size=vocab_size,
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


def _cache_build(arguments: argparse.Namespace) -> None:
    _need("kdfast cache build", "transformers", "datasets", "pyarrow")
    _silence_libraries()
    from datasets import concatenate_datasets

    from kdfast.teacher_cache import build_cache

    entries = _entries(arguments)
    _check_paths(arguments, "teacher")
    _check_device(arguments.device)
    config = _load_config("teacher", arguments.teacher)
    tokenizer = _teachers_tokenizer(arguments.teacher, config.vocab_size)
    data = _settle_data(arguments, arguments.seed, tokenizer, config)
    parts = _load_blocks(arguments.dataset, data, tokenizer)
    blocks = concatenate_datasets(
        [part for part in _fixed_blocks(*parts, data, tokenizer) if len(part) > 0]
    )
    teacher = _load_model("teacher", arguments.teacher, config, data.task)
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    with _reporting():
        cache = build_cache(
            teacher.to(arguments.device or fastest),
            blocks.remove_columns("labels"),
            arguments.output,
            **entries,
            # Columns without a token are padding.
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            tokenizer=tokenizer,
            batch_size=arguments.batch_size,
            samples_per_shard=arguments.samples_per_shard,
            seed=arguments.seed,
            data=asdict(data),
            progress=_print_progress if sys.stderr.isatty() else None,
        )
    print(f"{cache.tokens} tokens at {cache.bytes_per_token:.1f} bytes in {arguments.output}")


def _entries(arguments: argparse.Namespace) -> dict[str, object]:
    entries = {"temperature": arguments.temperature, "bits": arguments.bits}
    if arguments.sampled == (arguments.k is not None):
        raise CommandError("pass either --k K, for the largest entries, or --sampled")
    if arguments.k is not None:
        for name in ("draws", "proposal_temperature"):
            if getattr(arguments, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} goes with --sampled alone")
        return {**entries, "k": arguments.k}
    return {
        **entries,
        "draws": arguments.draws or DEFAULT_DRAWS,
        "proposal_temperature": arguments.proposal_temperature or 1.0,
    }


def _print_progress(done: int, samples: int) -> None:
    end = "\n" if done == samples else ""
    print(f"\r{done} of {samples} sequences", end=end, file=sys.stderr, flush=True)


def _cache_info(arguments: argparse.Namespace) -> None:
    cache = _open_cache(arguments.directory)
    manifest = cache.manifest
    tokenizer, data = manifest["tokenizer"], manifest["data"] or {}
    if cache.sampled:
        entries = f"{cache.k} sampled at temperature {manifest['proposal_temperature']}"
    else:
        entries = f"the {cache.k} largest"
    rows = [
        ("format", f"version {manifest['format_version']}"),
        ("samples", len(cache)),
        ("tokens", cache.tokens),
        ("entries", f"{entries} of {cache.vocab_size}, at temperature {cache.temperature}"),
        ("bits", manifest["bits"]),
        ("shards", len(manifest["shards"])),
        ("size", f"{cache.nbytes} bytes, {cache.bytes_per_token:.1f} per token"),
        ("teacher", manifest["teacher"]),
        ("dataset", manifest["dataset"]["fingerprint"]),
        ("tokenizer", tokenizer and f"{tokenizer['fingerprint']}, {tokenizer['tokens']} tokens"),
        *data.items(),
    ]
    print(*(f"{name:<17}{value}" for name, value in rows if value is not None), sep="\n")


def _cache_verify(arguments: argparse.Namespace) -> None:
    cache = _open_cache(arguments.directory)
    with _reporting():
        cache.verify()
    print(f"all {cache.nbytes} bytes of {arguments.directory} are what was written")


def _open_cache(directory: Path) -> TeacherCache:
    _need("a teacher cache", "pyarrow")
    from kdfast.teacher_cache import TeacherCache, TeacherCacheError

    try:
        return TeacherCache(directory)
    except TeacherCacheError as error:
        raise CommandError(str(error)) from error


def _need(what: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{what} needs {package}: pip install 'kdfast[trainer]'")


def _silence_libraries() -> None:
    # Loading bars that nobody watches are noise, and would stand beside an error's one line.
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def _take_data_from(cache: TeacherCache, arguments: argparse.Namespace) -> None:
    """The cache's data settings in the place of flags that were not given."""
    recorded = cache.manifest["data"]
    names = {"task", "text_column", "block_size", "mlm_probability", "eval_fraction"}
    if not isinstance(recorded, dict) or not {*names, "seed"} <= recorded.keys():
        raise CommandError(
            f"{cache.directory} does not say how its dataset was made: kdfast cache build makes "
            "caches for kdfast distill"
        )
    for name in sorted(names):
        given = getattr(arguments, name)
        if given is not None and given != recorded[name]:
            flag = f"--{name.replace('_', '-')}"
            raise CommandError(
                f"{flag} {given}: the teacher cache in {cache.directory} was built with "
                f"{recorded[name]}"
            )
        setattr(arguments, name, recorded[name])


def _settle_data(
    arguments: argparse.Namespace,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    *configs: PreTrainedConfig,
) -> _Data:
    task = arguments.task or _task_of(configs[-1])
    masked = task == "masked-lm"
    if masked and tokenizer.mask_token is None:
        raise CommandError("masked-lm needs a tokenizer with a mask token, and this one has none")

    def chosen(name: str, default: object) -> object:
        given = getattr(arguments, name)
        return default if given is None else given

    return _Data(
        task,
        chosen("text_column", "text"),
        _block_size(arguments.block_size, tokenizer, *configs),
        chosen("mlm_probability", 0.15) if masked else None,
        chosen("eval_fraction", DEFAULT_EVAL_FRACTION),
        seed,
    )


def _attach(cache: TeacherCache, train: Dataset, held_out: Dataset) -> tuple[Dataset, Dataset]:
    if len(train) + len(held_out) != len(cache):
        raise CommandError(
            f"the dataset gives {len(train) + len(held_out)} sequences and the teacher cache in "
            f"{cache.directory} holds {len(cache)}: it was built from other files"
        )
    with _reporting():
        return (
            cache.attach(train),
            cache.attach(held_out, len(train)) if len(held_out) else held_out,
        )


def _recipe(arguments: argparse.Namespace, cache: TeacherCache | None) -> Recipe:
    from kdfast.trainer import RECIPES

    if arguments.recipe not in RECIPES:
        raise CommandError(f"unknown recipe {arguments.recipe!r}: choose from {', '.join(RECIPES)}")
    make = RECIPES[arguments.recipe]
    names = inspect.signature(make).parameters
    settings = {}
    for name in ("temperature", "alpha", "k", "tail"):
        value = getattr(arguments, name)
        if value is None:
            continue
        if name not in names:
            raise CommandError(f"--{name} is no setting of the recipe {arguments.recipe}")
        settings[name] = value
    if cache is not None:
        given = settings.setdefault("temperature", cache.temperature)
        if given != cache.temperature:
            raise CommandError(
                f"--temperature {given}: the teacher cache in {cache.directory} was built at "
                f"{cache.temperature}"
            )
    with _reporting():
        return make(**settings)


def _collator(data: _Data, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
    from transformers import DataCollatorForLanguageModeling, default_data_collator

    if data.task == "causal-lm":
        return default_data_collator
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=data.mlm_probability)


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
    evaluates = arguments.eval_fraction is None or arguments.eval_fraction > 0
    settings = {
        "learning_rate": 1e-4,
        "logging_steps": 10,
        **recipe_defaults,
        **{name: value for name, value in given.items() if value is not None},
        "output_dir": str(arguments.output),
        "eval_strategy": "epoch" if evaluates else "no",
        "prediction_loss_only": True,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.bf16,
        "fp16": arguments.fp16,
    }
    _check_device(arguments.device)
    with _reporting():
        return TrainingArguments(**settings)


def _check_device(device: str | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device")


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


def _check_paths(arguments: argparse.Namespace, *owners: str | None) -> None:
    for name in filter(None, owners):
        path = getattr(arguments, name)
        if not path.exists():
            raise CommandError(f"--{name} {path} does not exist")
        if name == "teacher" and not path.is_dir():
            raise CommandError(f"--teacher {path} is not a directory")
        if path.is_dir() and not (path / "config.json").is_file():
            raise CommandError(f"--{name} {path} holds no config.json")
        if name == "teacher" and not _has_weights(path):
            raise CommandError(f"--teacher {path} holds no weights")
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


def _load_tokenizer(owner: str, path: Path) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    # Without any of them, transformers makes up an empty tokenizer.
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    with _reporting(f"cannot load the {owner}'s tokenizer from {path}"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _teachers_tokenizer(path: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    from kdfast.trainer.vocabulary import check_vocabulary_fits

    tokenizer = _load_tokenizer("teacher", path)
    if tokenizer is None:
        raise CommandError(f"--teacher {path} holds no tokenizer")
    with _reporting():
        check_vocabulary_fits(tokenizer, vocab_size, "the teacher")
    return tokenizer


def _cached_tokenizer(cache: TeacherCache) -> PreTrainedTokenizerBase:
    from kdfast.teacher_cache.format import TOKENIZER

    path = cache.directory / TOKENIZER
    tokenizer = _load_tokenizer("teacher cache", path)
    if tokenizer is None:
        raise CommandError(f"{path} holds no tokenizer")
    with _reporting(str(path)):
        cache.check_tokenizer(tokenizer)
    return tokenizer


def _students_tokenizer(
    path: Path, vocab_size: int, teachers: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The student's own, or else the teacher's."""
    from kdfast.trainer.vocabulary import check_same_vocabulary, check_vocabulary_fits

    tokenizer = _load_tokenizer("student", path)
    with _reporting():
        if tokenizer is not None:
            check_same_vocabulary(tokenizer, teachers)
        tokenizer = tokenizer or teachers
        check_vocabulary_fits(tokenizer, vocab_size, "the student")
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
            f"--block-size {asked} is longer than the {limit} tokens that the models take"
        )
    return asked or min(limit, MAX_DEFAULT_BLOCK)


def _load_blocks(
    files: Sequence[Path], data: _Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    from kdfast.trainer.text import load_documents, pack

    with _reporting("cannot read the dataset"):
        documents = load_documents(files, data.text_column)
    documents = documents.shuffle(seed=data.seed)
    held_out = 0
    if data.eval_fraction > 0:
        held_out = min(max(1, round(data.eval_fraction * len(documents))), len(documents) - 1)
    eval_blocks, train_blocks = (
        pack(documents.select(rows), tokenizer, data.block_size, masked=data.task == "masked-lm")
        for rows in (range(held_out), range(held_out, len(documents)))
    )
    if len(train_blocks) == 0:
        raise CommandError(
            f"the dataset's {len(documents) - held_out} training documents do not fill one block "
            f"of {data.block_size} tokens: lower --block-size"
        )
    if data.eval_fraction > 0 and len(eval_blocks) == 0:
        print(
            f"kdfast: the {held_out} held-out documents do not fill one block of "
            f"{data.block_size} tokens: no evaluation",
            file=sys.stderr,
        )
    return train_blocks, eval_blocks


def _fixed_blocks(
    train: Dataset, held_out: Dataset, data: _Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """The blocks as the teacher of a cache sees them: for masked language models, masked."""
    from kdfast.trainer.text import mask_once

    if data.task == "causal-lm":
        return train, held_out
    return (
        mask_once(train, tokenizer, data.mlm_probability, data.seed),
        mask_once(held_out, tokenizer, data.mlm_probability, data.seed, start=len(train)),
    )


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
