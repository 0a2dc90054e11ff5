"""Terms that look inside the models: attention scores, hidden states, embeddings.

A term is a setting. `FeatureLoss` puts the terms of an objective to work on a student and a
teacher: it finds the layers, has both models show them while they run, and adds up the losses
inside the student's forward pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdfast.capture import AttentionInputs, attention_layers, capture_attention
from kdfast.ops.arguments import check_choice, check_flag, check_number
from kdfast.ops.attention_mse import METHODS, REDUCTIONS, attention_mse
from kdfast.ops.hidden import hidden_cosine, hidden_mse
from kdfast.trainer.projections import Projections

PROJECTIONS = ("auto", "each", "shared", "none")

# Under this name a loss leaves a student among its outputs.
LOSS = "feature_loss"

Pair = tuple[int, int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Features:
    """What a forward pass showed of a model's inside.

    Args:
        hidden: `[B, S, H]` each: the embeddings, and behind them every layer's output.
        attention: of the layers that were asked for, by number.
    """

    hidden: tuple[Tensor, ...]
    attention: dict[int, AttentionInputs]


@dataclass(frozen=True)
class _LayerTerm:
    """A sum over pairs of layers, a student's and a teacher's, numbered from 0.

    Args:
        weight: of the sum.
        layers: which teacher layer each student layer learns from, as {student: teacher}; negative
            numbers count from the end. None takes TinyBERT's uniform map: of N teacher and M
            student layers, layer i learns from ⌊(i + 1) · N / M⌋ − 1, so that the last learns from
            the last.
    """

    weight: float = 1.0
    layers: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)
        if self.layers is None:
            return
        if not isinstance(self.layers, Mapping):
            raise TypeError(
                f"layers must be a mapping {{student: teacher}}, got {type(self.layers).__name__}"
            )
        for number in (*self.layers, *self.layers.values()):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"layers must map whole numbers, got {number!r}")
        if not self.layers:
            raise ValueError("layers must name a layer, got an empty mapping")
        object.__setattr__(self, "layers", dict(self.layers))

    def pairs(self, student_layers: int, teacher_layers: int) -> list[Pair]:
        """The pairs of layers, of models with so many."""
        name = type(self).__name__
        if self.layers is None:
            if student_layers > teacher_layers:
                raise ValueError(
                    f"{name}: the student has {student_layers} layers and the teacher "
                    f"{teacher_layers}: pass layers, {{student: teacher}}"
                )
            return [
                (i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)
            ]
        pairs = []
        for pair in self.layers.items():
            numbers = []
            for owner, number, count in zip(
                ("student", "teacher"), pair, (student_layers, teacher_layers), strict=True
            ):
                if not -count <= number < count:
                    raise ValueError(
                        f"{name}: layers names layer {number} of the {owner}, which has {count} "
                        f"(0 to {count - 1})"
                    )
                numbers.append(number % count)
            pairs.append(tuple(numbers))
        twice = [student for student, _ in pairs]
        if len(set(twice)) < len(twice):
            raise ValueError(f"{name}: layers names a student layer twice, got {self.layers}")
        return sorted(pairs)


@dataclass(frozen=True)
class AttentionMSE(_LayerTerm):
    """The models' attention scores before the softmax, by `kdfast.attention_mse`.

    Args:
        weight, layers: the sum over layers, as {student: teacher}; None takes the uniform map.
        mask_queries: whether padding counts for nothing as a query too. As a key it never counts.
        reduction: "mean" over the cells that count, or "tinybert", which divides by all of them, as
            that paper's code does.
        head_map: `[H, H_t]` as nested sequences: how the teacher's heads are mixed for each head of
            the student. Needed where their numbers differ.
        method: of `kdfast.attention_mse`.
        allow_partial_scores: of `kdfast.capture_attention`: compare queries and keys of models
            whose scores have a softcap, sinks or a relative position bias besides.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> Objective([AttentionMSE(reduction="tinybert", mask_queries=False), HiddenMSE()])
    """

    mask_queries: bool = True
    reduction: str = "mean"
    head_map: Sequence[Sequence[float]] | None = None
    method: str = "auto"
    allow_partial_scores: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduction", self.reduction, [r for r in REDUCTIONS if r != "none"])
        check_choice("method", self.method, METHODS)
        check_flag("mask_queries", self.mask_queries)
        check_flag("allow_partial_scores", self.allow_partial_scores)
        if self.head_map is not None:
            try:
                rows = [len(row) for row in self.head_map]
            except TypeError:
                raise TypeError(
                    "head_map must be [student heads, teacher heads] as nested sequences, got "
                    f"{self.head_map!r:.60}"
                ) from None
            if not rows or len(set(rows)) > 1 or rows[0] == 0:
                raise ValueError(
                    f"head_map must be [student heads, teacher heads], got rows of lengths {rows}"
                )
            for row in self.head_map:
                for share in row:
                    check_number("head_map's entries", share, -math.inf)

    def check_heads(self, student: int, teacher: int) -> None:
        """That the models' numbers of heads fit each other, or `head_map`."""
        if self.head_map is None:
            if student != teacher:
                raise ValueError(
                    f"AttentionMSE: the student has {student} heads and the teacher {teacher}: "
                    f"pass head_map, [{student}, {teacher}]"
                )
        elif (len(self.head_map), len(self.head_map[0])) != (student, teacher):
            raise ValueError(
                f"head_map must be [{student}, {teacher}], the models' heads, got "
                f"[{len(self.head_map)}, {len(self.head_map[0])}]"
            )

    def loss(
        self,
        pairs: Sequence[Pair],
        student: Features,
        teacher: Features,
        mask: Tensor | None,
        projections: Projections,
    ) -> Tensor:
        """The sum over `pairs`; `mask` is `[B, S]` bool, True for tokens that are no padding."""
        losses, mixing = [], None
        if self.head_map is not None:
            # Copied to a GPU without waiting for what runs there.
            mixing = torch.tensor(self.head_map, dtype=torch.float32, device="cpu")
            device = student.attention[pairs[0][0]].query.device
            mixing = mixing.to(device, non_blocking=True)
        for pair in pairs:
            own, other = student.attention[pair[0]], teacher.attention[pair[1]]
            if own.causal != other.causal:
                raise ValueError(
                    f"AttentionMSE: layer {pair[0]} of the student is "
                    f"{'causal' if own.causal else 'not causal'}, unlike the teacher's {pair[1]}"
                )
            losses.append(
                attention_mse(
                    own.query,
                    own.key,
                    other.query,
                    other.key,
                    key_mask=mask,
                    query_mask=mask if self.mask_queries else None,
                    causal=own.causal,
                    student_scale=own.scale,
                    teacher_scale=other.scale,
                    head_map=mixing,
                    reduction=self.reduction,
                    method=self.method,
                )
            )
        return sum(losses)


