"""kdfast: the hot path of knowledge distillation, fused."""

from kdfast.modules import KDLoss, LinearKDLoss
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.ops.registry import available_backends, backend

__version__ = "0.1.0"

__all__ = [
    "KDLoss",
    "LinearKDLoss",
    "available_backends",
    "backend",
    "kd_loss",
    "linear_kd_loss",
]
