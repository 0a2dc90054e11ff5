import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kdfast.trainer import initialise_from_teacher, spread_layers

VOCAB = 37
WIDTH = 8
TOKENS = torch.arange(1, 19).reshape(2, 9)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 2,
}


def bert(layers: int, cls: type = BertForMaskedLM, **settings: object) -> PreTrainedModel:
    sizes = {**SIZES, "num_hidden_layers": layers, "max_position_embeddings": 16}
    return scattered(cls(BertConfig(**{**sizes, **settings})))


def distilbert(
    layers: int, cls: type = DistilBertForMaskedLM, **settings: object
) -> PreTrainedModel:
    sizes = {"dim": WIDTH, "hidden_dim": 2 * WIDTH, "n_heads": 2, "max_position_embeddings": 16}
    config = DistilBertConfig(vocab_size=VOCAB, n_layers=layers, **{**sizes, **settings})
    return scattered(cls(config))


def scattered(model: PreTrainedModel) -> PreTrainedModel:
    """With no two weights alike: freshly made biases and norms are all zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


FAMILIES = {
    "bert": lambda layers: bert(layers),
    "bert-classifier": lambda layers: bert(layers, BertForSequenceClassification, num_labels=3),
    "distilbert": lambda layers: distilbert(layers),
    "roberta": lambda layers: scattered(
        RobertaForMaskedLM(
            RobertaConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=16)
        )
    ),
    "modernbert": lambda layers: scattered(
        ModernBertForMaskedLM(ModernBertConfig(**SIZES, num_hidden_layers=layers, pad_token_id=0))
    ),
    "gpt2": lambda layers: scattered(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=WIDTH,
                n_head=2,
                n_layer=layers,
                n_positions=16,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    ),
    "llama": lambda layers: scattered(
        LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=1))
    ),
    "qwen3": lambda layers: scattered(
        Qwen3ForCausalLM(
            Qwen3Config(**SIZES, num_hidden_layers=layers, num_key_value_heads=1, head_dim=4)
        )
    ),
    "gemma3": lambda layers: scattered(
        Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=1, head_dim=4)
        )
    ),
    "t5": lambda layers: t5(layers, layers),
    "bart": lambda layers: scattered(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=VOCAB,
                d_model=WIDTH,
                encoder_ffn_dim=WIDTH,
                decoder_ffn_dim=WIDTH,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_layers=layers,
                decoder_layers=layers,
                max_position_embeddings=16,
            )
        )
    ),
}


def t5(layers: int, decoder_layers: int) -> PreTrainedModel:
    return scattered(
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB,
                d_model=WIDTH,
                d_kv=4,
                d_ff=16,
                num_heads=2,
                num_layers=layers,
                num_decoder_layers=decoder_layers,
                decoder_start_token_id=0,
            )
        )
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    return model(**inputs).logits


def copies(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: PreTrainedModel, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_with_all_layers_is_the_teacher(family):
    teacher, student = FAMILIES[family](3), FAMILIES[family](3)
    before = copies(teacher)
    assert not torch.allclose(logits(student), logits(teacher))
    assert initialise_from_teacher(student, teacher) == []
    assert torch.equal(logits(student), logits(teacher))
    assert_unchanged(teacher, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallower_student_is_the_teacher_without_the_other_layers(family):
    teacher, student = FAMILIES[family](5), FAMILIES[family](3)
    initialise_from_teacher(student, teacher)
    for name, module in list(teacher.named_modules()):
        if isinstance(module, nn.ModuleList) and len(module) == 5:
            kept = nn.ModuleList(module[layer] for layer in (0, 2, 4))
            teacher.set_submodule(name, kept)
    names = teacher.state_dict().keys()
    assert names == student.state_dict().keys()
    assert_unchanged(student, teacher.state_dict())


def test_six_of_twelve_layers_are_distilberts():
    assert spread_layers(6, 12) == [0, 2, 4, 7, 9, 11]


@pytest.mark.parametrize("teacher_layers", range(1, 41))
def test_spread_layers_are_the_nearest_to_even_spacing(teacher_layers):
    for student_layers in range(1, teacher_layers + 1):
        layers = spread_layers(student_layers, teacher_layers)
        assert len(layers) == len(set(layers)) == student_layers
        assert layers == sorted(layers)
        assert layers[0] == 0
        if student_layers > 1:
            assert layers[-1] == teacher_layers - 1
            spacing = (teacher_layers - 1) / (student_layers - 1)
            assert all(abs(layer - i * spacing) <= 0.5 + 1e-9 for i, layer in enumerate(layers))


def literal_extract_distilbert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The source's scripts/extract_distilbert.py with --vocab_transform, weight by weight."""
    compressed = {}
    for w in ("word_embeddings", "position_embeddings"):
        compressed[f"distilbert.embeddings.{w}.weight"] = state_dict[f"bert.embeddings.{w}.weight"]
    for w in ("weight", "bias"):
        compressed[f"distilbert.embeddings.LayerNorm.{w}"] = state_dict[
            f"bert.embeddings.LayerNorm.{w}"
        ]
    for student_layer, teacher_layer in enumerate([0, 2, 4, 7, 9, 11]):
        to = f"distilbert.transformer.layer.{student_layer}"
        of = f"bert.encoder.layer.{teacher_layer}"
        for w in ("weight", "bias"):
            compressed[f"{to}.attention.q_lin.{w}"] = state_dict[f"{of}.attention.self.query.{w}"]
            compressed[f"{to}.attention.k_lin.{w}"] = state_dict[f"{of}.attention.self.key.{w}"]
            compressed[f"{to}.attention.v_lin.{w}"] = state_dict[f"{of}.attention.self.value.{w}"]
            compressed[f"{to}.attention.out_lin.{w}"] = state_dict[
                f"{of}.attention.output.dense.{w}"
            ]
            compressed[f"{to}.sa_layer_norm.{w}"] = state_dict[
                f"{of}.attention.output.LayerNorm.{w}"
            ]
            compressed[f"{to}.ffn.lin1.{w}"] = state_dict[f"{of}.intermediate.dense.{w}"]
            compressed[f"{to}.ffn.lin2.{w}"] = state_dict[f"{of}.output.dense.{w}"]
            compressed[f"{to}.output_layer_norm.{w}"] = state_dict[f"{of}.output.LayerNorm.{w}"]
    compressed["vocab_projector.weight"] = state_dict["cls.predictions.decoder.weight"]
    compressed["vocab_projector.bias"] = state_dict["cls.predictions.bias"]
    for w in ("weight", "bias"):
        compressed[f"vocab_transform.{w}"] = state_dict[f"cls.predictions.transform.dense.{w}"]
        compressed[f"vocab_layer_norm.{w}"] = state_dict[f"cls.predictions.transform.LayerNorm.{w}"]
    return compressed


