"""kdfast: the hot path of knowledge distillation, fused."""

from kdfast.capture import AttentionInputs, capture_attention
from kdfast.modules import (
    AttentionMSE,
    HiddenCosine,
    HiddenMSE,
    KDLoss,
    LinearKDLoss,
    LinearTopKKDLoss,
    TopKKDLoss,
)
from kdfast.ops.attention_mse import attention_mse
from kdfast.ops.hidden import hidden_cosine, hidden_mse
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.ops.linear_topk_kd_loss import linear_topk_kd_loss
from kdfast.ops.registry import available_backends, backend
from kdfast.ops.sampled_softmax import sampled_softmax
from kdfast.ops.topk_kd_loss import topk_kd_loss
from kdfast.ops.truncated_softmax import TruncatedSoftmax, truncated_softmax

__version__ = "0.1.0"

__all__ = [
    "AttentionInputs",
    "AttentionMSE",
    "HiddenCosine",
    "HiddenMSE",
    "KDLoss",
    "LinearKDLoss",
    "LinearTopKKDLoss",
    "TopKKDLoss",
    "TruncatedSoftmax",
    "attention_mse",
    "available_backends",
    "backend",
    "capture_attention",
    "hidden_cosine",
    "hidden_mse",
    "kd_loss",
    "linear_kd_loss",
    "linear_topk_kd_loss",
    "sampled_softmax",
    "topk_kd_loss",
    "truncated_softmax",
]
