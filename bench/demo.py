"""Distillation on real text, in minutes and without a download: the first of `make demo`.

A teacher is trained on the documentation that Python itself carries. Three students of the same
size, initialisation and data order then take the same number of steps: one alone, one towards the
teacher, and one towards a cache of what the teacher said, without the teacher. What comes out is a
table and a plot of what they know, how fast they are and what the loss costs; the exit status is 1
if distillation did not help.
"""

import copy
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from demo_text import collect_documents, split_documents, train_bpe
from matplotlib.ticker import FormatStrFormatter
from measure import median_seconds, peak_bytes
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import kdfast
from kdfast.teacher_cache import TeacherCache, build_cache
from kdfast.trainer import DistillationTrainer, Recipe, hinton

OUTPUT = Path("runs/demo")
SEED = 0

VOCAB = 8192
BLOCK = 128
BATCH = 8
HELD_OUT_SHARE = 0.06

TEACHER = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
STUDENT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEACHER_STEPS, TEACHER_LEARNING_RATE = 420, 3e-3
STUDENT_STEPS, STUDENT_LEARNING_RATE = 240, 6e-3
EVALUATIONS = 6

TEMPERATURE, ALPHA = 2.0, 0.9
# A teacher this unsure has most of its probability off any few of its largest entries.
CACHED_DRAWS = 32

COLOURS = {
    "teacher": "#8d99a6",
    "alone": "#e08a3c",
    "distilled": "#2f6fb0",
    "eager": "#8d99a6",
    "fused": "#2f6fb0",
}


@dataclass
class Run:
    """A trained model, and what was measured on it."""

    name: str
    model: LlamaForCausalLM
    # (step, perplexity on held-out text)
    curve: list[tuple[int, float]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    # Without the evaluations.
    training_seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        return self.curve[-1][1]


def main() -> int:
    started = time.perf_counter()
    OUTPUT.mkdir(parents=True, exist_ok=True)

    training_texts, held_out_texts = split_documents(collect_documents(), HELD_OUT_SHARE, SEED)
    tokenizer = train_bpe(training_texts, VOCAB)
    blocks, held_out = pack(training_texts, tokenizer), pack(held_out_texts, tokenizer)
    print(
        f"{len(blocks) * BLOCK:,} training tokens, {len(held_out) * BLOCK:,} held out; "
        f"backends: {', '.join(kdfast.available_backends())}"
    )

    teacher = Run("teacher", build(TEACHER, tokenizer))
    fit(
        teacher,
        blocks,
        held_out,
        tokenizer,
        TEACHER_STEPS,
        TEACHER_LEARNING_RATE,
        evaluations=1,
    )
    student = build(STUDENT, tokenizer)
    alone = Run("alone", copy.deepcopy(student))
    fit(alone, blocks, held_out, tokenizer, STUDENT_STEPS, STUDENT_LEARNING_RATE)
    cached = Run("cached", copy.deepcopy(student))
    distilled = Run("distilled", student)
    fit(
        distilled,
        blocks,
        held_out,
        tokenizer,
        STUDENT_STEPS,
        STUDENT_LEARNING_RATE,
        recipe=hinton(TEMPERATURE, ALPHA),
        teacher=teacher.model,
    )
    cache, cache_seconds = fill_cache(teacher.model, blocks)
    fit(
        cached,
        blocks,
        held_out,
        tokenizer,
        STUDENT_STEPS,
        STUDENT_LEARNING_RATE,
        recipe=hinton(TEMPERATURE, ALPHA),
        teacher_cache=cache,
    )

    runs = [teacher, alone, distilled]
    for run in runs:
        run.tokens_per_second = tokens_per_second(run.model, held_out)
    costs = loss_costs(distilled.model, teacher.model, held_out[:BATCH])

    print("\n" + table(runs, costs))
    print("\n" + teachers_table(distilled, cached, cache, cache_seconds))
    draw(runs, costs, OUTPUT / "demo.png")
    print(f"\n{OUTPUT / 'demo.png'}, the student in {OUTPUT / 'distilled'}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    if distilled.perplexity >= alone.perplexity:
        print(
            "demo: the distilled student is not better on held-out text: "
            f"perplexity {distilled.perplexity:.1f} against {alone.perplexity:.1f} alone",
            file=sys.stderr,
        )
        return 1
    return 0


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Tensor]]:
    rows = tokenizer(texts, verbose=False)["input_ids"]
    tokens = torch.tensor([id for row in rows for id in (*row, tokenizer.eos_token_id)])
    blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    return [{"input_ids": block, "labels": block} for block in blocks]