def test_distilbert_from_bert_is_the_sources_script():
    teacher, student = bert(12), distilbert(6)
    expected = literal_extract_distilbert(teacher.state_dict())
    assert initialise_from_teacher(student, teacher) == []
    assert student.state_dict().keys() == expected.keys()
    assert_unchanged(student, expected)


def test_distilbert_with_all_layers_is_a_bert_without_token_types():
    teacher, student = bert(2), distilbert(2)
    nn.init.zeros_(teacher.bert.embeddings.token_type_embeddings.weight)
    initialise_from_teacher(student, teacher)
    torch.testing.assert_close(logits(student), logits(teacher), atol=1e-5, rtol=1e-5)


def test_the_classifier_of_tokens_goes_to_distilbert():
    teacher = bert(2, BertForTokenClassification, num_labels=3)
    student = distilbert(1, DistilBertForTokenClassification, num_labels=3)
    assert initialise_from_teacher(student, teacher) == []
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)


def test_the_classifier_behind_berts_pooler_does_not_go_to_distilbert():
    teacher = bert(2, BertForSequenceClassification, num_labels=3)
    student = distilbert(1, DistilBertForSequenceClassification, num_labels=3)
    before = copies(student)
    left = initialise_from_teacher(student, teacher)
    heads = [name for name in before if "classifier" in name]
    assert len(heads) == 4
    assert sorted(left) == sorted(heads)
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in heads)


def test_a_model_without_a_head_gives_and_takes_everything_else():
    teacher = bert(2, BertModel, add_pooling_layer=True)
    student = bert(2, BertForSequenceClassification)
    assert initialise_from_teacher(student, teacher) == ["classifier.weight", "classifier.bias"]
    again = bert(2, BertModel)
    assert initialise_from_teacher(again, student) == []
    assert_unchanged(again, teacher.state_dict())


def test_chosen_layers_and_their_order():
    teacher, student = bert(4), bert(2)
    initialise_from_teacher(student, teacher, [3, 1])
    for ours, theirs in ((0, 3), (1, 1)):
        assert_unchanged(
            student.bert.encoder.layer[ours], teacher.bert.encoder.layer[theirs].state_dict()
        )


def test_stacks_have_their_own_layers():
    teacher, student = t5(4, 4), t5(4, 2)
    initialise_from_teacher(student, teacher, {"decoder.block": [1, 2]})
    assert_unchanged(student.encoder, teacher.encoder.state_dict())
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    ours, theirs = student.decoder.block.state_dict(), teacher.decoder.block.state_dict()
    # The first layer's position bias serves all layers of its stack.
    assert torch.equal(ours.pop(f"0.{bias}"), theirs[f"0.{bias}"])
    for name, tensor in ours.items():
        layer, _, rest = name.partition(".")
        assert torch.equal(tensor, theirs[f"{int(layer) + 1}.{rest}"])


def test_dtype_and_training_settings_stay_the_students():
    teacher, student = bert(2).half(), bert(1).train()
    student.bert.embeddings.requires_grad_(False)
    initialise_from_teacher(student, teacher)
    assert student.training
    assert student.dtype == torch.float32
    assert not student.bert.embeddings.word_embeddings.weight.requires_grad
    assert student.bert.encoder.layer[0].output.dense.weight.requires_grad
    half = teacher.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(student.bert.encoder.layer[0].output.dense.weight, half.float())


