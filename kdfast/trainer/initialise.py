"""A student's first weights, out of its teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.ops.arguments import check_count

# What DistilBERT calls BERT's weights, as the source's scripts/extract_distilbert.py has it. The
# order matters: "output.dense" is also the end of "attention.output.dense".
DISTILBERT_NAMES = {
    "encoder.layer": "transformer.layer",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
    "cls.predictions.decoder": "vocab_projector",
}

# Settings that change what a weight of the same shape means.
HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads", "decoder_attention_heads")


def spread_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layers that a shallower student starts from: evenly spaced, both ends included.

    Layer i of m takes layer i · (n − 1) / (m − 1) of n, rounded to the nearest, halves up. For 6 of
    12 this is DistilBERT's [0, 2, 4, 7, 9, 11]. A student of one layer takes the first.

    Args:
        student_layers, teacher_layers: how many layers each has.

    Raises:
        TypeError, ValueError: not whole numbers above 0, or a student with more layers than the
            teacher.

    Example:
        >>> spread_layers(4, 12)
        [0, 4, 7, 11]
    """
    check_count("student_layers", student_layers)
    check_count("teacher_layers", teacher_layers)
    if student_layers > teacher_layers:
        raise ValueError(
            f"the student must have at most the teacher's {teacher_layers} layers, "
            f"got {student_layers}"
        )
    last, gaps = teacher_layers - 1, max(student_layers - 1, 1)
    return [(2 * layer * last + gaps) // (2 * gaps) for layer in range(student_layers)]


def initialise_from_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """Copy a teacher's embeddings, some of its layers and its head into a student, in place.

    The student's layer i gets the teacher's layer `layers[i]`; every other weight, those of heads
    and poolers included, gets the teacher's weight of the same name. The two models are of one
    family, with or without a head, or a BERT and a DistilBERT (Sanh et al. 2019, section 3; the
    source's scripts/extract_distilbert.py). Sizes have to agree: nothing is truncated or widened.
    Tied weights stay tied. Either everything is copied or, after an error, nothing.

    Between BERT and DistilBERT go the word and position embeddings, the layers, the head of masked
    language models, and the classifiers of tokens and of answers. BERT's token types, its pooler,
    and the classifier of sequences that stands on it have no counterpart.

    Args:
        student: changed in place. It keeps its dtype and device.
        teacher: only read.
        layers: for each of the student's layers, in order, a layer of the teacher. Models with more
            than one stack of layers take a dict by the stack's name, say
            `{"decoder.layers": [0, 3, 5]}`. None, and a stack that the dict does not name, take
            `spread_layers`.

    Returns:
        The names of the student's weights that the teacher has no counterpart for. They are what
        they were.

    Raises:
        TypeError: a model that is not a `transformers.PreTrainedModel`, a layer that is not a whole
            number.
        ValueError: two families; weights whose shapes differ, naming the first of them and both
            shapes; other numbers of attention heads; layers that are out of range, repeated or too
            few or many; a student that ties weights which differ in the teacher.

    Example:
        >>> student = DistilBertForMaskedLM(DistilBertConfig(n_layers=6))
        >>> initialise_from_teacher(student, BertForMaskedLM.from_pretrained("teacher"))
        []
    """
    rename = _renaming(student, teacher)
    to, of = _Weights.of(student), _Weights.of(teacher, rename)
    chosen = _chosen_layers(layers, to.stacks, of.stacks)
    sources = _sources(to, of, chosen)
    _check_fit(sources, to, of)

    written = set()
    with torch.no_grad():
        for name, source in sources.items():
            to.tensors[name].copy_(of.tensors[source])
            written.add(id(to.tensors[name]))
    return [to.full[name] for name, tensor in to.tensors.items() if id(tensor) not in written]


@dataclass(frozen=True)
class _Weights:
    """A model's weights by the names that they have in the model without its head."""

    tensors: dict[str, Tensor]
    # The same names as the model itself has them.
    full: dict[str, str]
    # How many layers each outermost list of modules has.
    stacks: dict[str, int]

    @classmethod
    def of(cls, model: PreTrainedModel, rename: Callable[[str], str] = str) -> "_Weights":
        def bare(name: str) -> str:
            return rename(name.removeprefix(f"{model.base_model_prefix}."))

        stacks: dict[str, int] = {}
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{stack}.") for stack in stacks)
            if isinstance(module, nn.ModuleList) and len(module) and not inside:
                stacks[name] = len(module)
        # The variables themselves: a tied weight is one object under two names.
        tensors = model.state_dict(keep_vars=True)
        return cls(
            {bare(name): tensor for name, tensor in tensors.items()},
            {bare(name): name for name in tensors},
            {bare(name): count for name, count in stacks.items()},
        )

    def layer_of(self, name: str) -> tuple[str, int, str] | None:
        """The stack, the layer in it and the name in that, of a weight in a layer."""
        for stack in self.stacks:
            if name.startswith(f"{stack}."):
                index, _, rest = name.removeprefix(f"{stack}.").partition(".")
                return stack, int(index), rest
        return None


def _renaming(student: PreTrainedModel, teacher: PreTrainedModel) -> Callable[[str], str]:
    """What the student calls the teacher's weights."""
    for owner, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"{owner} must be a transformers.PreTrainedModel, got {type(model).__name__}"
            )
    if student is teacher:
        raise ValueError("student and teacher must be two models, got one")
    families = teacher.config.model_type, student.config.model_type
    if families[0] != families[1] and families != ("bert", "distilbert"):
        raise ValueError(
            "teacher and student must be of one family, or bert and distilbert, "
            f"got {families[0]} and {families[1]}"
        )
    for setting in HEAD_COUNTS:
        count = getattr(teacher.config, setting, None), getattr(student.config, setting, None)
        if None not in count and count[0] != count[1]:
            raise ValueError(
                f"{setting} is {count[0]} in the teacher and {count[1]} in the student: "
                "its weights would be cut into other heads"
            )
    if families[0] == families[1]:
        return str

    without_pooler = hasattr(student, "pre_classifier")

    def distilbert_name(name: str) -> str:
        if without_pooler and name.startswith("classifier."):
            # It reads the pooler's outputs, and DistilBERT's reads those of pre_classifier: a name
            # that no student has.
            return f"pooler.{name}"
        for theirs, ours in DISTILBERT_NAMES.items():
            name = name.replace(theirs, ours)
        return name

    return distilbert_name