def build(size: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    set_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            **size,
            intermediate_size=size["hidden_size"] * 8 // 3 // 32 * 32,
            vocab_size=VOCAB,
            max_position_embeddings=BLOCK,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def fit(
    run: Run,
    blocks: list[dict[str, Tensor]],
    held_out: list[dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    learning_rate: float,
    *,
    recipe: Recipe | None = None,
    evaluations: int = EVALUATIONS,
    **teacher: LlamaForCausalLM | TeacherCache,
) -> None:
    """Train with the same trainer, seed and settings either way; only the loss differs."""
    print(f"\n{run.name}: {count_parameters(run.model):,} parameters, {steps} steps", flush=True)
    arguments = TrainingArguments(
        output_dir=str(OUTPUT / run.name),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        seed=SEED,
        logging_steps=steps // EVALUATIONS,
        save_strategy="no",
        log_level="error",
        use_cpu=True,
    )

    evaluating = 0.0

    class Perplexity(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            nonlocal evaluating
            if state.global_step % (steps // evaluations) == 0:
                started = time.perf_counter()
                run.curve.append((state.global_step, perplexity(run.model, held_out)))
                evaluating += time.perf_counter() - started

    common = {
        "model": run.model,
        "args": arguments,
        "data_collator": default_data_collator,
        "train_dataset": blocks,
        "processing_class": tokenizer,
        "callbacks": [Perplexity()],
    }
    if recipe is None:
        trainer = Trainer(**common)
    else:
        trainer = DistillationTrainer(**common, **teacher, objective=recipe.objective)
    started = time.perf_counter()
    trainer.train()
    run.training_seconds = time.perf_counter() - started - evaluating
    trainer.save_model()


def fill_cache(
    teacher: LlamaForCausalLM, blocks: list[dict[str, Tensor]]
) -> tuple[TeacherCache, float]:
    """What the teacher says of every training token, and the seconds that it took to ask."""
    print(f"\ncache: {len(blocks) * BLOCK:,} tokens, {CACHED_DRAWS} samples each", flush=True)
    directory = OUTPUT / "cache"
    # That of an earlier run is of another teacher.
    shutil.rmtree(directory, ignore_errors=True)
    started = time.perf_counter()
    cache = build_cache(
        teacher,
        blocks,
        directory,
        draws=CACHED_DRAWS,
        temperature=TEMPERATURE,
        proposal_temperature=TEMPERATURE,
        bits=8,
        batch_size=BATCH,
    )
    return cache, time.perf_counter() - started


def batches(blocks: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    for start in range(0, len(blocks), BATCH):
        yield torch.stack([row["input_ids"] for row in blocks[start : start + BATCH]])


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, blocks: list[dict[str, Tensor]]) -> float:
    was_training = model.training
    model.eval()
    total = count = 0
    for tokens in batches(blocks):
        logits = model(input_ids=tokens).logits[:, :-1]
        labels = tokens[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += labels.numel()
    model.train(was_training)
    return math.exp(total / count)


def count_parameters(model: LlamaForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tokens_per_second(model: LlamaForCausalLM, blocks: list[dict[str, Tensor]]) -> float:
    """Of the forward pass over one batch."""
    model.eval()
    tokens = next(batches(blocks))
    with torch.inference_mode():
        return tokens.numel() / median_seconds(lambda: model(input_ids=tokens))


def loss_costs(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, blocks: list[dict[str, Tensor]]
) -> dict[str, tuple[float, int]]:
    """Seconds and peak bytes of one loss, forward and backward, on a batch's own logits."""
    tokens = next(batches(blocks))
    with torch.no_grad():
        student_logits, teacher_logits = (
            model.eval()(input_ids=tokens).logits for model in (student, teacher)
        )
    student_logits.requires_grad_(True)
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)

    def fused() -> Tensor:
        return kdfast.kd_loss(
            student_logits, teacher_logits, labels, temperature=TEMPERATURE, alpha=ALPHA
        )

    def eager() -> Tensor:
        counted = labels != -100
        log_q = F.log_softmax(student_logits / TEMPERATURE, -1)
        log_p = F.log_softmax(teacher_logits / TEMPERATURE, -1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        soft = (divergence * counted).sum() / counted.sum()
        hard = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten())
        return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard

    torch.testing.assert_close(fused(), eager())

    def measure(loss: Callable[[], Tensor]) -> tuple[float, int]:
        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(), student_logits)

        return median_seconds(step, repeats=20), peak_bytes(step)

    return {"eager": measure(eager), "fused": measure(fused)}


def table(runs: list[Run], costs: dict[str, tuple[float, int]]) -> str:
    lines = [f"{'model':<20}{'parameters':>12}{'perplexity':>12}{'tokens/s':>12}"]
    for run in runs:
        name = run.name if run.name == "teacher" else f"student, {run.name}"
        lines.append(
            f"{name:<20}{count_parameters(run.model):>12,}"
            f"{run.perplexity:>12.1f}{run.tokens_per_second:>12,.0f}"
        )
    lines += ["", f"{f'loss, {BATCH}×{BLOCK}×{VOCAB}':<20}{'':>12}{'ms':>12}{'peak MB':>12}"]
    for name, (seconds, memory) in costs.items():
        label = "PyTorch" if name == "eager" else "kdfast"
        lines.append(f"{label:<20}{'':>12}{seconds * 1e3:>12.1f}{memory / 1e6:>12.0f}")
    return "\n".join(lines)


def teachers_table(distilled: Run, cached: Run, cache: TeacherCache, cache_seconds: float) -> str:
    """The teacher at hand beside what was kept of it."""
    headings = ("training s", "perplexity", "MB", "bytes/token")
    lines = [f"{'student towards':<20}" + "".join(f"{heading:>12}" for heading in headings)]
    for name, run, size in (
        ("the teacher", distilled, ("", "")),
        ("its cache", cached, (f"{cache.nbytes / 1e6:.1f}", f"{cache.bytes_per_token:.0f}")),
    ):
        lines.append(
            f"{name:<20}{run.training_seconds:>12.1f}{run.perplexity:>12.1f}"
            f"{size[0]:>12}{size[1]:>12}"
        )
    lines.append(f"the cache was filled once, in {cache_seconds:.1f} s")
    return "\n".join(lines)


def draw(runs: list[Run], costs: dict[str, tuple[float, int]], path: Path) -> None:
    teacher, alone, distilled = runs
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#9aa5b1",
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
        }
    )
    figure, axes = plt.subplot_mosaic(
        [["curve", "speed"], ["curve", "time"], ["curve", "memory"]],
        figsize=(11, 5.6),
        width_ratios=[1.35, 1],
        height_ratios=[3, 2, 2],
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(
        f"A student of {count_parameters(distilled.model) / 1e6:.2f} M parameters, "
        f"distilled from {count_parameters(teacher.model) / 1e6:.1f} M",
        x=0.015,
        ha="left",
        fontsize=14,
        fontweight="bold",
    )

    curve = axes["curve"]
    curve.axhline(teacher.perplexity, color=COLOURS["teacher"], linestyle="--", linewidth=1.5)
    curve.annotate(
        f"teacher {teacher.perplexity:.0f}",
        (0, teacher.perplexity),
        xytext=(4, -6),
        textcoords="offset points",
        va="top",
        color=COLOURS["teacher"],
    )
    for run in (alone, distilled):
        steps, perplexities = zip(*run.curve, strict=True)
        curve.plot(steps, perplexities, "o-", color=COLOURS[run.name], linewidth=2, markersize=5)
        curve.annotate(
            f"{run.name} {run.perplexity:.0f}",
            (steps[-1], perplexities[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[run.name],
            fontweight="bold",
        )
    curve.set_yscale("log")
    curve.set_ylim(bottom=0.88 * min(teacher.perplexity, distilled.perplexity))
    curve.yaxis.set_major_formatter(FormatStrFormatter("%d"))
    curve.yaxis.set_minor_formatter(FormatStrFormatter("%d"))
    curve.set_xlim(0, STUDENT_STEPS * 1.25)
    curve.set_xticks([step for step, _ in distilled.curve])
    curve.set_title("Held-out perplexity")
    curve.set_xlabel(f"training step of {BATCH}×{BLOCK} tokens")
    curve.grid(axis="y", which="both", color="#e4e8ec", linewidth=0.8)
    curve.set_axisbelow(True)

    names = [run.name for run in runs]
    bars(
        axes["speed"],
        "Inference, thousand tokens per second",
        names,
        [run.tokens_per_second / 1e3 for run in runs],
        [COLOURS[name] for name in names],
    )
    shape = f"Loss of {BATCH}×{BLOCK}×{VOCAB} logits"
    for key, title, index, scale in (
        ("time", f"{shape}: ms", 0, 1e3),
        ("memory", f"{shape}: peak MB", 1, 1e-6),
    ):
        values = [costs[name][index] * scale for name in ("eager", "fused")]
        bars(axes[key], title, ["PyTorch", "kdfast"], values, [COLOURS["eager"], COLOURS["fused"]])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(
    axes: plt.Axes, title: str, names: list[str], values: list[float], colours: list[str]
) -> None:
    drawn = axes.barh(names, values, color=colours, height=0.62)
    axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_title(title)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


if __name__ == "__main__":
    sys.exit(main())