def test_tied_weights_stay_tied():
    teacher, student = bert(1), bert(1)
    initialise_from_teacher(student, teacher)
    embeddings = student.bert.embeddings.word_embeddings.weight
    assert student.cls.predictions.decoder.weight is embeddings
    assert embeddings is not teacher.bert.embeddings.word_embeddings.weight


def test_an_untied_student_takes_both_copies():
    teacher, student = bert(1), bert(1, tie_word_embeddings=False)
    initialise_from_teacher(student, teacher)
    embeddings = student.bert.embeddings.word_embeddings.weight
    assert student.cls.predictions.decoder.weight is not embeddings
    assert torch.equal(logits(student), logits(teacher))


def test_a_tied_student_takes_an_untied_teacher_whose_weights_agree():
    teacher, student = bert(1, tie_word_embeddings=False), bert(1)
    with torch.no_grad():
        teacher.cls.predictions.decoder.weight.copy_(teacher.get_input_embeddings().weight)
        teacher.cls.predictions.decoder.bias.copy_(teacher.cls.predictions.bias)
    initialise_from_teacher(student, teacher)
    assert torch.equal(logits(student), logits(teacher))


REFUSED = {
    "hidden_size": (
        lambda: bert(1, hidden_size=4),
        r"student's bert.embeddings.word_embeddings.weight is \(37, 4\) and the teacher's "
        r"bert.embeddings.word_embeddings.weight is \(37, 8\)",
    ),
    "intermediate_size": (
        lambda: bert(1, intermediate_size=32),
        r"intermediate.dense.weight is \(32, 8\) and .* \(16, 8\): weights are neither truncated",
    ),
    "positions": (
        lambda: bert(1, max_position_embeddings=12),
        r"position_embeddings.weight is \(12, 8\) and .* \(16, 8\)",
    ),
    "width of a DistilBERT": (
        lambda: distilbert(1, dim=4),
        r"student's distilbert.embeddings.word_embeddings.weight is \(37, 4\) and .* \(37, 8\)",
    ),
    "heads": (
        lambda: bert(1, num_attention_heads=4),
        "num_attention_heads is 2 in the teacher and 4 in the student",
    ),
    "deeper": (lambda: bert(4), "at most the teacher's 3 layers, got 4"),
    "family": (FAMILIES["gpt2"], "one family, or bert and distilbert, got bert and gpt2"),
    "meta device": (lambda: bert(1).to("meta"), "is on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_copied_is_refused_and_nothing_changes(case):
    make, message = REFUSED[case]
    student = make(1) if case == "family" else make()
    before = None if student.device.type == "meta" else copies(student)
    with pytest.raises(ValueError, match=message):
        initialise_from_teacher(student, bert(3))
    if before is not None:
        assert_unchanged(student, before)


def test_a_tied_student_of_an_untied_teacher_is_refused():
    student = bert(1)
    before = copies(student)
    with pytest.raises(ValueError, match=r"ties .* tie_word_embeddings=False"):
        initialise_from_teacher(student, bert(1, tie_word_embeddings=False))
    assert_unchanged(student, before)


def test_layers_with_other_weights_are_refused():
    with_biases, without = (
        scattered(
            LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, attention_bias=biases))
        )
        for biases in (True, False)
    )
    with pytest.raises(ValueError, match=r"student's model.layers.0.*bias has no counterpart"):
        initialise_from_teacher(with_biases, without)
    with pytest.raises(ValueError, match=r"teacher's model.layers.0.*bias has no counterpart"):
        initialise_from_teacher(without, with_biases)


def test_quantised_weights_are_refused():
    teacher = bert(1)
    dense = teacher.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"is torch\.int8: quantised weights are not copied"):
        initialise_from_teacher(bert(1), teacher)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([0, 3], ValueError, "layers must be from 0 to 2, .* got 3"),
        ([0, -1], ValueError, "layers must be from 0 to 2, .* got -1"),
        ([1, 1], ValueError, "must not repeat, got 1 2 times"),
        ([0], ValueError, "each of the student's 2 layers in encoder.layer, got 1"),
        ([0, 1, 2], ValueError, "each of the student's 2 layers in encoder.layer, got 3"),
        ([0, 1.0], TypeError, "whole numbers, got float"),
        ([0, True], TypeError, "whole numbers, got bool"),
        ({"decoder": [0, 1]}, ValueError, r"of the stacks \['encoder.layer'\], got 'decoder'"),
    ],
)
def test_layers_are_checked(layers, error, message):
    with pytest.raises(error, match=message):
        initialise_from_teacher(bert(2), bert(3), layers)


def test_one_list_for_two_stacks_is_refused():
    with pytest.raises(
        ValueError, match=r"dict by stack .*'encoder.block', 'decoder.block'.* list"
    ):
        initialise_from_teacher(t5(1, 1), t5(2, 2), [0])


def test_models_are_checked():
    model = bert(1)
    with pytest.raises(ValueError, match="two models, got one"):
        initialise_from_teacher(model, model)
    with pytest.raises(TypeError, match=r"teacher must be a transformers\.PreTrainedModel, got L"):
        initialise_from_teacher(model, nn.Linear(2, 2))
