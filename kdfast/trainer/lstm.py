"""A bidirectional LSTM that classifies sentences or pairs of them: the student of Tang et al. 2019.

It is known to transformers' auto classes once `kdfast.trainer` is imported.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from kdfast.ops.arguments import INTEGER, check_choice, check_count, check_number
from kdfast.trainer.augmentation.word_vectors import read_vectors

EMBEDDINGS = ("trained", "frozen", "multichannel")


class BiLSTMConfig(PreTrainedConfig):
    """The sizes of a `BiLSTMForSequenceClassification`; the defaults are the source's for SST-2.

    Args:
        vocab_size: tokens of the tokenizer, which may be the teacher's.
        embedding_size: the width of one table of embeddings. 300 is that of word2vec and GloVe.
        hidden_size: of each of the two directions.
        classifier_size: of the layer between the LSTM and the logits.
        dropout: before the logits, in [0, 1]. The source has it for sentences and not for pairs.
        embeddings: `"trained"`; `"frozen"`, for pretrained ones; `"multichannel"`, which is a
            trained table beside a frozen one, twice as wide, as the paper has it.
        pairs: classify two sentences, read by the same LSTM.
        pad_token_id: kept for the tokenizer's sake: what counts is the attention mask.
        **kwargs: as for `transformers.PreTrainedConfig`: `num_labels`, `problem_type` and others.

    Raises:
        TypeError, ValueError: naming the setting, what came and what was expected.

    Example:
        >>> config = BiLSTMConfig(vocab_size=len(tokenizer), num_labels=3, pairs=True)
    """

    model_type = "kdfast-bilstm"

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 300,
        hidden_size: int = 150,
        classifier_size: int = 200,
        dropout: float = 0.1,
        embeddings: str = "trained",
        pairs: bool = False,
        pad_token_id: int | None = 0,
        **kwargs: object,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "classifier_size": classifier_size,
        }
        for name, size in sizes.items():
            check_count(name, size)
        check_number("dropout", dropout, 0, 1)
        check_choice("embeddings", embeddings, EMBEDDINGS)
        if not isinstance(pairs, bool):
            raise TypeError(f"pairs must be True or False, got {type(pairs).__name__}")
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.classifier_size = classifier_size
        self.dropout = dropout
        self.embeddings = embeddings
        self.pairs = pairs
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class BiLSTMForSequenceClassification(PreTrainedModel):
    """One bidirectional LSTM, its two last states, a hidden layer, and logits per class.

    Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks",
    section 3.1 and figure 1 (github.com/castorini/d-bert, bi_rnn.py and siamese_rnn.py). Of a
    sentence h = [h→, h←], the last state of each direction, [2 · hidden_size]. Of a pair
    f = [h1, h2, h1 · h2, |h1 − h2|], entry by entry, [8 · hidden_size]. Then
    W2 · dropout(relu(W1 · h + b1)) + b2.

    The LSTM reads the tokens that the attention mask names and no others, so padding changes
    nothing, on whichever side it stands. The tokens of a pair are told apart by `token_type_ids`,
    as BERT's tokenizer gives them, or come as two inputs.

    Args:
        config: a `BiLSTMConfig`. Weights are drawn as PyTorch's own layers draw them, embeddings
            evenly from −0.25 to 0.25, as in the source.

    Example:
        >>> student = BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=len(tokenizer)))
        >>> logits = student(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    """

    config_class = BiLSTMConfig
    base_model_prefix = ""
    _input_embed_layer = "embeddings"

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        tables = 2 if config.embeddings == "multichannel" else 1
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.frozen_embeddings = None
        if tables == 2:
            self.frozen_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(
            tables * config.embedding_size,
            config.hidden_size,
            batch_first=True,
            bidirectional=True,
        )
        states = (8 if config.pairs else 2) * config.hidden_size
        self.hidden = nn.Linear(states, config.classifier_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.classifier_size, config.num_labels)
        self.post_init()
        self._freeze()

    def _freeze(self) -> None:
        if self.config.embeddings == "frozen":
            self.embeddings.requires_grad_(False)
        elif self.frozen_embeddings is not None:
            self.frozen_embeddings.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object) -> "BiLSTMForSequenceClassification":
        """As of any `transformers.PreTrainedModel`."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading makes every weight a parameter that trains.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -0.25, 0.25)
        elif isinstance(module, (nn.Linear, nn.LSTM)):
            module.reset_parameters()

    @torch.no_grad()
    def load_embeddings(self, table: Tensor, tokens: Tensor | None = None) -> None:
        """Start from pretrained embeddings: in both tables, where there are two.

        Args:
            table: `[vocab_size, embedding_size]`, floating, row i for token i. A teacher's own are
                `teacher.get_input_embeddings().weight`.
            tokens: `[n]`, integers: the token of each row of a table `[n, embedding_size]`, as
                `token_vectors` finds them. The others stay as they were drawn, in both tables the
                same.

        Raises:
            TypeError, ValueError: not a floating tensor, or of another shape; tokens that are none.

        Example:
            >>> student.load_embeddings(teacher.get_input_embeddings().weight)
        """
        rows, size = self.embeddings.weight.shape
        if tokens is not None:
            if not isinstance(tokens, Tensor) or tokens.dtype not in INTEGER:
                got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
                raise TypeError(f"tokens must be a tensor of integers, got {got}")
            if tokens.dim() != 1 or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < rows):
                raise ValueError(
                    f"tokens must be [n], from 0 to {rows - 1}, got {tuple(tokens.shape)}"
                    + (f", {tokens.min()} to {tokens.max()}" if tokens.numel() else "")
                )
        if not isinstance(table, Tensor) or not table.is_floating_point():
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"table must be a floating tensor, got {got}")
        named = "vocab_size" if tokens is None else "tokens"
        expected = (rows if tokens is None else len(tokens), size)
        if table.shape != expected:
            raise ValueError(
                f"table must be [{named}, embedding_size] {expected}, got {tuple(table.shape)}"
            )
        weight = self.embeddings.weight
        weight[slice(None) if tokens is None else tokens.long()] = table.to(weight)
        if self.frozen_embeddings is not None:
            self.frozen_embeddings.weight.copy_(weight)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        second_input_ids: Tensor | None = None,
        second_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits, and with labels the loss of any sequence classifier in transformers.

        Args:
            input_ids: `[B, S]`, integers.
            attention_mask: `[B, S]`, 0 where a token is padding, wherever that stands. None: no
                padding.
            token_type_ids: `[B, S]`, 0 in a pair's first sentence and 1 in its second. Without
                `pairs` they are not looked at: the two are read as one.
            second_input_ids: `[B, S2]`, the second sentences, where they are an input of their own.
            second_attention_mask: `[B, S2]`.
            labels: `[B]` classes, or as `problem_type` wants them.

        Returns:
            `SequenceClassifierOutput` with `logits [B, num_labels]` and, with labels, `loss`.

        Raises:
            TypeError, ValueError: a shape or dtype that does not fit, a sentence without a token, a
                pair without a second sentence, a second sentence for a model without `pairs`.
        """
        first = _mask(input_ids, attention_mask, "input_ids", "attention_mask")
        if not self.config.pairs:
            if second_input_ids is not None:
                raise ValueError("second_input_ids need a model with pairs=True in its config")
            states = self._last_states(input_ids, first, "attention_mask")
        elif second_input_ids is None:
            if token_type_ids is None:
                raise ValueError("a model of pairs needs token_type_ids or second_input_ids")
            _check_like("token_type_ids", token_type_ids, input_ids)
            in_second = token_type_ids == 1
            states = _compared(
                self._last_states(input_ids, first & ~in_second, "token_type_ids (0)"),
                self._last_states(input_ids, first & in_second, "token_type_ids (1)"),
            )
        else:
            second = _mask(
                second_input_ids, second_attention_mask, "second_input_ids", "second_attention_mask"
            )
            if len(second) != len(first):
                raise ValueError(
                    f"second_input_ids must have the batch size of input_ids, {len(first)}, "
                    f"got {len(second)}"
                )
            states = _compared(
                self._last_states(input_ids, first, "attention_mask"),
                self._last_states(second_input_ids, second, "second_attention_mask"),
            )
        logits = self.classifier(self.dropout(torch.relu(self.hidden(states))))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _last_states(self, tokens: Tensor, mask: Tensor, masked_by: str) -> Tensor:
        """[h→, h←] of each row's unmasked tokens, `[B, 2 · hidden_size]`."""
        # Packing wants the lengths on the host, so they can be looked at.
        lengths = mask.sum(1).cpu()
        if len(lengths) and lengths.min() == 0:
            raise ValueError(
                f"{masked_by} must leave every sentence a token, "
                f"got none in row {int(lengths.argmin())}"
            )
        if not len(lengths):
            return self.hidden.weight.new_zeros(0, 2 * self.config.hidden_size)
        # The unmasked tokens first, in their order, wherever the padding stood.
        order = (~mask).int().argsort(dim=1, stable=True)[:, : int(lengths.max())]
        tokens = tokens.long().gather(1, order)
        inputs = self.embeddings(tokens)
        if self.frozen_embeddings is not None:
            inputs = torch.cat([inputs, self.frozen_embeddings(tokens)], -1)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return torch.cat([last[0], last[1]], -1)


