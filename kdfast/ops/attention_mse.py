"""Attention maps compared without being built: `attention_mse`.

Read from the bottom: the public function checks its arguments, the autograd function keeps the
gradients that the forward pass computed, the operator takes some samples at a time, and a method
sweeps over their tokens: by Gram matrices, or by tiles of scores.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import registry
from kdfast.ops.arguments import (
    check_choice,
    check_detached,
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    check_shape,
)
from kdfast.ops.gradient import (
    distinct,
    refuse_double_backward,
    save_for_backward,
    saved,
    scale_gradient,
)
from kdfast.ops.head import HALF, wide_dtype
from kdfast.ops.memory import fresh
from kdfast.ops.rows import Addresses, cpp_kernel
from kdfast.ops.score_rows import MappedRows, PairedRows

REDUCTIONS = ("mean", "tinybert", "sum", "none")
METHODS = ("auto", "gram", "tiled")

# What is at hand at a time, of rows or of scores: a CPU's should stay in its caches, a GPU wants
# enough to be busy.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}

# The largest tile of scores, in rows and in columns, and the tokens that Gram matrices take at a
# time: enough for a product to be fast, few enough for float32 to add them up. With a causal mask
# each span has a tile of its own, which is work besides.
TILE = 256
SPAN = 1024
CAUSAL_SPAN = 128

# The size of a tile in csrc/cpu/attention_mse.cpp.
CPP_TILE = 128

# A Gram loss is a small difference where the models agree, and has then lost its terms' rounding.
# From this share of its terms on, which leaves an error of 1e-4, `auto` sums in float64.
SMALLEST_SHARE = 1e4 * torch.finfo(torch.float32).eps / 2

Rows = PairedRows | MappedRows


class _Gradients(NamedTuple):
    """Where the gradients go, and what they are multiplied by: one factor, or one per sample."""

    query: Tensor | None
    key: Tensor | None
    factor: Tensor

    def wanted(self) -> bool:
        return self.query is not None or self.key is not None

    def write_query(self, samples: slice, tokens: slice, gradient: Tensor) -> None:
        """Take E K_s, `[samples, H, tokens, d]`."""
        self._write(self.query, samples, tokens, gradient)

    def write_key(self, samples: slice, tokens: slice, gradient: Tensor) -> None:
        """Take Eᵀ Q_s, `[samples, matrices, tokens, d]`: one or more matrices to a key head."""
        gradient = gradient.unflatten(1, (self.key.shape[1], -1))
        gradient = gradient.squeeze(2) if gradient.shape[2] == 1 else gradient.sum(2)
        self._write(self.key, samples, tokens, gradient)

    def _write(self, buffer: Tensor, samples: slice, tokens: slice, gradient: Tensor) -> None:
        factor = self.factor if self.factor.dim() == 0 else self.factor[samples, None, None, None]
        # Scaled in wide precision, and rounded as it is written.
        torch.mul(gradient, factor, out=buffer[samples, :, tokens])


def _spans(length: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _wide_sum(device: torch.device) -> torch.dtype:
    """What losses are summed in: float64, where the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _inner(query_gram: Tensor, key_gram: Tensor, rows: Rows, samples: int) -> Tensor:
    """⟨QᵀQ, KᵀK⟩ per sample, and of that the part that is no product of the two models: `[2, b]`.

    The second is what the first is a difference of.
    """
    wide = _wide_sum(query_gram.device)
    terms = query_gram[..., : rows.total_width].to(wide) * key_gram.to(wide)
    split = rows.student_keys(terms).shape[-1]
    own = terms[..., :split, :split].sum((1, 2)) + terms[..., split:, split:].sum((1, 2))
    return torch.stack([terms.sum((1, 2)), own]).view(2, samples, -1).sum(2)


def _squares(tile: Tensor) -> Tensor:
    """Σ E² per sample, in wide precision from the rows on."""
    return torch.linalg.vector_norm(tile, dim=-1).to(_wide_sum(tile.device)).square().sum((1, 2))


