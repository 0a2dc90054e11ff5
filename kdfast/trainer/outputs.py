"""Logits, and the labels that they predict, of models for any task."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdfast.trainer.head import IGNORE_INDEX

# Question answering: a choice among the tokens for each end of the answer.
SPAN_LOGITS = ("start_logits", "end_logits")
SPAN_LABELS = ("start_positions", "end_positions")

# What the tokens of an encoder-decoder's logits are called among its inputs.
DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}


def logits_of(outputs: Mapping[str, Tensor] | tuple) -> Tensor:
    """`[B, C]` of classes, `[B, S, V]` of a class per token, `[B, 2, S]` of the ends of a span."""
    if not isinstance(outputs, Mapping):
        return outputs[0]
    if SPAN_LOGITS[0] in outputs:
        return torch.stack([outputs[name] for name in SPAN_LOGITS], 1)
    return outputs["logits"]


def pop_labels(inputs: dict[str, Tensor], *, shift: bool) -> Tensor | None:
    """The labels, taken out of `inputs`, aligned with the logits that predict them.

    Args:
        shift: whether position i's logits predict label i + 1, where the batch has no
            `shift_labels`.
    """
    spans = [inputs.pop(name, None) for name in SPAN_LABELS]
    if any(span is not None for span in spans):
        if any(span is None for span in spans):
            raise ValueError(f"the batch must have both of {SPAN_LABELS}, or none of them")
        length = inputs["input_ids"].shape[1]
        ends = torch.stack(spans, 1)
        # As models have it, an end that was cut off with the text counts for nothing.
        return ends.masked_fill((ends < 0) | (ends >= length), IGNORE_INDEX)
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shifted is not None or labels is None or not shift:
        return labels if shifted is None else shifted
    # The labels move rather than the logits, whose slice would have to be copied.
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
