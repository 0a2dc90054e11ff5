"""Rows of queries and keys whose products are the differences of two models' attention scores.

Student and teacher stand side by side, so that E = a_s · Q_s K_sᵀ − a_t · Q_t K_tᵀ is one product.
Both classes have the same methods; `attention_mse` sweeps over either. Everything is up to a_s: it
multiplies E, and ρ = a_t / a_s is inside.
"""

import math

import torch
from torch import Tensor


class _Rows:
    """What both layouts share: some samples and tokens of four tensors, copied to wide rows.

    Args:
        queries, keys: the student's and the teacher's, `[B, H, S, d]` and `[B, G, S, d]`.
        query_mask, key_mask: `[B, S]`, bool, or None; rows that do not count are 0.
        ratio: ρ.
        by_key: whether the gradient of the student's keys is wanted.
        dtype: of the rows.
    """

    def __init__(
        self,
        queries: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        query_mask: Tensor | None,
        key_mask: Tensor | None,
        ratio: float,
        by_key: bool,
        dtype: torch.dtype,
    ) -> None:
        self._sources = {"queries": (*queries, query_mask), "keys": (*keys, key_mask)}
        self.ratio, self.by_key, self.dtype = ratio, by_key, dtype
        self.heads, self.teacher_heads = (query.shape[1] for query in queries)
        self.width, self.teacher_width = (query.shape[-1] for query in queries)
        self._memory = {}
        self._held = {}

    def queries(self, samples: slice, tokens: slice) -> Tensor:
        """Q of some tokens of some samples, valid until other tokens' are asked for.

        Behind its `total_width` columns Q_s may follow, for `student_queries`.
        """
        return self._rows("queries", samples, tokens)

    def keys(self, samples: slice, tokens: slice) -> Tensor:
        """K of some tokens of some samples, valid until other tokens' are asked for."""
        return self._rows("keys", samples, tokens)

    def _rows(self, kind: str, samples: slice, tokens: slice) -> Tensor:
        # A sweep that fits into one block asks for the same rows twice.
        place, rows = self._held.get(kind, (None, None))
        if place != (samples, tokens):
            student, teacher, mask = self._sources[kind]
            rows = self._joined(kind, student[samples, :, tokens], teacher[samples, :, tokens])
            if mask is not None:
                # In place, and not a product: what does not count may be NaN.
                rows.masked_fill_(~self._like_rows(mask[samples, tokens]), 0)
            rows = self._as_matrices(rows)
            self._held[kind] = (samples, tokens), rows
        return rows

    def operations(self, length: int, gradients: bool) -> tuple[int, int]:
        """Of one sample by tiles and by Gram matrices, with or without both gradients."""
        return self.tiled_operations(length, gradients), self.gram_operations(length, gradients)

    def times(self, rows: Tensor, matrix: Tensor, tokens: int) -> Tensor:
        """Q or K · a matrix of their width, as `per_head` gives it."""
        return self.per_head(torch.matmul(rows[..., : self.total_width], matrix), tokens)

    def _fresh(self, kind: str, *shape: int) -> Tensor:
        """Memory of a call, used again for each block: fresh pages cost more than the copy."""
        size = math.prod(shape)
        memory = self._memory.get(kind)
        if memory is None or memory.numel() < size:
            memory = self._sources[kind][0].new_empty(size, dtype=self.dtype)
            self._memory[kind] = memory
        return memory[:size].view(shape)