@dataclass(frozen=True)
class HiddenMSE(_LayerTerm):
    """The outputs of the models' layers, by `kdfast.hidden_mse`.

    Args:
        weight, layers: the sum over layers, as {student: teacher}; None takes the uniform map.
        projection: a learned linear layer from the student's width to the teacher's, which trains
            with the student. "each" gives every layer its own, "shared" all layers of all terms
            that say so one together, "none" takes the outputs as they are, which needs equal
            widths. "auto" is "each" where the widths differ and "none" where they do not.
        mask: whether padding counts for nothing.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.
    """

    projection: str = "auto"
    mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("projection", self.projection, PROJECTIONS)
        check_flag("mask", self.mask)

    def projection_of(self, layer: int, widths: Pair) -> str | None:
        """The name of the projection of a student's layer, between two widths; None without."""
        kind = self.projection
        if kind == "auto":
            kind = "none" if widths[0] == widths[1] else "each"
        if kind == "none" and widths[0] != widths[1]:
            raise ValueError(
                f"{type(self).__name__}: projection must not be 'none' between a student of width "
                f"{widths[0]} and a teacher of width {widths[1]}"
            )
        return {"none": None, "shared": "shared", "each": f"{type(self).__name__}_{layer}"}[kind]

    def loss(
        self,
        pairs: Sequence[Pair],
        student: Features,
        teacher: Features,
        mask: Tensor | None,
        projections: Projections,
    ) -> Tensor:
        """The sum over `pairs`; `mask` is `[B, S]` bool, True for tokens that are no padding."""
        losses = []
        for pair in pairs:
            own, other = (
                features.hidden[self.position(layer)]
                for features, layer in zip((student, teacher), pair, strict=True)
            )
            name = self.projection_of(pair[0], (own.shape[-1], other.shape[-1]))
            weight, bias = (None, None) if name is None else projections[name]
            losses.append(
                hidden_mse(own, other, weight=weight, bias=bias, mask=mask if self.mask else None)
            )
        return sum(losses)

    def position(self, layer: int) -> int:
        """Where a layer's output stands among the hidden states: behind the embeddings."""
        return layer + 1