def _chosen_layers(
    layers: Sequence[int] | Mapping[str, Sequence[int]] | None,
    student_stacks: dict[str, int],
    teacher_stacks: dict[str, int],
) -> dict[str, list[int]]:
    common = [stack for stack in student_stacks if stack in teacher_stacks]
    if not common:
        raise ValueError(
            "student and teacher have no stack of layers in common: "
            f"got {list(student_stacks)} and {list(teacher_stacks)}"
        )
    if layers is None:
        layers = {}
    elif not isinstance(layers, Mapping):
        if len(common) > 1:
            raise ValueError(
                f"layers must be a dict by stack for a model with {common}, "
                f"got a {type(layers).__name__}"
            )
        layers = {common[0]: layers}
    for stack in layers:
        if stack not in common:
            raise ValueError(f"layers must be of the stacks {common}, got {stack!r}")
    return {
        stack: _checked_layers(stack, layers[stack], student_stacks[stack], teacher_stacks[stack])
        if stack in layers
        else spread_layers(student_stacks[stack], teacher_stacks[stack])
        for stack in common
    }


def _checked_layers(
    stack: str, layers: Sequence[int], student_count: int, teacher_count: int
) -> list[int]:
    layers = list(layers)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers must hold whole numbers, got {type(layer).__name__}")
        if not 0 <= layer < teacher_count:
            raise ValueError(
                f"layers must be from 0 to {teacher_count - 1}, the teacher's last in {stack}, "
                f"got {layer}"
            )
        if layers.count(layer) > 1:
            raise ValueError(f"layers must not repeat, got {layer} {layers.count(layer)} times")
    if len(layers) != student_count:
        raise ValueError(
            f"layers must have an entry for each of the student's {student_count} layers in "
            f"{stack}, got {len(layers)}"
        )
    return layers


def _sources(to: _Weights, of: _Weights, chosen: dict[str, list[int]]) -> dict[str, str]:
    """For each of the student's weights that has one, the teacher's weight."""
    sources = {}
    for name in to.tensors:
        stack, index, rest = to.layer_of(name) or ("", 0, "")
        if stack not in chosen:
            if name in of.tensors:
                sources[name] = name
            continue
        layer = chosen[stack][index]
        source = f"{stack}.{layer}.{rest}"
        if source not in of.tensors and index == 0 and name in of.tensors:
            # T5 keeps in its first layer what belongs to the stack: the bias of positions.
            source = name
        if source not in of.tensors:
            raise ValueError(
                f"the student's {to.full[name]} has no counterpart in layer {layer} of the "
                f"teacher's {stack}"
            )
        sources[name] = source

    used = set(sources.values())
    for name in of.tensors:
        stack, index, _ = of.layer_of(name) or ("", 0, "")
        if index in chosen.get(stack, ()) and name not in used:
            layer = chosen[stack].index(index)
            raise ValueError(
                f"the teacher's {of.full[name]} has no counterpart in layer {layer} of the "
                f"student's {stack}"
            )
    return sources


def _check_fit(sources: dict[str, str], to: _Weights, of: _Weights) -> None:
    source_of: dict[int, str] = {}
    for name, source in sources.items():
        student, teacher = to.tensors[name], of.tensors[source]
        names = f"the student's {to.full[name]}", f"the teacher's {of.full[source]}"
        if student.shape != teacher.shape:
            raise ValueError(
                f"{names[0]} is {tuple(student.shape)} and {names[1]} is {tuple(teacher.shape)}: "
                "weights are neither truncated nor widened"
            )
        if student.is_floating_point() != teacher.is_floating_point():
            raise ValueError(
                f"{names[0]} is {student.dtype} and {names[1]} is {teacher.dtype}: "
                "quantised weights are not copied"
            )
        for owner, tensor in zip(names, (student, teacher), strict=True):
            if tensor.is_meta:
                raise ValueError(f"{owner} is on the meta device: it has no values")
        other = source_of.setdefault(id(student), source)
        if of.tensors[other] is not teacher and not torch.equal(of.tensors[other], teacher):
            raise ValueError(
                f"the student ties {to.full[name]} to another of its weights, and in the teacher "
                f"{of.full[other]} and {of.full[source]} differ: give the student's configuration "
                "tie_word_embeddings=False"
            )
