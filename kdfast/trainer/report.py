"""What distillation has given: a teacher, its student and that student without it, side by side."""

import inspect
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast import files
from kdfast.ops.arguments import check_count

REPORT = "report.md"
CURVES = "report.png"
TRAINER_STATE = "trainer_state.json"
WARM_UP_PASSES = 3

# As their abstracts have it. DistilBERT's are 40 % smaller and 60 % faster.
CLAIMS = (
    "| TinyBERT with 4 layers, claimed by Jiao et al. 2020 | 7.5× | 9.4× | 96 % "
    "| GLUE test average, teacher BERT-base, NVIDIA K80 |",
    "| DistilBERT, claimed by Sanh et al. 2019 | 1.7× (40 % smaller) | 1.6× (60 % faster) | 97 % "
    "| GLUE development average, teacher BERT-base, a CPU |",
)

CURVES_SECTION = f"""
## Losses in training

![Losses by training step, one panel per term]({CURVES})

A panel is a term as it was logged, without its weight. `loss` is each run's own objective: what
runs compare by is in the other panels.
"""

COLORS = {"teacher": "#8250df", "student alone": "#6e7781", "distilled": "#0969da"}


@dataclass(frozen=True)
class ReportedModel:
    """One of the models that a report compares.

    Args:
        model: as trained, on the device where it is to be timed.
        score: what the report's metric says of it.
        checkpoint: the directory that holds its weights, to be weighed. None saves them to a
            temporary directory and weighs that.
        history: its training's losses: `trainer.state.log_history`, a `trainer_state.json`, or the
            directory that holds one. None: no curves of it.

    Example:
        >>> ReportedModel(trainer.model, metrics["eval_accuracy"], history=trainer.args.output_dir)
    """

    model: nn.Module
    score: float
    checkpoint: str | Path | None = None
    history: Sequence[Mapping[str, object]] | str | Path | None = None