@dataclass(frozen=True)
class EmbeddingMSE(HiddenMSE):
    """The outputs of the models' embeddings, by `kdfast.hidden_mse`.

    Args:
        weight: of the term.
        layers: None: there is one pair.
        projection, mask: as of `HiddenMSE`.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            raise ValueError(f"layers is no setting of EmbeddingMSE, got {self.layers}")

    def pairs(self, student_layers: int, teacher_layers: int) -> list[Pair]:
        return [(0, 0)]

    def position(self, layer: int) -> int:
        return 0


@dataclass(frozen=True)
class HiddenCosine(_LayerTerm):
    """The directions of the outputs of the models' layers, by `kdfast.hidden_cosine`.

    Args:
        weight, layers: the sum over layers, as {student: teacher}; None takes the uniform map. The
            widths must be equal. DistilBERT has {-1: -1}.
        mask: whether padding counts for nothing.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.
    """

    mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("mask", self.mask)

    def loss(
        self,
        pairs: Sequence[Pair],
        student: Features,
        teacher: Features,
        mask: Tensor | None,
        projections: Projections,
    ) -> Tensor:
        """The sum over `pairs`; `mask` is `[B, S]` bool, True for tokens that are no padding."""
        return sum(
            hidden_cosine(
                student.hidden[own + 1], teacher.hidden[other + 1], mask=mask if self.mask else None
            )
            for own, other in pairs
        )


FeatureTerm = AttentionMSE | HiddenMSE | EmbeddingMSE | HiddenCosine

# What each term's part of the loss is called in logs.
LOSS_NAMES = {
    AttentionMSE: "attention_loss",
    HiddenMSE: "hidden_loss",
    EmbeddingMSE: "embedding_loss",
    HiddenCosine: "cosine_loss",
}


class FeatureLoss:
    """The feature terms of an objective, for one student and one teacher.

    Args:
        terms: the terms.
        student, teacher: models of transformers, as they stand in their wrappers.

    Attributes:
        projections: what the terms learn beside the student.

    Raises:
        ValueError: a model has no layers that could be looked at, a layer map is out of range,
            widths differ without a projection.
    """

    def __init__(
        self, terms: Sequence[FeatureTerm], student: nn.Module, teacher: nn.Module
    ) -> None:
        layers, widths, heads = zip(
            _sizes("student", student), _sizes("teacher", teacher), strict=True
        )
        self._pairs = [(term, term.pairs(*layers)) for term in terms]
        names = set()
        for term, pairs in self._pairs:
            if isinstance(term, AttentionMSE):
                term.check_heads(*heads)
                for owner, model, count in zip(
                    ("student", "teacher"), (student, teacher), layers, strict=True
                ):
                    _check_attention(owner, model, count)
            if isinstance(term, HiddenMSE):
                names |= {term.projection_of(layer, widths) for layer, _ in pairs}
            if isinstance(term, HiddenCosine) and widths[0] != widths[1]:
                raise ValueError(
                    f"HiddenCosine: student and teacher must have one width, got {widths}"
                )
        self.projections = Projections(sorted(names - {None}), *widths, _deviation(student))
        self._layers = tuple(
            sorted(
                {
                    pair[side]
                    for term, pairs in self._pairs
                    if isinstance(term, AttentionMSE)
                    for pair in pairs
                }
            )
            for side in (0, 1)
        )
        self._needs_hidden = not all(isinstance(term, AttentionMSE) for term in terms)
        self._partial = any(
            isinstance(term, AttentionMSE) and term.allow_partial_scores for term in terms
        )

    @property
    def inputs(self) -> dict[str, bool]:
        """What a model's forward is asked for."""
        return {"output_hidden_states": True} if self._needs_hidden else {}

    def of_teacher(
        self, model: nn.Module, forward: Callable[[], Result]
    ) -> tuple[Result, Features]:
        """What a run of `forward` returns, and what it showed of `model`, the teacher in it."""
        with self._shown("teacher", model) as shown:
            found = forward()
        return found, shown[0]

    @contextmanager
    def of_student(
        self, model: nn.Module, teacher: Features, mask: Tensor | None, *, alone: bool
    ) -> Iterator[dict[str, Tensor]]:
        """Adds the loss to what `model` returns, and fills a dict with the terms, detached.

        The loss leaves with the outputs, as `LOSS`, so that what wraps the model finds it there.

        Args:
            model: what is called by its outermost wrapper, or by nobody else.
            teacher: what the teacher showed of the same batch.
            mask: `[B, S]` bool, True for tokens that are no padding; None where all count.
            alone: whether the loss is all that the model has to return.
        """
        terms, losses = {}, []

        def compare(student: Features) -> None:
            terms.clear()
            total = 0
            for term, pairs in self._pairs:
                loss = term.loss(pairs, student, teacher, mask, self.projections)
                terms[LOSS_NAMES[type(term)]] = loss.detach()
                total = total + term.weight * loss
            losses[:] = [total]

        def attach(module: nn.Module, inputs: tuple, outputs: Mapping[str, Tensor]):
            return {**({} if alone else outputs), LOSS: losses[0]}

        # In front of hooks that are there, FSDP's, which are to see the loss; the one that compares
        # comes later, and in front of this one.
        hook = model.register_forward_hook(attach, prepend=True)
        try:
            with self._shown("student", model, compare):
                yield terms
        finally:
            hook.remove()

    @contextmanager
    def _shown(
        self, owner: str, model: nn.Module, then: Callable[[Features], None] | None = None
    ) -> Iterator[list[Features]]:
        """What `model` shows of its inside when it runs, in a list; `then` is called with it.

        That is within the model's own forward, where mixed precision is still at work, and the
        hidden states come out no further: at its end they would all be copied to float32.
        """
        side = 0 if owner == "student" else 1
        layers, shown = self._layers[side], []

        def look(module: nn.Module, inputs: tuple, outputs: object):
            if not isinstance(outputs, Mapping):
                raise TypeError(
                    f"the {owner} returns a {type(outputs).__name__}: the objective needs outputs "
                    "by name (return_dict=True)"
                )
            hidden = outputs.get("hidden_states")
            if hidden is None and self._needs_hidden:
                raise ValueError(
                    f"the outputs of the {owner} ({type(module).__name__}) have no hidden_states, "
                    "which the objective looks at"
                )
            # Layers run, and are recorded, in their order.
            numbered = dict(zip(layers, attention.values(), strict=True))
            shown[:] = [Features(hidden, numbered)]
            if then is not None:
                then(shown[0])
            return type(outputs)(**{k: v for k, v in outputs.items() if k != "hidden_states"})

        capture = nullcontext({})
        if layers:
            capture = capture_attention(model, layers, allow_partial_scores=self._partial)
        with capture as attention:
            hook = inner_model(model).register_forward_hook(look, prepend=True)
            try:
                yield shown
            finally:
                hook.remove()