def _gram(rows: Rows, samples: slice, spans: list[slice], gradients: _Gradients) -> Tensor:
    """Σ E² = ⟨QᵀQ, KᵀK⟩ per sample and its scale, `[2, b]`; E K = Q (KᵀK) and Eᵀ Q = K (QᵀQ).

    Two sweeps over the tokens, one for the Gram matrices and one for the gradients.
    """
    query_gram = key_gram = None
    for tokens in spans:
        query_gram = _add_gram(query_gram, rows.queries(samples, tokens), rows)
        key_gram = _add_gram(key_gram, rows.keys(samples, tokens), rows)
    key_gram = rows.weighed(key_gram)
    sums = _inner(query_gram, key_gram, rows, samples.stop - samples.start)
    if not gradients.wanted():
        return sums

    by_query = rows.student_keys(key_gram).to(rows.dtype)
    by_key = rows.student_queries(rows.weighed(query_gram)).to(rows.dtype)
    # Backwards: the last tokens' rows are still at hand.
    for tokens in reversed(spans):
        length = tokens.stop - tokens.start
        if gradients.query is not None:
            product = rows.times(rows.queries(samples, tokens), by_query, length)
            gradients.write_query(samples, tokens, product)
        if gradients.key is not None:
            product = rows.times(rows.keys(samples, tokens), by_key, length)
            gradients.write_key(samples, tokens, product)
    return sums


def _add_gram(total: Tensor | None, part: Tensor, rows: Rows) -> Tensor:
    """total + QᵀQ or KᵀK of some rows, and the product with what stands beside Q behind it."""
    split, end = rows.student_keys(part).shape[-1], rows.total_width
    own, rest = part[..., :split], part[..., split:end]
    # It is symmetric: the product of the two models' parts is taken once.
    upper = torch.bmm(own.mT, part)
    lower = torch.cat([upper[..., split:end].mT, torch.bmm(rest.mT, part[..., split:])], dim=-1)
    gram = torch.cat([upper, lower], dim=-2)
    # float32 adds up a span. Over spans, its rounding would grow with the sequence.
    return gram if total is None else total.to(_wide_sum(gram.device)).add_(gram)


def _causal_gram(rows: Rows, samples: slice, spans: list[slice], gradients: _Gradients) -> Tensor:
    """The same where each query sees the keys up to its own.

    A span's queries meet the Gram matrix of the keys before it, and its keys that of the queries
    behind it; within the span scores are formed. One sweep forwards, one backwards.
    """
    sums, past, future = 0, None, None
    for tokens in spans:
        queries, keys = rows.queries(samples, tokens), rows.keys(samples, tokens)
        tile = rows.scores(queries, keys).tril_()
        squares = _squares(tile)
        sums = sums + torch.stack([squares, squares])
        by_query = rows.times_keys(tile, keys) if gradients.query is not None else None
        if past is not None:
            weighed = rows.weighed(past)
            query_gram = _add_gram(None, queries[..., : rows.total_width], rows)
            sums += _inner(query_gram, weighed, rows, len(squares))
            if by_query is not None:
                matrix = rows.student_keys(weighed).to(rows.dtype)
                by_query += rows.times(queries, matrix, tile.shape[2])
        if by_query is not None:
            gradients.write_query(samples, tokens, by_query)
        past = _add_gram(past, keys, rows)
    if gradients.key is None:
        return sums

    for tokens in reversed(spans):
        queries, keys = rows.queries(samples, tokens), rows.keys(samples, tokens)
        tile = rows.scores(queries, keys).tril_()
        by_key = rows.times_queries(tile, queries)
        if future is not None:
            matrix = rows.student_queries(rows.weighed(future)).to(rows.dtype)
            by_key += rows.times(keys, matrix, tile.shape[2])
        gradients.write_key(samples, tokens, by_key)
        future = _add_gram(future, queries, rows)
    return sums


