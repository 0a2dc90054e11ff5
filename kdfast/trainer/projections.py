"""Linear layers from a student's width to its teacher's, which train with the student."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdfast.ops.head import is_dtensor

FILE = "projections.safetensors"


class Projections(nn.Module):
    """Weights and biases, by name; `projections[name]` is a pair `[D_t, D_s]` and `[D_t]`.

    Its owner is a submodule of the student while it trains, so that whatever moves, wraps or
    optimises the student's parameters does so with these. But they are no part of the student: its
    state dict has none of them, and loading one looks for none.

    Args:
        names: of the projections.
        student_width, teacher_width: D_s and D_t.
        deviation: weights begin as normal noise of this standard deviation, biases at 0.
    """

    def __init__(
        self, names: Sequence[str], student_width: int, teacher_width: int, deviation: float
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in self.names:
            weight = torch.empty(teacher_width, student_width).normal_(0, deviation)
            self.register_parameter(f"{name}_weight", nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(teacher_width)))

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    def __len__(self) -> int:
        return len(self.names)

    def _save_to_state_dict(self, *args: object) -> None:
        pass

    def _load_from_state_dict(self, *args: object) -> None:
        pass

    def save(self, directory: str | Path, *, write: bool = True) -> None:
        """Writes them to `directory`, whole or not at all.

        Args:
            write: False on the processes that only take part in gathering what is sharded.
        """
        tensors = {
            name: (parameter.full_tensor() if is_dtensor(parameter) else parameter).detach().cpu()
            for name, parameter in self.named_parameters()
        }
        if write:
            path = Path(directory, FILE)
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            os.replace(partial, path)

    def fits(self, directory: str | Path) -> bool:
        """Whether `directory` holds projections of these names and sizes, for `load`.

        Raises:
            ValueError: what it holds is damaged.
        """
        path = Path(directory, FILE)
        return path.is_file() and _shapes_in(path) == self._shapes

    def load(self, directory: str | Path) -> None:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds other projections.
        """
        path = Path(directory, FILE)
        found, expected = _shapes_in(path), self._shapes
        if found != expected:
            raise ValueError(f"{path} holds {found}: the objective has {expected}")
        from torch.distributed.tensor import distribute_tensor

        tensors, own = load_file(path), dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in own.items():
                tensor = tensors[name].to(parameter.device)
                if is_dtensor(parameter):
                    tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
                parameter.copy_(tensor)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