def token_vectors(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> tuple[Tensor, Tensor]:
    """The tokens that are words of a file of word vectors, and these.

    A token is looked up as it is written in a text and then in lower case. Special tokens and
    pieces that continue a word (`##s`) have none.

    Args:
        tokenizer: of the student.
        path: GloVe's text format, UTF-8, or that of word2vec and fastText.

    Returns:
        `[n]` int64, the tokens, and `[n, dimension]` float32, their vectors.

    Raises:
        ValueError: naming the file, the line and what is wrong with it; no token that is there.

    Example:
        >>> tokens, vectors = token_vectors(tokenizer, "glove.6B.300d.txt")
        >>> student.load_embeddings(vectors, tokens)
    """
    special = set(tokenizer.all_special_ids)
    core = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    continuing = getattr(core, "continuing_subword_prefix", None)
    words = {
        # A token of bytes, or with a mark where a word begins, as text.
        row: tokenizer.convert_tokens_to_string([token]).strip()
        for token, row in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if row not in special and not (continuing and token.startswith(continuing))
    }
    names, vectors = read_vectors(path, only={*words.values(), *map(str.lower, words.values())})
    rows = {name: number for number, name in enumerate(names)}
    found = {
        token: rows[name]
        for token, word in words.items()
        for name in (word if word in rows else word.lower(),)
        if name in rows
    }
    if not found:
        raise ValueError(f"{path} has a vector for none of the tokenizer's {len(words)} words")
    chosen = vectors[list(found.values())]
    return torch.tensor(list(found)), torch.from_numpy(chosen)


def _compared(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second, first * second, (first - second).abs()], -1)


def _mask(tokens: Tensor, mask: Tensor | None, name: str, mask_name: str) -> Tensor:
    """Which tokens are real, `[B, S]` bool."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in INTEGER:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if tokens.dim() != 2:
        raise ValueError(f"{name} must be [batch, tokens], got {tuple(tokens.shape)}")
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    _check_like(mask_name, mask, tokens)
    return mask.bool()


def _check_like(name: str, tensor: Tensor, tokens: Tensor) -> None:
    if tensor.shape != tokens.shape:
        raise ValueError(
            f"{name} must have the shape of its tokens {tuple(tokens.shape)}, "
            f"got {tuple(tensor.shape)}"
        )


AutoConfig.register(BiLSTMConfig.model_type, BiLSTMConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    BiLSTMConfig, BiLSTMForSequenceClassification, exist_ok=True
)