def _tiled(
    rows: Rows, samples: slice, spans: list[slice], gradients: _Gradients, *, causal: bool
) -> Tensor:
    """Σ E² per sample, a tile of E at a time, and each tile's part of both gradients."""
    sums, by_keys = 0, {}
    for of_queries in spans:
        queries, by_query = rows.queries(samples, of_queries), None
        for of_keys in spans:
            if causal and of_keys.start >= of_queries.stop:
                break
            keys = rows.keys(samples, of_keys)
            tile = rows.scores(queries, keys)
            if causal and of_keys == of_queries:
                tile.tril_()
            sums = sums + _squares(tile)
            if gradients.query is not None:
                product = rows.times_keys(tile, keys)
                by_query = product if by_query is None else by_query.add_(product)
            if gradients.key is not None:
                product = rows.times_queries(tile, queries)
                at = of_keys.start
                by_keys[at] = product if at not in by_keys else by_keys[at].add_(product)
        if gradients.query is not None:
            gradients.write_query(samples, of_queries, by_query)
    if gradients.key is not None:
        for tokens in spans:
            gradients.write_key(samples, tokens, by_keys[tokens.start])
    return sums


def _matrix_products(
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    head_map: Tensor | None,
    gradients: _Gradients,
    *,
    causal: bool,
    ratio: float,
    method: str,
) -> Tensor:
    """Σ E² / a_s² of each sample, `[B]`, and the gradients."""
    count, _, length, _ = queries[0].shape
    device, dtype = queries[0].device, wide_dtype(queries[0].dtype, keys[0].dtype)
    sums = torch.zeros(count, dtype=_wide_sum(device), device=device)
    if length == 0:
        return sums
    layout = PairedRows if head_map is None else partial(MappedRows, head_map=head_map)
    settings = ratio, gradients.key is not None
    rows = layout(queries, keys, *masks, *settings, dtype)
    checked = method == "auto" and device.type == "cpu" and dtype == torch.float32
    if method == "auto":
        method = _cheaper(rows, length, causal, gradients.wanted())

    budget = BLOCK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    token_bytes = rows.bytes_per_token()
    if method == "tiled" or causal:
        size = min(length, TILE if method == "tiled" else CAUSAL_SPAN)
        token_bytes = max(token_bytes, rows.heads * size * dtype.itemsize)
    else:
        size = min(length, SPAN, max(TILE, budget // token_bytes))
    spans, precise = _spans(length, size), None
    for samples in _spans(count, max(1, budget // (size * token_bytes))):
        if method == "tiled":
            sums[samples] = _tiled(rows, samples, spans, gradients, causal=causal)
            continue
        gram = _causal_gram if causal else _gram
        found, scale = gram(rows, samples, spans, gradients)
        if checked and (found < SMALLEST_SHARE * scale).any():
            if precise is None:
                precise = layout(queries, keys, *masks, *settings, torch.float64)
            found, _ = gram(precise, samples, spans, gradients)
        sums[samples] = found.clamp_min(0)
    return sums


def _cheaper(rows: Rows, length: int, causal: bool, gradients: bool) -> str:
    tiled, gram = rows.operations(length, gradients)
    if causal:
        # Half the tiles, against one Gram matrix more and the tiles on the diagonal twice: at the
        # speed of products so small.
        gram = 1.5 * gram + 2 * tiled * min(1, CAUSAL_SPAN / length)
        tiled *= (1 + min(1, TILE / length)) / 2
    return "tiled" if tiled <= gram else "gram"


def _cpp(
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    head_map: Tensor | None,
    gradients: _Gradients,
    *,
    causal: bool,
    ratio: float,
    method: str,
) -> Tensor:
    """The same. With `head_map`, which makes all heads one large matrix, it is products after all.

    So it is where threads would have nothing to do, one of which takes a key head.
    """
    count, _, length, _ = queries[0].shape
    tasks = count * keys[0].shape[1]
    if head_map is not None or length == 0 or 2 * tasks < torch.get_num_threads():
        options = {"causal": causal, "ratio": ratio, "method": method}
        return _matrix_products(queries, keys, masks, head_map, gradients, **options)
    dtype = wide_dtype(queries[0].dtype, keys[0].dtype)
    checked = method == "auto" and dtype == torch.float32
    if method == "auto":
        rows = PairedRows(queries, keys, *masks, ratio, gradients.key is not None, dtype)
        tiled, gram = rows.operations(length, gradients.wanted())
        if causal:
            # Half the tiles, and those on the diagonal; measured, Gram matrices cost twice.
            tiled *= (1 + min(1, CPP_TILE / length)) / 2
            gram *= 2
        method = "tiled" if tiled <= gram else "gram"

    def sums_of(samples: slice, real: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = Addresses()
        count = samples.stop - samples.start
        sums = torch.empty(2, count, dtype=torch.float64, device="cpu")
        by_name = {
            "student_query": queries[0],
            "student_key": keys[0],
            "teacher_query": queries[1],
            "teacher_key": keys[1],
            "query_gradient": gradients.query,
            "key_gradient": gradients.key,
        }
        factor = gradients.factor
        cpp_kernel("attention_mse", real)(
            **{
                name: tensors.heads(None if tensor is None else tensor[samples])
                for name, tensor in by_name.items()
            },
            query_mask=tensors.mask(None if masks[0] is None else masks[0][samples]),
            key_mask=tensors.mask(None if masks[1] is None else masks[1][samples]),
            factor=tensors.per_row(factor[samples] if factor.dim() else factor, real),
            samples=sums.shape[1],
            tokens=length,
            student_width=queries[0].shape[-1],
            teacher_width=queries[1].shape[-1],
            ratio=ratio,
            causal=causal,
            tiled=method == "tiled",
            sums=sums.data_ptr(),
        )
        return sums.unbind()

    found, scale = sums_of(slice(0, count), dtype)
    if checked and method == "gram":
        for sample in (found < SMALLEST_SHARE * scale).nonzero().flatten().tolist():
            samples = slice(sample, sample + 1)
            found[samples] = sums_of(samples, torch.float64)[0]
    return found.clamp_min(0)


def _triton(
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    head_map: Tensor | None,
    gradients: _Gradients,
    *,
    causal: bool,
    ratio: float,
    method: str,
) -> Tensor:
    """The same. Three kinds of call stay matrix products: `head_map`, which makes all heads one
    large matrix; float64 on either side; and heads wider than a program holds.
    """
    from kdfast.kernels.attention_mse import WIDEST_HEAD, attention_mse_sums

    tensors = (*queries, *keys)
    options = {"causal": causal, "ratio": ratio, "method": method}
    if (
        head_map is not None
        or any(tensor.dtype == torch.float64 for tensor in tensors)
        or any(tensor.shape[-1] > WIDEST_HEAD for tensor in queries)
        or queries[0].numel() == 0
    ):
        return _matrix_products(queries, keys, masks, head_map, gradients, **options)

    def unit_stride(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(part if part.stride(-1) == 1 else part.contiguous() for part in pair)

    buffers = gradients.query, gradients.key
    return attention_mse_sums(
        unit_stride(queries), unit_stride(keys), *masks, buffers, gradients.factor, **options
    )


BACKENDS = {"cpp": _cpp, "triton": _triton, "torch": _matrix_products}


# How many calls ask for full precision now, and what was set before the first of them.
_asking = threading.Lock()
_full_precision_calls: dict[str, list] = {"cpu": [0, None], "cuda": [0, None]}


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 as float32: differences of scores do not survive TF32 or bfloat16.

    The setting is the process's. The first of several threads makes it, and the last puts back what
    was there.
    """
    cpu = device.type == "cpu"
    products = (torch.backends.mkldnn if cpu else torch.backends.cuda).matmul
    calls = _full_precision_calls["cpu" if cpu else "cuda"]
    with _asking:
        if calls[0] == 0:
            calls[1] = products.fp32_precision
            if calls[1] not in ("ieee", "none"):
                products.fp32_precision = "ieee"
        calls[0] += 1
    try:
        yield
    finally:
        with _asking:
            calls[0] -= 1
            if calls[0] == 0 and calls[1] not in ("ieee", "none"):
                # Where it came from the setting of all products, it goes on following that one.
                products.fp32_precision = "none"
                if products.fp32_precision != calls[1]:
                    products.fp32_precision = calls[1]


def _counted_cells(
    query: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, causal: bool
) -> Tensor | int:
    count, heads, length, _ = query.shape
    if query_mask is None and key_mask is None:
        return count * heads * (length * (length + 1) // 2 if causal else length**2)
    every = query.new_ones((), dtype=torch.int64).expand(count, length)
    query_mask, key_mask = (
        every if mask is None else mask.long() for mask in (query_mask, key_mask)
    )
    seen = key_mask.cumsum(1) if causal else key_mask.sum(1, keepdim=True)
    return heads * (query_mask * seen).sum()


# The loss is written into a buffer, like the gradients: torch.compile trips over an operator that
# writes to arguments and returns one tensor, where nobody takes it, as in a backward pass (2.13).
registry.library.define(
    "attention_mse_forward(Tensor student_query, Tensor student_key, Tensor teacher_query, "
    "Tensor teacher_key, Tensor? key_mask, Tensor? query_mask, Tensor? head_map, Tensor? incoming, "
    "Tensor(a!)? loss, Tensor(b!)? query_gradient, Tensor(c!)? key_gradient, *, bool causal, "
    "float? student_scale, float? teacher_scale, str reduction, str method) -> ()"
)


@torch.library.impl(registry.library, "attention_mse_forward", "CompositeExplicitAutograd")
def _attention_mse_forward(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    head_map: Tensor | None,
    incoming: Tensor | None,
    loss: Tensor | None,
    query_gradient: Tensor | None,
    key_gradient: Tensor | None,
    *,
    causal: bool,
    student_scale: float | None,
    teacher_scale: float | None,
    reduction: str,
    method: str,
) -> None:
    device, wide = student_query.device, wide_dtype(student_query.dtype, student_key.dtype)
    if student_scale is None:
        student_scale = student_query.shape[-1] ** -0.5
    if teacher_scale is None:
        teacher_scale = teacher_query.shape[-1] ** -0.5
    divisor = 1
    if reduction == "mean":
        divisor = _counted_cells(student_query, query_mask, key_mask, causal)
    elif reduction == "tinybert":
        divisor = student_query.shape[:3].numel() * student_query.shape[2]
    # No cell counts: 0 / 1.
    if isinstance(divisor, Tensor):
        divisor = divisor.to(_wide_sum(device)).clamp_min(1)
        factor = 2 * student_scale**2 / divisor
    else:
        divisor = max(1, divisor)
        # Filled in, where a copy from the host would wait for the device.
        factor = torch.full(
            (), 2 * student_scale**2 / divisor, dtype=_wide_sum(device), device=device
        )
    if incoming is not None:
        factor = factor * incoming

    products = registry.select("attention_mse", BACKENDS, student_query)
    with torch.autocast(device.type, enabled=False), _full_precision(device):
        sums = products(
            (student_query, teacher_query),
            (student_key, teacher_key),
            (query_mask, key_mask),
            head_map,
            _Gradients(query_gradient, key_gradient, factor.to(wide)),
            causal=causal,
            ratio=teacher_scale / student_scale,
            method=method,
        )
    if loss is not None:
        sums = student_scale**2 * sums
        loss.copy_(sums if reduction == "none" else sums.sum() / divisor)


@torch.library.register_fake("kdfast::attention_mse_forward", lib=registry.library)
def _(*args: object, **settings: object) -> None:
    return None


class _AttentionMSE(torch.autograd.Function):
    """Called with the operator's tensors up to `incoming`, and its settings."""

    @staticmethod
    def forward(ctx, settings, needed, *inputs):
        ctx.settings, ctx.needed = settings, needed
        # A half-precision gradient waits for the backward pass: it is rounded once, with the
        # incoming scale inside, which may be a loss scale of 65536.
        ctx.deferred = any(
            need and tensor.dtype in HALF for tensor, need in zip(inputs, needed, strict=False)
        )
        gradients = [None, None] if ctx.deferred else _gradient_buffers(inputs, needed)
        student_query, student_key = inputs[:2]
        shape = student_query.shape[:1] if settings["reduction"] == "none" else ()
        wide = wide_dtype(student_query.dtype, student_key.dtype)
        loss = student_query.new_empty(shape, dtype=wide)
        torch.ops.kdfast.attention_mse_forward(*inputs, None, loss, *gradients, **settings)
        save_for_backward(ctx, *(inputs if ctx.deferred else gradients))
        ctx.inputs = len(inputs)
        return loss

    @staticmethod
    def backward(ctx, incoming):
        refuse_double_backward("attention_mse")
        if ctx.deferred:
            inputs = saved(ctx)
            gradients = _gradient_buffers(inputs, ctx.needed)
            operator = torch.ops.kdfast.attention_mse_forward
            operator(*inputs, incoming, None, *gradients, **ctx.settings)
        else:
            gradients = [
                None if gradient is None else _scaled(gradient, incoming) for gradient in saved(ctx)
            ]
        return None, None, *gradients, *[None] * (ctx.inputs - 2)


def _tokens_first(tensor: Tensor) -> bool:
    """Whether a view `[B, H, S, d]` is of memory `[B, S, H, d]`, as a projection leaves it."""
    return tensor.stride(1) < tensor.stride(2)


def _gradient_buffers(inputs: tuple[Tensor, ...], needed: tuple[bool, bool]) -> list[Tensor | None]:
    """Buffers with the layout of the student's query and key, so that views of them are views."""
    return [
        _buffer_like(tensor) if need else None
        for tensor, need in zip(inputs[:2], needed, strict=True)
    ]


def _buffer_like(tensor: Tensor) -> Tensor:
    like = {"dtype": tensor.dtype, "device": tensor.device}
    if _tokens_first(tensor):
        return fresh(*tensor.transpose(1, 2).shape, **like).transpose(1, 2)
    return fresh(*tensor.shape, **like)


def _scaled(gradient: Tensor, incoming: Tensor) -> Tensor:
    """incoming · gradient, of one loss or of one per sample."""
    memory = gradient.transpose(1, 2) if _tokens_first(gradient) else gradient
    # A GPU takes row by row: one loss for all leaves it more rows than there are samples.
    scaled = scale_gradient(memory.flatten(1 if incoming.dim() else 2), incoming)
    scaled = scaled.view(memory.shape)
    return scaled.transpose(1, 2) if _tokens_first(gradient) else scaled


def attention_mse(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    head_map: Tensor | None = None,
    reduction: str = "mean",
    method: str = "auto",
) -> Tensor:
    """Mean squared error between two models' attention scores, in memory linear in the sequence.

    The scores are those before the softmax, as in Jiao et al. 2020, "TinyBERT", and neither map is
    built:

        E = student_scale · Q_s K_sᵀ − teacher_scale · Q_t K_tᵀ,   loss = Σ E² / count

    over the cells that count: those whose query and key are unmasked and, with `causal`, whose key
    does not stand behind the query.

    Args:
        student_query: `[B, H, S, d_s]`, float32, bfloat16, float16 or float64. A transposed view
            of a projection's output is taken as it is. Gradients go to `student_query` and
            `student_key`, to each if it requires grad.
        student_key: `[B, G, S, d_s]`, H a multiple of G: as in grouped-query attention, H / G
            consecutive query heads share a key head.
        teacher_query, teacher_key: `[B, H_t, S, d_t]` and `[B, G_t, S, d_t]`, on the same device;
            d_t, G_t and the dtypes may differ from the student's.
        key_mask, query_mask: `[B, S]`, bool, True where a token counts; its cells count for nothing
            otherwise, whatever it holds.
        causal: leave out the keys behind each query.
        student_scale, teacher_scale: above 0; None for d_s^-½ and d_t^-½.
        head_map: `[H, H_t]`, floating: student head h is compared with the sum over the teacher's
            heads j of head_map[h, j] times their scores. Needed where H and H_t differ. Where it
            only selects heads, `teacher_query[:, heads]` and the keys likewise are cheaper.
        reduction: "mean" over the counted cells of all heads and samples, "tinybert" for the
            divisor B · H · S · S of that paper's code, whatever is masked, "sum", or "none" for one
            sum per sample.
        method: "gram" forms no scores, in time linear in S: Σ E² = ⟨QᵀQ, KᵀK⟩ with the models' rows
            side by side. "tiled" forms tiles of them, in time quadratic in S, which is cheaper for
            short sequences. "auto" takes the cheaper and, on the CPU, repeats in float64 what
            float32 Gram matrices would lose near convergence. See docs/attention-mse.md.

    Returns:
        The loss, float32 (float64 for a float64 student), at least 0: 0-d, or `[B]` for
        reduction="none". No counted cell: 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> loss = kdfast.attention_mse(q_student, k_student, q_teacher, k_teacher, key_mask=mask)
        >>> loss.backward()
    """
    for name, tensor in (
        ("student_query", student_query),
        ("student_key", student_key),
        ("teacher_query", teacher_query),
        ("teacher_key", teacher_key),
    ):
        check_floating(name, tensor)
        check_same_device(name, tensor, student_query.device)
        if tensor.dim() != 4 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, channels], got {tuple(tensor.shape)}"
            )
    check_detached("teacher_query", teacher_query)
    check_detached("teacher_key", teacher_key)
    batch, heads, length, _ = student_query.shape
    _check_key("student", student_query, student_key)
    _check_key("teacher", teacher_query, teacher_key)
    if (teacher_query.shape[0], teacher_query.shape[2]) != (batch, length):
        raise ValueError(
            f"teacher_query must have the student's batch and tokens {(batch, length)}, "
            f"got {(teacher_query.shape[0], teacher_query.shape[2])}"
        )
    if head_map is None:
        if teacher_query.shape[1] != heads:
            raise ValueError(
                f"student_query has {heads} heads and teacher_query {teacher_query.shape[1]}: "
                f"pass head_map, [{heads}, {teacher_query.shape[1]}]"
            )
    else:
        check_floating("head_map", head_map)
        check_shape("head_map", head_map, (heads, teacher_query.shape[1]), "both models' heads")
        check_same_device("head_map", head_map, student_query.device)
        check_detached("head_map", head_map)
    for name, mask in (("key_mask", key_mask), ("query_mask", query_mask)):
        if mask is not None:
            _check_mask(name, mask, (batch, length), student_query.device)
    for name, scale in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
        if scale is not None:
            check_number(name, scale, 0, open_low=True)
    check_flag("causal", causal)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("method", method, METHODS)

    settings = {
        "causal": causal,
        "student_scale": None if student_scale is None else float(student_scale),
        "teacher_scale": None if teacher_scale is None else float(teacher_scale),
        "reduction": reduction,
        "method": method,
    }
    needed = tuple(
        torch.is_grad_enabled() and tensor.requires_grad for tensor in (student_query, student_key)
    )
    tensors = (student_query, student_key, teacher_query, teacher_key)
    tensors = distinct(*tensors, key_mask, query_mask, head_map)
    return _AttentionMSE.apply(settings, needed, *tensors)


def _check_key(owner: str, query: Tensor, key: Tensor) -> None:
    batch, heads, *tokens_and_channels = query.shape
    fits = key.shape[0] == batch and list(key.shape[2:]) == tokens_and_channels
    if not fits or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"{owner}_key must be {owner}_query's shape {tuple(query.shape)}, or have a number of "
            f"heads that divides {heads}, got {tuple(key.shape)}"
        )


def _check_mask(name: str, mask: Tensor, shape: tuple, device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, True where a token counts, got {mask.dtype}")
    check_shape(name, mask, shape, "the batch and the tokens")
    check_same_device(name, mask, device)
