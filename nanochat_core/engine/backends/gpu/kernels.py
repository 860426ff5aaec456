"""The kernels of a step on a GPU: paged attention, and the elementwise operations between matrix products.

The kernels are written in Triton. Importing this module needs Triton but no GPU. All sums are fp32, whatever the dtype
of weights, activations and cache. A token reads the keys and values of earlier tokens of its sequence; apart from them,
its result does not depend on the other tokens of the step. The order in which a token's sums are added depends only on
its position and on the kernel that computes the attention: :func:`attend_tokens` and :func:`attend_tiles` add in
different orders.
"""

import triton
import triton.language as tl


@triton.jit
def enter(x0, x, scale, embedding, smear, ids, previous_ids, scales, epsilon, dim, WIDTH: tl.constexpr):
    """Compute the embedding after the smear, and the first block's input. One program runs per token.

    :mod:`nanochat_core.model` explains the smear, and the scales of a block's input.

    Args:
        x0: (tokens, dim) receives the embedding.
        x: (tokens, dim) receives the first block's input.
        scale: (tokens,) fp32 receives 1 / sqrt(sum of squares of ``x`` + dim * epsilon).
        embedding: (rows, dim), normalized; the row after the last token id is zero.
        smear: (vocabulary, 1) factor of the previous token's embedding.
        ids, previous_ids: (tokens,) ids of each token and of the token before it.
        scales: (4,) fp32; the first two numbers are the residual scale and the skip scale of the first block.
        WIDTH: ``dim`` rounded up to a power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    there = columns < dim
    own = tl.load(ids + token).to(tl.int64)
    before = tl.load(previous_ids + token).to(tl.int64)
    row = tl.load(embedding + own * dim + columns, there, 0.0).to(tl.float32)
    row += tl.load(smear + own).to(tl.float32) * tl.load(embedding + before * dim + columns, there, 0.0).to(tl.float32)
    first = row.to(x0.dtype.element_ty)
    tl.store(x0 + token * dim + columns, first, there)
    _mix(x, scale, first.to(tl.float32), first.to(tl.float32), scales, epsilon, dim, token, WIDTH)


@triton.jit
def _mix(x, scale, row, first, scales, epsilon, dim, token, WIDTH: tl.constexpr):
    """Compute a block's input as a weighted sum of ``row`` and ``first``.

    Store it in ``x``, and the factor that normalizes it in ``scale``.
    """
    columns = tl.arange(0, WIDTH)
    mixed = (row * tl.load(scales) + first * tl.load(scales + 1)).to(x.dtype.element_ty)
    tl.store(x + token * dim + columns, mixed, columns < dim)
    rounded = mixed.to(tl.float32)
    tl.store(scale + token, 1 / tl.sqrt(tl.sum(rounded * rounded) + dim * epsilon))


@triton.jit
def prepare(
    qkv,
    queries,
    keys,
    values,
    value_table,
    ids,
    positions,
    slots,
    turns,
    scale,
    epsilon,
    value_gate_scale,
    columns,
    value_columns,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATED: tl.constexpr,
):
    """Rotate and normalize queries and keys; write keys and values to the cache. One program runs per token and head.

    Args:
        qkv: (tokens, columns) product with the weights of queries, keys, values and value gates, in this order. In
            queries and keys, the two channels of a rotated pair are adjacent.
        queries: (tokens, HEADS, HEAD_DIM) receives the queries.
        keys, values: (slots, KV_HEADS, HEAD_DIM), the cache; it receives the new keys and values.
        value_table: (vocabulary, value_columns) value embeddings of this layer; unused unless GATED.
        ids, positions, slots: (tokens,) id, position in the sequence, and cache slot of each token.
        turns: (context, HEAD_DIM / 2, 2) fp32 cosines and negative sines of the rotations.
        scale: (tokens,) as in :func:`enter`.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = qkv + token * columns
    if head < HEADS + KV_HEADS:
        pair = tl.arange(0, HEAD_DIM // 2)
        a = tl.load(row + head * HEAD_DIM + 2 * pair).to(tl.float32)
        b = tl.load(row + head * HEAD_DIM + 2 * pair + 1).to(tl.float32)
        turn = turns + tl.load(positions + token).to(tl.int64) * HEAD_DIM + 2 * pair
        cosine, sine = tl.load(turn), tl.load(turn + 1)
        first, second = a * cosine - b * sine, a * sine + b * cosine
        norm = 1 / tl.sqrt(tl.sum(first * first + second * second) + HEAD_DIM * epsilon)
        if head < HEADS:
            place = queries + (token * HEADS + head) * HEAD_DIM
        else:
            place = keys + (tl.load(slots + token).to(tl.int64) * KV_HEADS + head - HEADS) * HEAD_DIM
        tl.store(place + 2 * pair, (first * norm).to(queries.dtype.element_ty))
        tl.store(place + 2 * pair + 1, (second * norm).to(queries.dtype.element_ty))
    else:
        kv_head = head - HEADS - KV_HEADS
        channel = tl.arange(0, HEAD_DIM)
        normal = tl.load(scale + token)
        v = tl.load(row + head * HEAD_DIM + channel).to(tl.float32) * normal
        if GATED:
            gate = tl.load(row + (HEADS + 2 * KV_HEADS) * HEAD_DIM + kv_head).to(tl.float32) * normal
            added = value_table + tl.load(ids + token).to(tl.int64) * value_columns + kv_head * HEAD_DIM + channel
            v += value_gate_scale * tl.sigmoid(gate) * tl.load(added).to(tl.float32)
        place = values + (tl.load(slots + token).to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM
        tl.store(place + channel, v.to(values.dtype.element_ty))


@triton.jit
def attend_tokens(
    sums,
    highest,
    total,
    queries,
    keys,
    values,
    positions,
    rows,
    tables,
    table_stride,
    window,
    score_scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute attention of single tokens over one split of their keys, that is, SPLIT keys from ``split * SPLIT`` on.

    There is one program per token, head and split, so a few long sequences keep the whole device busy (flash decoding,
    Dao et al. 2023). :func:`combine` combines the splits of a token. A program stores nothing if its token does not see
    the split.

    Args:
        sums: (tokens, HEADS, splits, HEAD_DIM) fp32 receives the weighted sum of values, before the division by
            ``total``.
        highest: (tokens, HEADS, splits) fp32 receives the largest score.
        total: (tokens, HEADS, splits) fp32 receives the sum of the weights.
        queries: (tokens, HEADS, HEAD_DIM).
        keys, values: (blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).
        rows: (tokens,) row of each token's sequence in ``tables``.
        tables: block ids, one row per sequence.
        window: number of earlier tokens that a token sees.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions + token)
    first = tl.maximum(position - window, 0)
    begin = tl.maximum(split * SPLIT, first // TILE * TILE)
    end = tl.minimum((split + 1) * SPLIT, position + 1)
    if begin >= end:
        return
    channel = tl.arange(0, HEAD_DIM)
    q = tl.load(queries + (token * HEADS + head) * HEAD_DIM + channel).to(tl.float32) * score_scale
    table = tables + tl.load(rows + token).to(tl.int64) * table_stride
    kv_head = head // (HEADS // KV_HEADS)
    top = -float("inf")
    weight = 0.0
    mixed = tl.zeros([HEAD_DIM], tl.float32)
    for at in range(begin, end, TILE):
        key = at + tl.arange(0, TILE)
        seen = (key >= first) & (key <= position)
        block = tl.load(table + key // BLOCK_SIZE, seen, 0).to(tl.int64)
        slot = block * BLOCK_SIZE + key % BLOCK_SIZE
        place = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + channel[None, :]
        k = tl.load(keys + place, seen[:, None], 0.0).to(tl.float32)
        v = tl.load(values + place, seen[:, None], 0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * q[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(score))
        fade = tl.exp(top - higher)
        share = tl.exp(score - higher)
        weight = weight * fade + tl.sum(share)
        mixed = mixed * fade + tl.sum(share[:, None] * v, 0)
        top = higher
    place = (token * HEADS + head) * tl.num_programs(2) + split
    tl.store(sums + place * HEAD_DIM + channel, mixed)
    tl.store(highest + place, top)
    tl.store(total + place, weight)


@triton.jit
def combine(
    out,
    sums,
    highest,
    total,
    positions,
    window,
    splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Combine the results of :func:`attend_tokens` for the splits of each token. One program runs per token and head.

    Args:
        out: (tokens, HEADS, HEAD_DIM) receives the attention.
        splits: number of splits; MOST_SPLITS is this number rounded up to a power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + token)
    split = tl.arange(0, MOST_SPLITS)
    seen = (split >= tl.maximum(position - window, 0) // SPLIT) & (split <= position // SPLIT)
    channel = tl.arange(0, HEAD_DIM)
    place = (token * HEADS + head) * splits + split
    top = tl.load(highest + place, seen, -float("inf"))
    share = tl.exp(top - tl.max(top))
    weight = tl.sum(share * tl.load(total + place, seen, 0.0))
    rows = tl.load(sums + place[:, None] * HEAD_DIM + channel[None, :], seen[:, None], 0.0)
    y = tl.sum(share[:, None] * rows, 0) / weight
    tl.store(out + (token * HEADS + head) * HEAD_DIM + channel, y.to(out.dtype.element_ty))


@triton.jit
def attend_tiles(
    out,
    queries,
    keys,
    values,
    tiles,
    tables,
    table_stride,
    window,
    score_scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute attention of a tile: up to ROWS successive tokens of one sequence. One program runs per tile and head.

    The kernel reads TILE keys at a time and uses the running softmax of FlashAttention (arXiv 2205.14135).

    Args:
        out, queries: (tokens, HEADS, HEAD_DIM).
        keys, values: (blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).
        tiles: (tiles, 4) for each tile: the index of its first token in the step, its number of tokens, the first
            token's position in the sequence, and the sequence's row in ``tables``.
        window: number of earlier tokens that a token sees.
    """
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    token, count = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    start = tl.load(tile + 2)
    table = tables + tl.load(tile + 3).to(tl.int64) * table_stride
    kv_head = head // (HEADS // KV_HEADS)
    channel = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    position = start + row
    there = row < count
    place = ((token + row) * HEADS + head)[:, None] * HEAD_DIM + channel[None, :]
    q = tl.load(queries + place, there[:, None], 0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    last = start + count
    for at in range(tl.maximum(start - window, 0) // TILE * TILE, last, TILE):
        key = at + tl.arange(0, TILE)
        block = tl.load(table + key // BLOCK_SIZE, key < last, 0).to(tl.int64)
        slot = block * BLOCK_SIZE + key % BLOCK_SIZE
        cell = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + channel[None, :]
        # Blocks before the window may belong to another sequence by now, so they are not read.
        held = (key < last) & (key >= start - window)
        k = tl.load(keys + cell, held[:, None], 0.0)
        v = tl.load(values + cell, held[:, None], 0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        distance = position[:, None] - key[None, :]
        score = tl.where((distance >= 0) & (distance <= window), score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # If the row has seen no key yet, ``higher`` is -inf, and the subtractions below would give NaN.
        steady = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp(top - steady)
        share = tl.exp(score - steady[:, None])
        weight = weight * fade + tl.sum(share, 1)
        sums = sums * fade[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        top = higher
    y = sums / tl.where(there, weight, 1.0)[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), there[:, None])


@triton.jit
def relu_square(x, count, SIZE: tl.constexpr):
    """Replace each of ``count`` numbers by the square of its positive part."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    y = tl.maximum(tl.load(x + place, place < count, 0.0).to(tl.float32), 0.0)
    tl.store(x + place, (y * y).to(x.dtype.element_ty), place < count)


@triton.jit
def finish(x, y, kept, x0, scale, scales, epsilon, dim, WIDTH: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr):
    """Add the MLP's result to ``x``, and compute the next block's input. One program runs per token.

    The MLP's input was not normalized. The MLP squares its activations, so this kernel multiplies the MLP's result by
    the square of the norm's factor instead.

    Args:
        x: (tokens, dim) receives the next block's input, or this block's output if this block is the LAST.
        y: (tokens, dim) result of the MLP.
        kept: (tokens, dim) receives this block's output if KEEP is set.
        scale: (tokens,) as in :func:`enter`; unchanged in the LAST block.
        scales: (4,) fp32; the first two numbers are the residual scale and the skip scale of the next block.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    there = columns < dim
    place = token * dim + columns
    row = tl.load(x + place, there, 0.0).to(tl.float32)
    row += tl.load(y + place, there, 0.0).to(tl.float32) * (dim / (tl.sum(row * row) + dim * epsilon))
    rounded = row.to(x.dtype.element_ty)
    if KEEP:
        tl.store(kept + place, rounded, there)
    if LAST:
        tl.store(x + place, rounded, there)
    else:
        first = tl.load(x0 + place, there, 0.0).to(tl.float32)
        _mix(x, scale, rounded.to(tl.float32), first, scales, epsilon, dim, token, WIDTH)


@triton.jit
def leave(x, middle, scales, epsilon, dim, WIDTH: tl.constexpr):
    """Subtract a share of the middle block's output from ``x`` and normalize ``x`` in place.

    One program runs per token.

    Args:
        scales: (4,) fp32; the third number is the share.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    there = columns < dim
    place = token * dim + columns
    row = tl.load(x + place, there, 0.0).to(tl.float32)
    row -= tl.load(scales + 2) * tl.load(middle + place, there, 0.0).to(tl.float32)
    row = row.to(x.dtype.element_ty).to(tl.float32)
    row *= 1 / tl.sqrt(tl.sum(row * row) / dim + epsilon)
    tl.store(x + place, row.to(x.dtype.element_ty), there)


@triton.jit
def softcap(logits, raw, count, columns, raw_columns, cap, SIZE: tl.constexpr):
    """Compute ``cap * tanh(raw)`` of the first ``columns`` numbers of each row.

    Args:
        logits: (rows, columns) fp32.
        raw: (rows, raw_columns) logits before the softcap, divided by ``cap``.
        count: rows * columns.
    """
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = place < count
    x = tl.load(raw + place // columns * raw_columns + place % columns, there, 0.0).to(tl.float32)
    tl.store(logits + place, cap * (2 * tl.sigmoid(2 * x) - 1), there)