def inner_model(model: nn.Module) -> nn.Module:
    """The model without its head, where it has one: what returns hidden states first."""
    model = without_adapter(model)
    return getattr(model, "base_model", model)


def without_adapter(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, whose own forward names no argument."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _sizes(owner: str, model: nn.Module) -> tuple[int, int, int]:
    """How many layers a model has, their width and their heads."""
    model = without_adapter(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"the {owner} ({type(model).__name__}) is an encoder and a decoder: attention and "
            "hidden states are compared between models of one stack"
        )
    config = _text_config(model)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    sizes = tuple(getattr(config, name, None) for name in names)
    for name, size in zip(names, sizes, strict=True):
        if not isinstance(size, int):
            raise ValueError(
                f"the {owner} ({type(model).__name__}) has no {name} in its configuration, which "
                "the objective's attention and hidden states are found by"
            )
    return sizes


def _text_config(model: nn.Module) -> object:
    config = getattr(without_adapter(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _check_attention(owner: str, model: nn.Module, layers: int) -> None:
    """That a layer's number is that of its attention."""
    found = len(attention_layers(model))
    if found != layers:
        raise ValueError(
            f"AttentionMSE: the {owner} ({type(without_adapter(model)).__name__}) has {layers} "
            f"layers and {found} attention modules: which belongs to which is not known. Where "
            "layers have none, several, or share one, call kdfast.attention_mse with what "
            "kdfast.capture_attention records"
        )


def _deviation(student: nn.Module) -> float:
    """The standard deviation of a fresh weight of the student."""
    deviation = getattr(_text_config(student), "initializer_range", None)
    return 0.02 if deviation is None else deviation
