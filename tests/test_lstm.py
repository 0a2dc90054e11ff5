import copy
import pickle

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from kdfast.trainer import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
    DistillationTrainer,
    Logits,
    Objective,
    initialise_from_teacher,
    token_vectors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 41
CLASSES = 3
# The right lengths for the source's packing of one sentence: none is 0.
SENTENCES = [[5, 9, 2, 33], [7], [1, 0, 0, 4, 4, 40, 12], [8, 8]]
SECONDS = [[3], [11, 12, 13, 14, 15], [20, 21], [0, 0, 6]]


def bilstm(**settings: object) -> BiLSTMForSequenceClassification:
    sizes = {"vocab_size": VOCAB, "embedding_size": 6, "hidden_size": 5, "classifier_size": 7}
    config = BiLSTMConfig(**{**sizes, "num_labels": CLASSES, **settings})
    return BiLSTMForSequenceClassification(config).eval()


def padded(
    sentences: list[list[int]], side: str = "right", width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and mask; the padding is a token that sentences also hold."""
    width = width or max(map(len, sentences))
    tokens = torch.full((len(sentences), width), 4)
    mask = torch.zeros_like(tokens)
    for row, sentence in enumerate(sentences):
        place = slice(0, len(sentence)) if side == "right" else slice(width - len(sentence), width)
        tokens[row, place] = torch.tensor(sentence)
        mask[row, place] = 1
    return tokens, mask


def literal_states(model: BiLSTMForSequenceClassification, sentence: list[int]) -> Tensor:
    """bi_rnn.py on one sentence alone: no padding, so no packing."""
    tables = [model.embeddings]
    if model.config.embeddings == "multichannel":
        tables.append(model.frozen_embeddings)
    embedded = torch.cat([table(torch.tensor([sentence])) for table in tables], 2)
    width, hidden = embedded.shape[2], model.config.hidden_size
    lstm = nn.LSTM(width, hidden, 1, batch_first=True, bidirectional=True)
    lstm.load_state_dict(model.lstm.state_dict())
    outputs, _ = lstm(embedded)
    # The forward direction ends at the last token and the backward one at the first.
    return torch.cat([outputs[:, -1, :hidden], outputs[:, 0, hidden:]], 1)


def literal_logits(model: BiLSTMForSequenceClassification, states: Tensor) -> Tensor:
    hidden = (states @ model.hidden.weight.T + model.hidden.bias).clamp(min=0)
    return hidden @ model.classifier.weight.T + model.classifier.bias


def literal_sentence(model: BiLSTMForSequenceClassification, sentence: list[int]) -> Tensor:
    return literal_logits(model, literal_states(model, sentence))


def literal_pair(
    model: BiLSTMForSequenceClassification, first: list[int], second: list[int]
) -> Tensor:
    """Section 3.1 of the paper: f(h1, h2) = [h1, h2, h1 * h2, |h1 - h2|]."""
    one, two = literal_states(model, first), literal_states(model, second)
    return literal_logits(model, torch.cat([one, two, one * two, (one - two).abs()], 1))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("embeddings", ["trained", "frozen", "multichannel"])
def test_sentences_are_those_of_the_source_one_by_one(side, embeddings):
    model = bilstm(embeddings=embeddings)
    tokens, mask = padded(SENTENCES, side)
    expected = torch.cat([literal_sentence(model, sentence) for sentence in SENTENCES])
    torch.testing.assert_close(model(tokens, mask).logits, expected, atol=1e-6, rtol=1e-6)
    assert expected.std(0).min() > 1e-3


def pair_by_types() -> dict[str, Tensor]:
    joined = [first + second for first, second in zip(SENTENCES, SECONDS, strict=True)]
    tokens, mask = padded(joined)
    types = torch.zeros_like(tokens)
    for row, (first, second) in enumerate(zip(SENTENCES, SECONDS, strict=True)):
        types[row, len(first) : len(first) + len(second)] = 1
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}


def pair_by_inputs() -> dict[str, Tensor]:
    tokens, mask = padded(SENTENCES)
    seconds, second_mask = padded(SECONDS, "left")
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "second_input_ids": seconds,
        "second_attention_mask": second_mask,
    }


@pytest.mark.parametrize("inputs", [pair_by_types, pair_by_inputs])
def test_pairs_are_those_of_the_paper_one_by_one(inputs):
    model = bilstm(pairs=True)
    expected = torch.cat(
        [literal_pair(model, *pair) for pair in zip(SENTENCES, SECONDS, strict=True)]
    )
    torch.testing.assert_close(model(**inputs()).logits, expected, atol=1e-6, rtol=1e-6)


def test_gradients_are_those_of_the_source():
    model = bilstm(embeddings="multichannel", dropout=0.0)
    literal = copy.deepcopy(model)
    labels = torch.tensor([0, 2, 1, 1])
    tokens, mask = padded(SENTENCES, width=11)
    loss = model(tokens, mask, labels=labels).loss
    loss.backward()

    # The literal model goes through PyTorch's functions with its own parameters.
    class Alone(nn.Module):
        def forward(self, sentence: list[int]) -> Tensor:
            tokens = torch.tensor([sentence])
            tables = literal.embeddings(tokens), literal.frozen_embeddings(tokens)
            outputs, _ = literal.lstm(torch.cat(tables, 2))
            size = literal.config.hidden_size
            states = torch.cat([outputs[:, -1, :size], outputs[:, 0, size:]], 1)
            return literal_logits(literal, states)

    logits = torch.cat([Alone()(sentence) for sentence in SENTENCES])
    expected = nn.functional.cross_entropy(logits, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    gradients = dict(literal.named_parameters())
    for name, parameter in model.named_parameters():
        if name == "frozen_embeddings.weight":
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-7, rtol=1e-5)
        assert parameter.grad.abs().max() > 0


def test_padding_changes_no_bit():
    model = bilstm()
    expected = model(*padded(SENTENCES)).logits
    for side in ("right", "left"):
        assert torch.equal(model(*padded(SENTENCES, side, width=23)).logits, expected)
    tokens, mask = padded(SENTENCES, width=23)
    tokens[mask == 0] = 17
    assert torch.equal(model(tokens, mask.bool()).logits, expected)


def test_a_hole_in_the_mask_is_no_token():
    model = bilstm()
    tokens = torch.tensor([[5, 30, 9, 30, 2, 33]])
    mask = torch.tensor([[1, 0, 1, 0, 1, 1]])
    expected = model(torch.tensor([SENTENCES[0]])).logits
    assert torch.equal(model(tokens, mask).logits, expected)


def test_without_a_mask_every_token_counts():
    model = bilstm()
    torch.testing.assert_close(
        model(torch.tensor([SENTENCES[2]])).logits, literal_sentence(model, SENTENCES[2])
    )


def test_token_types_are_not_looked_at_without_pairs():
    model, inputs = bilstm(), pair_by_types()
    expected = model(inputs["input_ids"], inputs["attention_mask"]).logits
    assert torch.equal(model(**inputs).logits, expected)


def test_an_empty_batch_has_no_logits():
    assert bilstm()(torch.zeros(0, 4, dtype=torch.long)).logits.shape == (0, CLASSES)
    pairs = bilstm(pairs=True)
    nothing = torch.zeros(0, 4, dtype=torch.long)
    assert pairs(nothing, token_type_ids=nothing).logits.shape == (0, CLASSES)


def test_dropout_is_before_the_logits():
    model = bilstm(dropout=1.0)
    tokens, mask = padded(SENTENCES)
    dropped = model.train()(tokens, mask).logits
    torch.testing.assert_close(dropped, model.classifier.bias.expand_as(dropped))
    assert not torch.allclose(model.eval()(tokens, mask).logits, dropped)


def test_the_papers_student_has_the_papers_parameters():
    model = BiLSTMForSequenceClassification(BiLSTMConfig(embeddings="multichannel"))
    counted = sum(
        weight.numel() for name, weight in model.named_parameters() if "embeddings" not in name
    )
    # Table 3 of the paper: 0.96M, "excluding the embeddings".
    assert counted == 963_002
    assert model.config.hidden_size == 150
    assert model.config.classifier_size == 200
    assert 0.249 < model.embeddings.weight.abs().max() <= 0.25


@pytest.mark.parametrize("embeddings", ["trained", "frozen", "multichannel"])
def test_saved_and_loaded(tmp_path, embeddings):
    model = bilstm(embeddings=embeddings, pairs=True, dropout=0.3)
    model.save_pretrained(tmp_path)
    inputs = pair_by_types()
    for cls in (BiLSTMForSequenceClassification, AutoModelForSequenceClassification):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is BiLSTMForSequenceClassification
        settings = {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
        assert again.config.to_dict() == settings
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight)
        # Loaded weights may lie at addresses where products round in another order.
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
        trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
        assert trains == {name: weight.requires_grad for name, weight in again.named_parameters()}
        assert all(trains.values()) == (embeddings == "trained")
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BiLSTMConfig)
    _, info = BiLSTMForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


def test_other_classes_keep_the_rest_of_a_checkpoint(tmp_path):
    model = bilstm()
    model.save_pretrained(tmp_path)
    again = BiLSTMForSequenceClassification.from_pretrained(
        tmp_path, id2label={i: str(i) for i in range(5)}, ignore_mismatched_sizes=True
    )
    assert torch.equal(again.lstm.weight_hh_l0_reverse, model.lstm.weight_hh_l0_reverse)
    assert torch.equal(again.embeddings.weight, model.embeddings.weight)
    assert again.classifier.weight.shape == (5, 7)
    assert 0 < again.classifier.weight.abs().max() <= 7**-0.5


def test_pickled_and_copied():
    model = bilstm(embeddings="multichannel")
    tokens, mask = padded(SENTENCES)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(tokens, mask).logits, model(tokens, mask).logits)
        assert not again.frozen_embeddings.weight.requires_grad


def test_pretrained_embeddings():
    table = torch.randn(VOCAB, 6, dtype=torch.float64)
    model = bilstm(embeddings="multichannel")
    model.load_embeddings(table)
    assert torch.equal(model.embeddings.weight, table.float())
    assert torch.equal(model.frozen_embeddings.weight, table.float())
    assert model.get_input_embeddings() is model.embeddings
    assert model.embeddings.weight.requires_grad
    with pytest.raises(ValueError, match=r"\(41, 6\), got \(41, 8\)"):
        model.load_embeddings(torch.zeros(VOCAB, 8))
    with pytest.raises(TypeError, match=r"floating tensor, got torch\.int64"):
        model.load_embeddings(torch.zeros(VOCAB, 6, dtype=torch.long))
    with pytest.raises(TypeError, match="floating tensor, got list"):
        model.load_embeddings([])


def test_pretrained_embeddings_of_some_tokens():
    model = bilstm(embeddings="multichannel")
    drawn, table = model.embeddings.weight.detach().clone(), torch.randn(3, 6)
    model.load_embeddings(table, torch.tensor([7, 0, 40]))
    expected = drawn.clone()
    expected[[7, 0, 40]] = table
    assert not torch.equal(expected, drawn)
    # The others are the same in both channels too.
    assert torch.equal(model.embeddings.weight, expected)
    assert torch.equal(model.frozen_embeddings.weight, expected)
    with pytest.raises(ValueError, match=r"\[tokens, embedding_size\] \(2, 6\), got \(3, 6\)"):
        model.load_embeddings(table, torch.tensor([7, 0]))
    with pytest.raises(
        ValueError, match=r"tokens must be \[n\], from 0 to 40, got \(1,\), 41 to 41"
    ):
        model.load_embeddings(table[:1], torch.tensor([41]))
    with pytest.raises(TypeError, match="tokens must be a tensor of integers, got list"):
        model.load_embeddings(table, [7, 0, 40])
    assert torch.equal(model.embeddings.weight, expected)


def word_pieces() -> PreTrainedTokenizerFast:
    vocab = ["[PAD]", "[UNK]", "film", "Play", "##s", "s", "play"]
    core = Tokenizer(WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def bytes_pairs() -> PreTrainedTokenizerFast:
    # What GPT-2 has for "é", and a space in front of a word.
    vocab = {"<eos>": 0, "caf\u00c3\u00a9": 1, "\u0120Film": 2, "x": 3}
    core = Tokenizer(BPE(vocab, []))
    core.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # Its own word first, and then the one in lower case; no special token and no "##s".
        (word_pieces, {2: 1.0, 3: 2.0, 5: 3.0, 6: 2.0}),
        (bytes_pairs, {1: 5.0, 2: 6.0}),
    ],
)
def test_tokens_that_are_words_of_a_file(tmp_path, make, expected):
    path = tmp_path / "vectors.txt"
    path.write_text(
        "film 1 10\nplay 2 20\ns 3 30\n[PAD] 4 40\ncaf\u00e9 5 50\nFilm 6 60\n##s 7 70\n",
        encoding="utf-8",
    )
    tokens, vectors = token_vectors(make(), path)
    assert dict(zip(tokens.tolist(), vectors[:, 0].tolist(), strict=True)) == expected
    assert torch.equal(vectors[:, 1], 10 * vectors[:, 0])
    path.write_text("zebra 1\n")
    with pytest.raises(ValueError, match=r"vectors\.txt has a vector for none of the tokenizer's"):
        token_vectors(make(), path)


def test_regression_and_several_labels():
    tokens, mask = padded(SENTENCES)
    scores = torch.tensor([0.1, 2.0, -1.0, 0.5])
    model = bilstm(num_labels=1)
    outputs = model(tokens, mask, labels=scores)
    torch.testing.assert_close(outputs.loss, ((outputs.logits[:, 0] - scores) ** 2).mean())
    model = bilstm(problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    outputs = model(tokens, mask, labels=labels)
    expected = nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)


def test_half_precision_and_autocast():
    model = bilstm()
    tokens, mask = padded(SENTENCES)
    expected = model(tokens, mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model(tokens, mask).logits.float(), expected, atol=2e-2, rtol=2e-2
        )
    half = copy.deepcopy(model).bfloat16()(tokens, mask).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(VOCAB - 4))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_what_berts_tokenizer_gives(tokenizer):
    model = bilstm(pairs=True)
    firsts, seconds = ["w1 w2 w3", "w4"], ["w5", "w6 w7 w8 w9"]
    batch = tokenizer(firsts, seconds, padding=True, return_tensors="pt")
    rows = [
        [[2, 5, 6, 7, 3], [9, 3]],
        [[2, 8, 3], [10, 11, 12, 13, 3]],
    ]
    expected = torch.cat([literal_pair(model, *row) for row in rows])
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-6)


LARGER = {"embedding_size": 16, "hidden_size": 16}


def learnable(tokenizer: PreTrainedTokenizerFast, count: int) -> list[dict[str, object]]:
    """Sentences whose class is a word of theirs."""
    rows = []
    for i in range(count):
        others = torch.randint(10, VOCAB - 4, (2 + i % 5,)).tolist()
        words = [f"w{i % CLASSES}", *(f"w{word}" for word in others)]
        rows.append({**tokenizer(" ".join(words)), "labels": i % CLASSES})
    return rows


def arguments(tmp_path, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        str(tmp_path / "out"),
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        per_device_train_batch_size=8,
        **{"save_strategy": "no", "learning_rate": 2e-2, "logging_steps": 5, **settings},
    )


def test_it_learns_in_transformers_trainer(tmp_path, tokenizer):
    rows = learnable(tokenizer, 48)
    trainer = Trainer(
        bilstm(embeddings="multichannel", **LARGER),
        arguments(tmp_path, num_train_epochs=10, save_strategy="epoch", save_total_limit=1),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    frozen = trainer.model.frozen_embeddings.weight.clone()
    trainer.train()
    predicted = trainer.predict(rows)
    right = (predicted.predictions.argmax(1) == predicted.label_ids).mean()
    assert right > 0.9
    assert torch.equal(trainer.model.frozen_embeddings.weight, frozen)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    again = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert torch.equal(again.lstm.weight_ih_l0, trainer.model.lstm.weight_ih_l0)


@pytest.mark.parametrize("pairs", [False, True])
def test_it_learns_from_a_bert(tmp_path, tokenizer, pairs):
    rows = learnable(tokenizer, 16)
    if pairs:
        for row in rows:
            half = len(row["input_ids"]) // 2
            row["token_type_ids"] = [int(i >= half) for i in range(len(row["input_ids"]))]
    teacher = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=CLASSES,
            initializer_range=0.5,
        )
    )
    trainer = DistillationTrainer(
        bilstm(pairs=pairs, **LARGER),
        arguments(tmp_path, num_train_epochs=20),
        teacher=teacher,
        objective=Objective([Logits()]),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    losses = [entry["soft_loss"] for entry in trainer.state.log_history if "soft_loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_no_layers_go_from_a_bert_to_a_bilstm():
    teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **{"vocab_size": 9}))
    with pytest.raises(ValueError, match="got bert and kdfast-bilstm"):
        initialise_from_teacher(bilstm(), teacher)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": 1.5}, TypeError, "hidden_size must be a whole number, got float"),
        ({"dropout": 1.1}, ValueError, "dropout must be at least 0 and at most 1, got 1.1"),
        ({"embeddings": "static"}, ValueError, "embeddings must be one of .*, got 'static'"),
        ({"pairs": 1}, TypeError, "pairs must be True or False, got int"),
    ],
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        BiLSTMConfig(**settings)


TOKENS = torch.ones(2, 3, dtype=torch.long)
GAP = torch.tensor([[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    ("pairs", "inputs", "error", "message"),
    [
        (False, {"input_ids": [[1]]}, TypeError, "input_ids must be a tensor of integers, got lis"),
        (False, {"input_ids": TOKENS.float()}, TypeError, "integers, got torch.float32"),
        (False, {"input_ids": TOKENS[0]}, ValueError, r"\[batch, tokens\], got \(3,\)"),
        (
            False,
            {"input_ids": TOKENS, "attention_mask": TOKENS[:, :2]},
            ValueError,
            r"attention_mask must have the shape of its tokens \(2, 3\), got \(2, 2\)",
        ),
        (
            False,
            {"input_ids": TOKENS, "attention_mask": GAP},
            ValueError,
            "attention_mask must leave every sentence a token, got none in row 1",
        ),
        (
            False,
            {"input_ids": TOKENS, "second_input_ids": TOKENS},
            ValueError,
            "second_input_ids need a model with pairs=True",
        ),
        (True, {"input_ids": TOKENS}, ValueError, "needs token_type_ids or second_input_ids"),
        (
            True,
            {"input_ids": TOKENS, "token_type_ids": torch.tensor([[0, 1, 1], [0, 0, 0]])},
            ValueError,
            r"token_type_ids \(1\) must leave every sentence a token, got none in row 1",
        ),
        (
            True,
            {"input_ids": TOKENS, "token_type_ids": TOKENS[:1]},
            ValueError,
            r"token_type_ids must have the shape of its tokens \(2, 3\), got \(1, 3\)",
        ),
        (
            True,
            {"input_ids": TOKENS, "second_input_ids": TOKENS[:1]},
            ValueError,
            "second_input_ids must have the batch size of input_ids, 2, got 1",
        ),
    ],
)
def test_inputs_are_checked(pairs, inputs, error, message):
    with pytest.raises(error, match=message):
        bilstm(pairs=pairs)(**inputs)