class PairedRows(_Rows):
    """Head h of the student beside head h of the teacher: matrices of width D = d_s + d_t.

    Q = [Q_s, −ρ Q_t] and K = [K_s, K_t]. Where both heads have one size, Q = [Q_s − ρ Q_t, ρ Q_t]
    and K = [K_s, K_s − K_t]: the same product, but a student that is close to its teacher has small
    parts, where the first form has large ones that cancel. For Eᵀ Q_s, Q_s stands beside this Q:
    where the student is smaller than its teacher, the sum of Q's parts cancels.

    Query heads that share the key heads of both models are a group, and rows of one matrix: Q is
    `[samples · matrices, group · tokens, D]`, K `[samples · matrices, tokens, D]`.
    """

    def __init__(self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], *args) -> None:
        super().__init__(queries, keys, *args)
        self.group = math.gcd(*(self.heads // key.shape[1] for key in keys))
        self.matrices = self.heads // self.group
        self.total_width = self.width + self.teacher_width
        self.differences = self.width == self.teacher_width
        beside = self.width if self.differences and self.by_key else 0
        self._query_width = self.total_width + beside

    def bytes_per_token(self) -> int:
        queries, keys = self.heads * self._query_width, self.matrices * self.total_width
        return (queries + keys) * self.dtype.itemsize

    def gram_operations(self, length: int, gradients: bool) -> int:
        gram = self.width * self.total_width + self.teacher_width**2
        gradient = gradients * self.total_width * self.width
        beside = self.heads * self.total_width * (self._query_width - self.total_width)
        return 2 * length * ((self.heads + self.matrices) * (gram + gradient) + beside)

    def tiled_operations(self, length: int, gradients: bool) -> int:
        return 2 * length**2 * self.heads * (self.total_width + 2 * gradients * self.width)

    def _joined(self, kind: str, student: Tensor, teacher: Tensor) -> Tensor:
        count, _, length, _ = student.shape
        if kind == "queries":
            heads, width = self.heads, self._query_width
        else:
            heads, width = self.matrices, self.total_width
        rows = self._fresh(kind, count, heads, length, width)
        beside = width - self.total_width
        *parts, again = rows.split((self.width, self.teacher_width, beside), dim=-1)
        of_student, of_teacher = parts
        for part, source in zip(parts, (student, teacher), strict=True):
            part.unflatten(1, (source.shape[1], -1)).copy_(source.unsqueeze(2))
        if beside:
            again.copy_(of_student)
        if kind == "keys":
            if self.differences:
                torch.sub(of_student, of_teacher, out=of_teacher)
        elif self.differences:
            if self.ratio != 1:
                of_teacher.mul_(self.ratio)
            of_student.sub_(of_teacher)
        else:
            of_teacher.mul_(-self.ratio)
        return rows

    def _like_rows(self, mask: Tensor) -> Tensor:
        return mask[:, None, :, None]

    def _as_matrices(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0] * self.matrices, -1, rows.shape[-1])

    def weighed(self, gram: Tensor) -> Tensor:
        """Of KᵀK (QᵀQ), what Σ E² and Q's (K's) gradient multiply QᵀQ and Q (KᵀK and K) with."""
        return gram

    def student_keys(self, matrix: Tensor) -> Tensor:
        """From `matrix` · K to `matrix` · K_s."""
        return matrix[..., : self.width]

    def student_queries(self, matrix: Tensor) -> Tensor:
        """From `matrix` · Q, and what stands beside Q, to `matrix` · Q_s."""
        return matrix[..., -self.width :] if self.differences else matrix[..., : self.width]

    def per_head(self, rows: Tensor, tokens: int) -> Tensor:
        """From rows like Q's or K's, of the student's width, to `[samples, heads, tokens, d_s]`."""
        matrices = rows.shape[0]
        return rows.view(matrices // self.matrices, -1, tokens, self.width)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """E, `[samples, H_s, queries, keys]`."""
        tile = torch.bmm(queries[..., : self.total_width], keys.mT)
        shape = len(tile) // self.matrices, self.heads, -1, keys.shape[1]
        return tile.view(shape)

    def times_keys(self, tile: Tensor, keys: Tensor) -> Tensor:
        """E K_s, `[samples, H_s, queries, d_s]`."""
        product = torch.bmm(self._per_matrix(tile), self.student_keys(keys))
        return self.per_head(product, tile.shape[2])

    def times_queries(self, tile: Tensor, queries: Tensor) -> Tensor:
        """Eᵀ Q_s, `[samples, matrices, keys, d_s]`."""
        product = torch.bmm(self._per_matrix(tile).mT, self.student_queries(queries))
        return self.per_head(product, tile.shape[3])

    def _per_matrix(self, tile: Tensor) -> Tensor:
        samples, _, _, keys = tile.shape
        return tile.view(samples * self.matrices, -1, keys)


class MappedRows(_Rows):
    """Each head of the student beside a mixture of the teacher's: E_h = Σ_j map[h, j] · X_j Y_jᵀ.

    j counts the student's heads and then the teacher's, and map = [1, −ρ · head_map]. All heads'
    rows are one matrix per sample, Q and K `[samples, tokens, D]` with D = H_s d_s + H_t d_t; then
    Σ_h ‖E_h‖² = ⟨QᵀQ, Ω ∘ KᵀK⟩, where Ω has mapᵀ map's entry for each pair of heads. So mixing
    maps of scores is mixing blocks of Gram matrices.
    """

    def __init__(
        self,
        queries: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        *args,
        head_map: Tensor,
    ) -> None:
        super().__init__(queries, keys, *args)
        self.matrices = self.heads
        self.student_width = self.heads * self.width
        self.total_width = self.student_width + self.teacher_heads * self.teacher_width
        self.head_map = -self.ratio * head_map.to(self.dtype)
        mixing = torch.cat(
            [torch.eye(self.heads, dtype=self.dtype, device=head_map.device), self.head_map], dim=1
        )
        weights = mixing.mT @ mixing
        # Numbers of the host's: in a tensor they would be copied to a GPU, for which it is waited.
        for dim in (0, 1):
            student, teacher = weights.split((self.heads, self.teacher_heads), dim)
            student = student.repeat_interleave(self.width, dim)
            teacher = teacher.repeat_interleave(self.teacher_width, dim)
            weights = torch.cat([student, teacher], dim)
        self._weights = weights

    def bytes_per_token(self) -> int:
        return 2 * self.total_width * self.dtype.itemsize

    def gram_operations(self, length: int, gradients: bool) -> int:
        teacher_width = self.total_width - self.student_width
        gram = self.student_width * self.total_width + teacher_width**2
        return 4 * length * (gram + gradients * self.total_width * self.student_width)

    def tiled_operations(self, length: int, gradients: bool) -> int:
        width = self.total_width + self.heads * self.teacher_heads
        return 2 * length**2 * (width + 2 * gradients * self.student_width)

    def _joined(self, kind: str, student: Tensor, teacher: Tensor) -> Tensor:
        count, _, length, _ = student.shape
        rows = self._fresh(kind, count, length, self.total_width)
        parts = rows.split((self.student_width, self.total_width - self.student_width), dim=-1)
        for part, source in zip(parts, (student, teacher), strict=True):
            heads, width = source.shape[1], source.shape[-1]
            source = source.transpose(1, 2).unsqueeze(3)
            part.unflatten(-1, (heads, -1, width)).copy_(source)
        return rows

    def _like_rows(self, mask: Tensor) -> Tensor:
        return mask[:, :, None]

    def _as_matrices(self, rows: Tensor) -> Tensor:
        return rows

    def weighed(self, gram: Tensor) -> Tensor:
        return self._weights * gram

    def student_keys(self, matrix: Tensor) -> Tensor:
        return matrix[..., : self.student_width]

    student_queries = student_keys

    def per_head(self, rows: Tensor, tokens: int) -> Tensor:
        return rows.view(-1, tokens, self.heads, self.width).transpose(1, 2)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        student, teacher = (
            torch.matmul(query, key.mT)
            for query, key in zip(self._each_head(queries), self._each_head(keys), strict=True)
        )
        head_map = self.head_map.expand(len(student), -1, -1)
        tile = torch.baddbmm(student.flatten(2), head_map, teacher.flatten(2))
        return tile.view(student.shape)

    def _each_head(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = rows.tensor_split((self.student_width,), dim=-1)
        return (
            student.unflatten(-1, (self.heads, self.width)).transpose(1, 2),
            teacher.unflatten(-1, (self.teacher_heads, self.teacher_width)).transpose(1, 2),
        )

    def times_keys(self, tile: Tensor, keys: Tensor) -> Tensor:
        return torch.matmul(tile, self._each_head(keys)[0])

    def times_queries(self, tile: Tensor, queries: Tensor) -> Tensor:
        return torch.matmul(tile.mT, self._each_head(queries)[0])