def write_report(
    directory: str | Path,
    *,
    teacher: ReportedModel,
    distilled: ReportedModel,
    student_alone: ReportedModel | None = None,
    metric: str,
    batch: Mapping[str, Tensor],
    greater_is_better: bool = True,
    repeats: int = 20,
    title: str = "Distillation report",
) -> Path:
    """Write `report.md`, and `report.png` with the loss curves, into a directory.

    The table has of each model its parameters (tied ones once), the bytes of its weights on disk,
    its score, the share of the teacher's score that it retains, and the time of a forward pass.
    Scores are taken as they are given. The share is score / teacher's score where greater is
    better, and teacher's score / score where lower is (perplexity, a loss); without a positive
    score on both sides there is none. Times are medians of `repeats` passes over `batch`, in eval
    mode and without gradients, the models taking turns so that whatever slows the machine slows all
    of them. What TinyBERT's and DistilBERT's papers claim stands below, labelled as that.

    Each file appears whole or not at all. Of several processes one should write the report.

    Args:
        directory: where the files go; made if it is missing, and what it holds of them is replaced.
        teacher, distilled: the two models.
        student_alone: the student trained without the teacher. None leaves it out.
        metric: the name of the scores.
        batch: inputs of the timed forward pass; each model gets those that it names. `labels` are
            left out.
        greater_is_better: whether a larger score is a better one.
        repeats: timed passes of each model, at least 1.
        title: the first line.

    Returns:
        The path of `report.md`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected: a score that is
            not finite, a checkpoint without weights, a history that is none, models on different
            devices, a batch with nothing that a model takes.
        ImportError: there are curves to draw and matplotlib is not installed.
        OSError: a file cannot be written; it names the file.

    Example:
        >>> write_report(
        ...     "out",
        ...     teacher=ReportedModel(teacher, 0.93),
        ...     student_alone=ReportedModel(alone, 0.87, history="alone"),
        ...     distilled=ReportedModel(student, 0.91, history="distilled"),
        ...     metric="accuracy",
        ...     batch=tokenizer(sentences, padding=True, return_tensors="pt"),
        ... )
        PosixPath('out/report.md')
    """
    models = {"teacher": teacher, "student alone": student_alone, "distilled": distilled}
    models = {name: entry for name, entry in models.items() if entry is not None}
    for name, entry in models.items():
        _check_entry(name, entry)
    check_count("repeats", repeats)
    device = _common_device(models)
    inputs = {name: _inputs_of(name, entry.model, batch, device) for name, entry in models.items()}
    histories = {name: _history(name, entry.history) for name, entry in models.items()}
    terms = _terms(histories)
    matplotlib_figure = _matplotlib_figure() if terms else None

    sizes = {name: _bytes_on_disk(name, entry) for name, entry in models.items()}
    seconds = _forward_seconds({name: e.model for name, e in models.items()}, inputs, repeats)
    text = _markdown(
        title, models, sizes, seconds, metric, greater_is_better, _setting(batch, device, repeats)
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The curves first: the text never names a file that is not there.
    if terms:
        text += CURVES_SECTION
        files.write(directory / CURVES, _curves(matplotlib_figure, histories, terms))
    files.write(directory / REPORT, text.encode())
    return directory / REPORT


def _check_entry(name: str, entry: ReportedModel) -> None:
    argument = name.replace(" ", "_")
    if not isinstance(entry, ReportedModel):
        raise TypeError(f"{argument} must be a ReportedModel, got {type(entry).__name__}")
    if not isinstance(entry.model, nn.Module):
        raise TypeError(f"{argument}.model must be a module, got {type(entry.model).__name__}")
    if isinstance(entry.score, bool) or not isinstance(entry.score, (int, float)):
        raise TypeError(f"{argument}.score must be a number, got {type(entry.score).__name__}")
    if not math.isfinite(entry.score):
        raise ValueError(f"{argument}.score must be finite, got {entry.score}")


def _common_device(models: Mapping[str, ReportedModel]) -> torch.device:
    devices = {name: next(entry.model.parameters()).device for name, entry in models.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"the models must be on one device to be timed, got {where}")
    return devices["teacher"]


def _inputs_of(
    name: str, model: nn.Module, batch: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    names = set(inspect.signature(model.forward).parameters) - {"labels"}
    inputs = {key: tensor.to(device) for key, tensor in batch.items() if key in names}
    if not inputs:
        raise ValueError(f"batch has none of the inputs of the {name}: got {list(batch)}")
    return inputs


def _history(
    name: str, history: Sequence[Mapping[str, object]] | str | Path | None
) -> list[Mapping[str, object]]:
    argument = f"{name.replace(' ', '_')}.history"
    if history is None:
        return []
    if isinstance(history, (str, Path)):
        path = Path(history)
        path = path / TRAINER_STATE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{argument}: {path} does not exist")
        try:
            history = json.loads(path.read_text())["log_history"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{argument}: {path} is no trainer state with a log_history"
            ) from error
    if not all(isinstance(entry, Mapping) for entry in history):
        raise TypeError(f"{argument} must hold what trainer.state.log_history holds")
    return list(history)


def _bytes_on_disk(name: str, entry: ReportedModel) -> int:
    if entry.checkpoint is not None:
        return _weigh(f"{name.replace(' ', '_')}.checkpoint", Path(entry.checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(entry.model, PreTrainedModel):
            entry.model.save_pretrained(folder)
        else:
            torch.save(entry.model.state_dict(), Path(folder) / "pytorch_model.bin")
        return _weigh(name, Path(folder))


def _weigh(name: str, directory: Path) -> int:
    """The bytes of a model's weights, in one of the two formats if it is there in both."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        files = list(directory.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    raise ValueError(f"{name}: {directory} holds no model*.safetensors and no pytorch_model*.bin")


def _forward_seconds(
    models: Mapping[str, nn.Module], inputs: Mapping[str, dict[str, Tensor]], repeats: int
) -> dict[str, Tensor]:
    """Of each model the quartiles of its passes, `[3]`."""
    seconds = {name: [] for name in models}
    with _eval_modes(models.values()), torch.inference_mode():
        for repeat in range(-WARM_UP_PASSES, repeats):
            for name, model in models.items():
                _wait()
                start = time.perf_counter()
                model(**inputs[name])
                _wait()
                if repeat >= 0:
                    seconds[name].append(time.perf_counter() - start)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return {
        name: torch.tensor(passes, dtype=torch.float64).quantile(quartiles)
        for name, passes in seconds.items()
    }


def _wait() -> None:
    # What was launched is not yet done; without an accelerator there is nothing to wait for.
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def _eval_modes(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _setting(batch: Mapping[str, Tensor], device: torch.device, repeats: int) -> str:
    name = "input_ids" if "input_ids" in batch else next(iter(batch))
    shape = " × ".join(map(str, batch[name].shape))
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    else:
        where = str(device)
    return (
        f"A forward pass is the median of {repeats} (in brackets the quartiles) over {name} of "
        f"{shape}, the models in turns, in one process: {where}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}."
    )


def _retained(score: float, teacher: float, greater_is_better: bool) -> float | None:
    """The share of the teacher's score that a model has, where there is such a thing."""
    if score <= 0 or teacher <= 0:
        return None
    return score / teacher if greater_is_better else teacher / score


def _markdown(
    title: str,
    models: Mapping[str, ReportedModel],
    sizes: Mapping[str, int],
    seconds: Mapping[str, Tensor],
    metric: str,
    greater_is_better: bool,
    setting: str,
) -> str:
    counts = {name: _parameters(entry.model) for name, entry in models.items()}
    rows = []
    for name, entry in models.items():
        low, median, high = (f"{milliseconds:.3g}" for milliseconds in seconds[name] * 1e3)
        share = _retained(entry.score, models["teacher"].score, greater_is_better)
        cells = (
            name,
            _count(counts[name]),
            f"{sizes[name] / 1e6:.4g} MB",
            f"{entry.score:.4g}",
            _percent(share),
            f"{median} ms ({low} to {high})",
            _times(counts["teacher"], counts[name]),
            _times(seconds["teacher"][1], seconds[name][1]),
        )
        rows.append("| " + " | ".join(cells) + " |")
    share = _retained(models["distilled"].score, models["teacher"].score, greater_is_better)
    direction = (
        f"model / teacher in {metric}, of which a greater"
        if greater_is_better
        else f"teacher / model in {metric}, of which a lower"
    )
    types = {str(next(e.model.parameters()).dtype).removeprefix("torch.") for e in models.values()}
    lines = [
        f"# {title}",
        "",
        f"| | parameters | on disk | {metric} | retained | forward pass | smaller | faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        f"Retained is {direction} one is better. Smaller is in parameters, of which tied ones "
        "count once; 1 MB is 10⁶ bytes, of the weights alone.",
        "",
        f"{setting} Weights in {', '.join(sorted(types))}.",
        "",
        "## Beside what papers claim",
        "",
        "The papers' numbers are of other models, tasks and machines; none of them was measured "
        "here.",
        "",
        "| | smaller | faster | retained | of |",
        "| --- | ---: | ---: | ---: | --- |",
        f"| distilled, measured here | {_times(counts['teacher'], counts['distilled'])} "
        f"| {_times(seconds['teacher'][1], seconds['distilled'][1])} | {_percent(share)} "
        f"| {metric} |",
        *CLAIMS,
        "",
    ]
    return "\n".join(lines)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count(parameters: int) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if parameters >= unit:
            return f"{parameters / unit:.4g}{name}"
    return str(parameters)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _times(teacher: float | Tensor, model: float | Tensor) -> str:
    return f"{float(teacher / model):.2f}×"


def _terms(histories: Mapping[str, Sequence[Mapping[str, object]]]) -> list[str]:
    """The losses that were logged in training or evaluation, `loss` itself first."""
    logged = {
        key.removeprefix("eval_")
        for history in histories.values()
        for entry in history
        # Trainer's train_loss is one number for the whole run.
        for key in entry.keys() - {"train_loss"}
    }
    terms = sorted(key for key in logged if key.endswith("_loss"))
    return ["loss", *terms] if "loss" in logged else terms


def _matplotlib_figure() -> ModuleType:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "the report's curves need matplotlib: pip install matplotlib, or give no history"
        ) from error
    return matplotlib.figure


def _curves(
    matplotlib_figure: ModuleType,
    histories: Mapping[str, Sequence[Mapping[str, object]]],
    terms: Sequence[str],
) -> bytes:
    """A PNG with a panel per term; training is a line, evaluation a dashed one with dots."""
    columns = min(3, len(terms))
    rows = -(-len(terms) // columns)
    figure = matplotlib_figure.Figure(
        figsize=(4.2 * columns, 2.6 * rows + 0.5), dpi=150, layout="constrained"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    lines: dict[str, dict[str, object]] = {}
    for axis, term in zip(axes, terms, strict=False):
        axis.set_title(term, loc="left", fontweight="bold")
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        for name, history in histories.items():
            styles = {term: ".-", f"eval_{term}": "o--"}
            for key, style in styles.items():
                points = [(e["step"], e[key]) for e in history if key in e and "step" in e]
                if points:
                    kind = "training" if key == term else "evaluation"
                    (lines.setdefault(name, {})[kind],) = axis.plot(
                        *zip(*points, strict=True), style, color=COLORS[name], markersize=3
                    )
    for axis in axes[len(terms) :]:
        axis.axis("off")
    figure.legend(
        [line for kinds in lines.values() for line in kinds.values()],
        [f"{name}, {kind}" for name, kinds in lines.items() for kind in kinds],
        loc="outside lower center",
        ncols=len(lines),
        frameon=False,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
