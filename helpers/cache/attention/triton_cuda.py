"""Packed attention on CUDA, compiled by Triton: the same sums as `reference`, in two launches a layer.

Split over the sequence (Flash-Decoding): a program of the first launch takes one piece of the tokens of one key/value
head, whatever their widths, and leaves its maximum, sums and weighted values; the second launch puts the pieces
together. What a launch needs to know of the buckets lies on the device in a table that is made anew only when the
store changes; nothing is read back. Its constants follow from arithmetic (below): none has been timed on a GPU.

Reading codes is bound by memory only while few instructions are spent on each number: at 4 bits about five on an
H100 and four on an H200. So codes are never put in order: byte `j` of a vector holds numbers `j` and `j + D/2` (at 4
bits), hence each bit field of the bytes is a plane of the vector, which meets its own plane of the query and its own
plane of the output. A field is masked but not shifted, the power of two it is too large by is taken from the query or
from the output, and it becomes a float by being written into the mantissa of 2^23. One query row a head is served by
multiply-adds, several by the tensor cores.
"""
# ruff: noqa: RUF005 (Triton does not unpack tuples inside tuples)

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from helpers.cache.layer import PackedStates
from helpers.cache.layout import Layout
from helpers.cache.quantization import FULL_WIDTH, WIDTHS
from helpers.cache.store import PackedStore
from helpers.cache.tokens import EMPTY

MAX_QUERIES = 32  # more new tokens at once than this are better served by dense attention
MAX_HEAD_DIM = 256
TILE = 64  # tokens that a program expands at a time for one query row and head_dim up to 64
SMALL_TILE = 32  # for others, so that registers suffice
MAX_PIECE = 1024  # tokens: a piece's result is then under 1% of the bytes that were read for it
PROGRAMS_PER_SM = 4  # least that keep enough bytes on their way to hide the memory's latency
WARPS = 4
STAGES_AHEAD = tl.constexpr(4)  # tiles that are on their way from memory
ROWS_PER_PROGRAM = 16  # query rows of one key/value head that share a tensor core tile
# Columns of a store's table, int64, one row a piece: how it is stored, where its slots lie, addresses of the fields.
_COLUMNS = (
    "stage", "ragged", "first", "stop", "start", "capacity", "pending_at",
    "key_codes", "key_scales", "value_codes", "value_scales", "token", "block_start", "received",
)  # fmt: skip


LAST_POSITION = 2**31 - 1
COLUMNS = tl.constexpr(len(_COLUMNS) + 2)  # a row is one line of the device's cache
STAGE, RAGGED, FIRST, STOP, START, CAPACITY, PENDING_AT = (tl.constexpr(i) for i in range(7))
KEY_CODES, KEY_SCALES, VALUE_CODES, VALUE_SCALES, TOKEN, BLOCK_START, RECEIVED = (tl.constexpr(i) for i in range(7, 14))
NO_TOKEN = tl.constexpr(EMPTY)
FULL = tl.constexpr(FULL_WIDTH)
STATS = tl.constexpr(4)  # maximum, sum, sum of squares and number of visible tokens, before a partial result
CHUNK = tl.constexpr(32)  # rows of a rotation that are multiplied at a time
PIECES_AT_ONCE = tl.constexpr(16)  # that are put together at a time
SLOTS_AT_ONCE = tl.constexpr(128)  # pending slots whose received attention is added at a time


LOG2E = tl.constexpr(1.4426950408889634)  # scores are exponents of 2


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Numbers that change from call to call: a kernel compiled for a special value of one would be compiled again and again.
_ATTEND_NUMBERS = [
    "key_head", "cells", "cell", "layer", "kv_heads", "groups", "queries", "committed", "tail", "piece_tokens",
    "pending", "scaling", "softcap", "hidden",
    "query_row", "query_head", "query_token", "keys_row", "keys_head", "values_row", "values_head",
    "mask_row", "mask_head", "mask_query", "mask_tokens",
]  # fmt: skip


_COMBINE_NUMBERS = ["layer", "kv_heads", "groups", "queries", "committed", "turned", "pieces", "pending"]


@triton.constexpr_function
def _alignment(size):
    """Bytes at which vectors of `size` bytes, one after another, can be relied on to start, up to 16."""
    return min(16, size & -size)


@triton.jit
def _load(base, token, stop, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Vectors of `WIDTH` entries, one a token, as `[tokens, PADDED]`; zeros beyond."""
    column = tl.arange(0, PADDED)
    inside = (token < stop)[:, None]
    if PADDED != WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(base + token[:, None] * WIDTH + column[None, :], mask=inside, other=0)


@triton.jit
def _plane(raw, BITS: tl.constexpr, plane: tl.constexpr):
    """Bit field number `plane` of bytes as float32, `2**(BITS * plane)` too large; at full width the numbers."""
    if BITS == FULL:
        result = raw.to(tl.float32)
    else:
        field = raw.to(tl.int32) & (((1 << BITS) - 1) << (BITS * plane))
        result = (field | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return result


@triton.jit
def _operand(raw, BITS: tl.constexpr, plane: tl.constexpr, TYPE: tl.constexpr):
    """As `_plane`, for tensor cores: in the type of the numbers, or where they are codes in `TYPE`."""
    result = raw if BITS == FULL else _plane(raw, BITS, plane).to(TYPE)
    return result


@triton.jit
def _scale_and_zero(pair, DOT: tl.constexpr):
    """Two float16 in 32 bits, one pair a token, as float32 `[tokens]`, or `[1, tokens]`."""
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    if DOT:
        scale = scale[None, :]
        zero = zero[None, :]
    return scale, zero


@triton.jit
def _dot(a, x, into):
    """`into + a x` on tensor cores, `a` float32: split into parts of `x`'s type, in which codes are exact."""
    if x.dtype == tl.float32:
        into = tl.dot(a, x, into, input_precision="tf32x3")
    else:
        PARTS: tl.constexpr = 2 if x.dtype == tl.float16 else 3
        # The interpreter multiplies bfloat16 as if it were the integers that hold its bits.
        EXACT: tl.constexpr = tl.float32 if INTERPRETED else x.dtype
        for _ in tl.static_range(PARTS):
            part = a.to(x.dtype)
            a -= part.to(tl.float32)
            into = tl.dot(part.to(EXACT), x.to(EXACT), into)
    return into


@triton.jit
def _plain_query(query, first, WIDTH: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr):
    """`WIDTH` entries of the query from `first` on, float32 `[PADDED]`, or of each row `[rows, PADDED]`.

    `query` points to entry 0 of the row, or of each row `[rows, 1]`.
    """
    column = tl.arange(0, PADDED)
    if DOT:
        entries = tl.load(query + first + column[None, :], mask=(column < WIDTH)[None, :], other=0)
    else:
        entries = tl.load(query + first + column, mask=column < WIDTH, other=0)
    return entries.to(tl.float32)


@triton.jit
def _turned_query(query, rotation, D: tl.constexpr, FIRST_ENTRY: tl.constexpr, WIDTH: tl.constexpr,
                  PADDED: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """As `_plain_query`, of the rotated query; `rotation` is transposed.

    So the sums run along its rows, and the arrangement of its numbers over threads is not forced on the codes.
    """
    column = tl.arange(0, PADDED)
    turned = tl.zeros([query.shape[0], PADDED], tl.float32) if DOT else tl.zeros([PADDED], tl.float32)
    for i in tl.static_range((D + CHUNK - 1) // CHUNK):
        entry = i * CHUNK + tl.arange(0, CHUNK)
        matrix = tl.load(
            rotation + (FIRST_ENTRY + column)[:, None] * D + entry[None, :],
            mask=(column < WIDTH)[:, None] & (entry < D)[None, :],
            other=0,
        )
        part = _plain_query(query, i * CHUNK, min(CHUNK, D - i * CHUNK), CHUNK, DOT)
        if DOT:
            turned = tl.dot(part, tl.trans(matrix), turned, input_precision="tf32x3")
        else:
            turned += tl.sum(part[None, :] * matrix, 1)
    return turned


@triton.jit
def _piece(
    keys, values, key_scales, value_scales, tokens, starts, ragged, first, stop,
    query, row, rotation, offsets, cell, mask, mask_tokens, mask_from, hidden, kept, pending_at, causal_from, factor,
    softcap, partial,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr, BOOL: tl.constexpr, DOT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Slots `first` to `stop` of one head: maximum, sums and weighted values of one query row or of several.

    `query`, `offsets`, `mask`, `kept`, `causal_from` and `partial` are of one row, or of each `[rows, 1]`; `row` says
    which of these exist. `offsets` is what the centre of each cell of `cell` tokens gives a row. One row keeps a
    maximum for each slot of a tile, so that threads meet only at the end.
    """
    KEY_PLANES: tl.constexpr = 8 // KEY_BITS if KEY_BITS != FULL else 1
    VALUE_PLANES: tl.constexpr = 8 // VALUE_BITS if VALUE_BITS != FULL else 1
    KEY_WIDTH: tl.constexpr = D // KEY_PLANES
    VALUE_WIDTH: tl.constexpr = DV // VALUE_PLANES
    LEAST: tl.constexpr = 16 if DOT else 1  # columns of a tensor core operand
    KEY_PADDED: tl.constexpr = max(LEAST, triton.next_power_of_2(KEY_WIDTH))
    VALUE_PADDED: tl.constexpr = max(LEAST, triton.next_power_of_2(VALUE_WIDTH))

    # The query in the planes of the codes, and the sum of its entries for the zeros.
    planes = ()
    if KEY_BITS == FULL:
        planes = planes + (_plain_query(query, 0, D, KEY_PADDED, DOT) * factor,)
    else:
        sums = 0.0
        for i in tl.static_range(KEY_PLANES):
            if rotation is None:
                plane = _plain_query(query, i * KEY_WIDTH, KEY_WIDTH, KEY_PADDED, DOT) * factor
            else:
                plane = _turned_query(query, rotation, D, i * KEY_WIDTH, KEY_WIDTH, KEY_PADDED, DOT) * factor
            sums += tl.sum(plane, -1)
            planes = planes + (plane * (1.0 / (1 << (KEY_BITS * i))),)
        if DOT:
            sums = sums[:, None]

    top = tl.full([query.shape[0]], float("-inf"), tl.float32) if DOT else tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros_like(top)
    squares = tl.zeros_like(top)
    seen = tl.zeros_like(top)
    shift = tl.zeros_like(top)
    sums_of_planes = ()
    for _ in tl.static_range(VALUE_PLANES):
        if DOT:
            sums_of_planes = sums_of_planes + (tl.zeros([query.shape[0], VALUE_PADDED], tl.float32),)
        else:
            sums_of_planes = sums_of_planes + (tl.zeros([TILE, VALUE_PADDED], tl.float32),)

    for at in tl.range(first, stop, TILE, num_stages=STAGES_AHEAD):
        slot = at + tl.arange(0, TILE)
        raw_keys = _load(keys, slot, stop, KEY_WIDTH, KEY_PADDED)
        raw_values = _load(values, slot, stop, VALUE_WIDTH, VALUE_PADDED)
        # Read as 32 bits because nothing smaller can be on its way while other tiles are worked on.
        if KEY_BITS != FULL:
            key_pair = tl.load(key_scales + slot, mask=slot < stop, other=0)
        if VALUE_BITS != FULL:
            value_pair = tl.load(value_scales + slot, mask=slot < stop, other=0)
        t = slot
        if DOT:
            t = slot[None, :]
        inside = t < stop
        known = inside & row if DOT else inside

        if DOT:
            scores = tl.zeros([query.shape[0], TILE], tl.float32)
            for i in tl.static_range(KEY_PLANES):
                x = _operand(raw_keys, KEY_BITS, i, tl.float16)
                scores = _dot(planes[i], tl.trans(x), scores)
        else:
            products = planes[0][None, :] * _plane(raw_keys, KEY_BITS, 0)
            for i in tl.static_range(1, KEY_PLANES):
                products += planes[i][None, :] * _plane(raw_keys, KEY_BITS, i)
            scores = tl.sum(products, 1)
        if KEY_BITS != FULL:
            scale, zero = _scale_and_zero(key_pair, DOT)
            scores = scores * scale + zero * sums
            if offsets is not None:
                place = tl.load(starts + t, mask=inside, other=0) // cell
                scores += tl.load(offsets + place, mask=known, other=0) * factor

        if CAPPED:  # softcap * tanh(scores / softcap), both in exponents of 2
            e = tl.exp2(tl.abs(scores) * (-2.0 * LOG2E / softcap))
            bent = softcap * (1.0 - e) / (1.0 + e)
            scores = tl.where(scores < 0, -bent, bent)

        visible = inside
        if TAIL:
            if mask is None:
                visible = visible & (t < causal_from)
            else:
                position = mask_from + t
        else:
            if mask is None:
                if ragged != 0:
                    visible = visible & (tl.load(tokens + t, mask=inside, other=NO_TOKEN) != NO_TOKEN)
            else:
                token = tl.load(tokens + t, mask=inside, other=NO_TOKEN)
                position = tl.load(starts + t, mask=inside, other=0) + token.to(tl.int32)
                visible = visible & (token != NO_TOKEN) & (position < mask_tokens)
        if mask is not None:
            bias = tl.load(mask + position, mask=visible & known, other=0)
            if BOOL:
                visible = visible & (bias != 0)
            else:
                bias = bias.to(tl.float32)
                visible = visible & (bias > hidden)
                scores += tl.where(visible, bias, 0.0) * LOG2E
        scores = tl.where(visible, scores, float("-inf"))
        if not TAIL and kept is not None:  # noqa: SIM102 (one is known at compile time, the other is not)
            if pending_at >= 0:
                tl.store(kept + (pending_at + t), scores, mask=known)

        highest = tl.maximum(top, tl.max(scores, 1)) if DOT else tl.maximum(top, scores)
        finite = tl.where(highest == float("-inf"), 0.0, highest)  # exp2(-inf - -inf) is not a number
        shrink = tl.exp2(top - finite)
        top = highest
        if DOT:
            weights = tl.exp2(scores - finite[:, None])
            total = total * shrink + tl.sum(weights, 1)
            squares = squares * shrink * shrink + tl.sum(weights * weights, 1)
            seen += tl.sum((scores > float("-inf")).to(tl.float32), 1)
        else:
            weights = tl.exp2(scores - finite)
            total = total * shrink + weights
            squares = squares * shrink * shrink + weights * weights
            seen += (scores > float("-inf")).to(tl.float32)
        if VALUE_BITS != FULL:
            scale, zero = _scale_and_zero(value_pair, DOT)
            shift = shift * shrink + tl.sum(weights * zero, 1) if DOT else shift * shrink + weights * zero
            weights = weights * scale
        grown = ()
        for i in tl.static_range(VALUE_PLANES):
            held = sums_of_planes[i] * shrink[:, None]
            if DOT:  # scales may be too small for float16
                grown = grown + (_dot(weights, _operand(raw_values, VALUE_BITS, i, tl.bfloat16), held),)
            else:
                grown = grown + (held + weights[:, None] * _plane(raw_values, VALUE_BITS, i),)
        sums_of_planes = grown

    if not DOT:
        highest = tl.max(top, 0)
        shrink = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
        top = highest
        total = tl.sum(total * shrink, 0)
        squares = tl.sum(squares * shrink * shrink, 0)
        seen = tl.sum(seen, 0)
        shift = tl.sum(shift * shrink, 0)
    column = tl.arange(0, VALUE_PADDED)
    for i in tl.static_range(VALUE_PLANES):
        at = STATS + i * VALUE_WIDTH + column
        result = sums_of_planes[i]
        if not DOT:
            result = tl.sum(result * shrink[:, None], 0)
        if VALUE_BITS != FULL:
            result = result * (1.0 / (1 << (VALUE_BITS * i)))
        if DOT:
            tl.store(partial + at[None, :], result + shift[:, None], mask=row & (column < VALUE_WIDTH)[None, :])
        else:
            tl.store(partial + at, result + shift, mask=column < VALUE_WIDTH)
    if DOT:
        tl.store(partial, top[:, None], mask=row)
        tl.store(partial + 1, total[:, None], mask=row)
        tl.store(partial + 2, squares[:, None], mask=row)
        tl.store(partial + 3, seen[:, None], mask=row)
    else:
        tl.store(partial, top)
        tl.store(partial + 1, total)
        tl.store(partial + 2, squares)
        tl.store(partial + 3, seen)


@triton.jit
def _field(table, column, vector, TYPE: tl.constexpr, NUMBERS: tl.constexpr):
    """Pointer to vector number `vector`, of `NUMBERS` numbers each, of a field whose address is in the table."""
    ALIGNED: tl.constexpr = _alignment(NUMBERS * TYPE.primitive_bitwidth // 8)
    return tl.multiple_of(tl.load(table + column).to(tl.pointer_type(TYPE)) + vector * NUMBERS, ALIGNED)


@triton.jit
def _stored_piece(
    table, layer, head, b, query, row, rotation, offsets, cell, mask, mask_tokens, hidden, scores, factor, softcap,
    partial,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr,
    FULL_TYPE: tl.constexpr, BOOL: tl.constexpr, DOT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """`_piece` of packed tokens: the piece that a row of the table describes."""
    KEY_TYPE: tl.constexpr = FULL_TYPE if KEY_BITS == FULL else tl.uint8
    VALUE_TYPE: tl.constexpr = FULL_TYPE if VALUE_BITS == FULL else tl.uint8
    KEY_NUMBERS: tl.constexpr = D if KEY_BITS == FULL else D * KEY_BITS // 8
    VALUE_NUMBERS: tl.constexpr = DV if VALUE_BITS == FULL else DV * VALUE_BITS // 8
    capacity = tl.load(table + CAPACITY)
    start = tl.load(table + START)
    layer_head = layer.to(tl.int64) * tl.num_programs(1) + head
    slot = layer_head * capacity + start
    _piece(
        _field(table, KEY_CODES, slot, KEY_TYPE, KEY_NUMBERS),
        _field(table, VALUE_CODES, slot, VALUE_TYPE, VALUE_NUMBERS),
        _field(table, KEY_SCALES, slot, tl.uint32, 1),
        _field(table, VALUE_SCALES, slot, tl.uint32, 1),
        _field(table, TOKEN, slot, tl.uint8, 1),
        _field(table, BLOCK_START, b * capacity + start, tl.int32, 1),
        tl.load(table + RAGGED), tl.load(table + FIRST).to(tl.int32), tl.load(table + STOP).to(tl.int32),
        query, row, rotation, offsets, cell, mask, mask_tokens, 0, hidden, scores,
        tl.load(table + PENDING_AT).to(tl.int32), 0, factor, softcap, partial,
        KEY_BITS, VALUE_BITS, False, D, DV, TILE, BOOL, DOT, CAPPED,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ATTEND_NUMBERS)
def _attend(
    table, query, tail_keys, tail_values, key_rotation, offsets, mask, scores, partials,
    key_head, cells, cell, layer, kv_heads, groups, queries, committed, tail, piece_tokens, pending, scaling, softcap,
    hidden, query_row, query_head, query_token, keys_row, keys_head, values_row, values_head,
    mask_row, mask_head, mask_query, mask_tokens,
    STAGES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    FULL_TYPE: tl.constexpr, BOOL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """First launch, programs `[pieces, rows x kv_heads, query rows]`: what one piece gives one head."""
    DOT: tl.constexpr = ROWS > 1
    piece = tl.program_id(0)
    pieces = tl.num_programs(0)
    head = tl.program_id(1)
    b = (head // kv_heads).to(tl.int64)
    h = (head % kv_heads).to(tl.int64)
    grouped = groups * queries
    r = 0
    row = True
    if DOT:
        r = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
        row = r < grouped
        r = tl.where(row, r, 0)
    query_head_index = h * groups + r // queries
    newest = r % queries
    query += b * query_row + query_head_index * query_head + newest * query_token
    partial = partials + ((head.to(tl.int64) * pieces + piece) * grouped + r) * (STATS + DV)
    if mask is not None:
        mask += b * mask_row + query_head_index * mask_head + newest * mask_query
    if scores is not None:
        scores += (head.to(tl.int64) * grouped + r) * pending
    if offsets is not None:
        offsets += (head.to(tl.int64) * grouped + r) * cells
    if key_rotation is not None:
        key_rotation += (layer * kv_heads + h) * key_head
    factor = scaling * LOG2E
    softcap = softcap * LOG2E

    if piece >= committed:
        first = (piece - committed) * piece_tokens
        stop = tl.minimum(first + piece_tokens, tail)
        BYTES: tl.constexpr = tail_keys.dtype.element_ty.primitive_bitwidth // 8
        _piece(
            tl.multiple_of(tail_keys + (b * keys_row + h * keys_head) * D, _alignment(D * BYTES)),
            tl.multiple_of(tail_values + (b * values_row + h * values_head) * DV, _alignment(DV * BYTES)),
            None, None, None, None, 0, first, stop,
            query, row, None, None, 1, mask, mask_tokens, mask_tokens - tail, hidden, None, 0,
            tail - queries + newest + 1, factor, softcap, partial,
            FULL, FULL, True, D, DV, TILE, BOOL, DOT, CAPPED,
        )  # fmt: skip
    else:
        table += piece * COLUMNS
        stage = tl.load(table + STAGE)
        for i in tl.static_range(len(STAGES)):
            if stage == i:
                _stored_piece(
                    table, layer, head, b, query, row, key_rotation, offsets, cell, mask, mask_tokens, hidden, scores,
                    factor, softcap, partial, STAGES[i][0], STAGES[i][1], D, DV, TILE, FULL_TYPE, BOOL, DOT, CAPPED,
                )  # fmt: skip


@triton.jit
def _totals(stats, s_aux, r, row, h, groups, queries, pieces, WIDTH: tl.constexpr):
    """Of the query rows `r` of head `h` over all pieces: maximum, sum, sum of squares, number of visible tokens; and
    what of the sum is the head's own `s_aux`."""
    grouped = groups * queries
    top = tl.full(r.shape, float("-inf"), tl.float32)
    if s_aux is not None:
        aside = tl.load(s_aux + h * groups + r // queries, mask=row, other=float("-inf")) * LOG2E
        top = aside
    for at in range(0, pieces, PIECES_AT_ONCE):
        piece = at + tl.arange(0, PIECES_AT_ONCE)
        place = stats + (piece[:, None] * grouped + r[None, :]) * WIDTH
        known = (piece < pieces)[:, None] & row[None, :]
        top = tl.maximum(top, tl.max(tl.load(place, mask=known, other=float("-inf")), 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros_like(top)
    if s_aux is not None:
        total = tl.exp2(aside - top)
    apart = total
    squares = tl.zeros_like(top)
    seen = tl.zeros_like(top)
    for at in range(0, pieces, PIECES_AT_ONCE):
        piece = at + tl.arange(0, PIECES_AT_ONCE)
        place = stats + (piece[:, None] * grouped + r[None, :]) * WIDTH
        known = (piece < pieces)[:, None] & row[None, :]
        weight = tl.exp2(tl.load(place, mask=known, other=float("-inf")) - top[None, :])
        total += tl.sum(weight * tl.load(place + 1, mask=known, other=0), 0)
        squares += tl.sum(weight * weight * tl.load(place + 2, mask=known, other=0), 0)
        seen += tl.sum(tl.load(place + 3, mask=known, other=0), 0)
    return top, total, squares, seen, apart


@triton.jit
def _weighted(stats, top, first, stop, column, inside, grouped, WIDTH: tl.constexpr):
    """Weighted values of the pieces `first` to `stop`, put together, at some columns."""
    result = tl.zeros(column.shape, tl.float32)
    for at in range(first, stop, PIECES_AT_ONCE):
        piece = at + tl.arange(0, PIECES_AT_ONCE)
        known = piece < stop
        place = stats + piece * (grouped * WIDTH)
        weight = tl.exp2(tl.load(place, mask=known, other=float("-inf")) - top)
        part = tl.load(
            place[:, None] + STATS + column[None, :],
            mask=known[:, None] & inside[None, :],
            other=0,
        )
        result += tl.sum(weight[:, None] * part, 0)
    return result


@triton.jit
def _finish(
    stats, value_rotation, s_aux, output, variance, r, b, h, kv_heads, groups, queries, turned, pieces,
    DV: tl.constexpr,
):  # fmt: skip
    """Output and variance of query row `r` of one head."""
    WIDTH: tl.constexpr = STATS + DV
    PADDED: tl.constexpr = triton.next_power_of_2(DV)
    grouped = groups * queries
    rows = r + tl.arange(0, 1)
    top, total, squares, seen, apart = _totals(stats, s_aux, rows, rows < grouped, h, groups, queries, pieces, WIDTH)
    top = tl.sum(top, 0)
    total = tl.sum(total, 0)
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    column = tl.arange(0, PADDED)
    inside = column < DV
    stats += r * WIDTH
    result = _weighted(stats, top, turned, pieces, column, inside, grouped, WIDTH)
    if value_rotation is not None:
        for at in range(0, DV, CHUNK):
            entry = at + tl.arange(0, CHUNK)
            known = entry < DV
            part = _weighted(stats, top, 0, turned, entry, known, grouped, WIDTH)
            matrix = tl.load(
                value_rotation + column[:, None] * DV + entry[None, :],
                mask=inside[:, None] & known[None, :],
                other=0,
            )
            result += tl.sum(matrix * part[None, :], 1)
    heads = kv_heads * groups
    query_head = h * groups + r // queries
    newest = r % queries
    place = output + ((b * queries + newest) * heads + query_head) * DV
    tl.store(place + column, (result * share).to(output.dtype.element_ty), mask=inside)
    if variance is not None:
        seen = tl.maximum(tl.sum(seen, 0), 1.0)
        mean = (total - tl.sum(apart, 0)) * share / seen
        spread = tl.sum(squares, 0) * share * share / seen - mean * mean
        tl.store(variance + (b * heads + query_head) * queries + newest, tl.maximum(spread, 0.0))


@triton.jit
def _add_received(
    table, stats, s_aux, scores, layer, head, h, groups, queries, pieces, pending,
    ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Add to the attention received by the tokens of the pending piece that a row of the table describes."""
    r = tl.arange(0, ROWS)
    grouped = groups * queries
    row = r < grouped
    top, total, _squares, _seen, _apart = _totals(stats, s_aux, r, row, h, groups, queries, pieces, STATS + DV)
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    place = (layer.to(tl.int64) * tl.num_programs(1) + head) * tl.load(table + CAPACITY) + tl.load(table + START)
    received = _field(table, RECEIVED, place, tl.float16, 1)
    kept = scores + (head * grouped + r[:, None]) * pending + tl.load(table + PENDING_AT)
    stop = tl.load(table + STOP).to(tl.int32)
    for at in range(tl.load(table + FIRST).to(tl.int32), stop, SLOTS_AT_ONCE):
        slot = at + tl.arange(0, SLOTS_AT_ONCE)
        inside = slot < stop
        score = tl.load(kept + slot[None, :], mask=row[:, None] & inside[None, :], other=float("-inf"))
        added = tl.sum(tl.exp2(score - top[:, None]) * share[:, None], 0)
        before = tl.load(received + slot, mask=inside, other=0).to(tl.float32)
        tl.store(received + slot, (before + added).to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=_COMBINE_NUMBERS)
def _combine(
    table, partials, value_rotation, s_aux, scores, output, variance,
    layer, kv_heads, groups, queries, committed, turned, pieces, pending,
    ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Second launch, programs `[query rows + pending pieces, rows x kv_heads]`: each for one of these of one head."""
    grouped = groups * queries
    job = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    stats = partials + head * pieces * (grouped * (STATS + DV))
    h = head % kv_heads
    if job < grouped:
        b = head // kv_heads
        _finish(
            stats, value_rotation, s_aux, output, variance, job, b, h, kv_heads, groups, queries, turned, pieces, DV
        )
    elif scores is not None:
        waiting = table + (committed + job - grouped) * COLUMNS
        _add_received(waiting, stats, s_aux, scores, layer, head, h, groups, queries, pieces, pending, ROWS, DV)


@triton.jit
def _probe(x):
    tl.store(x, 1.0)


def prepare() -> None:
    """Run one small kernel, so that a missing compiler or driver shows here; raises what goes wrong."""
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError("the tensor cores of this GPU do not take bfloat16: compute capability 8.0 is needed")
    x = torch.zeros(1, device="cpu" if interpreted else "cuda")
    _probe[(1,)](x)
    if x.item() != 1:
        raise RuntimeError("a kernel that was compiled here does not do what it should")


def supports(
    query: torch.Tensor, states: PackedStates, attention_mask: torch.Tensor | None, record_variance: bool = False
) -> bool:
    """Whether `packed_attention` here serves this call: few queries, computed in float32."""
    tail_keys, tail_values = states.tail_keys, states.tail_values
    return (
        states.store.dtype == torch.float32
        and query.shape[2] <= MAX_QUERIES
        and query.shape[-1] == tail_keys.shape[-1]
        and max(query.shape[-1], tail_values.shape[-1]) <= MAX_HEAD_DIM
        and tail_keys.dtype == tail_values.dtype
        and tail_keys.device == query.device == states.store.device
        and not (states.cache.record_received and tail_keys.shape[2] > states.cache.block)
    )


@dataclass
class _Plan:
    """What the calls between two changes of a store have in common."""

    table: torch.Tensor  # int64 [pieces + pending pieces, COLUMNS], on the device; pending pieces are there twice
    stages: tuple[tuple[int, int], ...]  # widths that a row may name
    piece_tokens: int
    committed: int  # pieces
    turned: int  # of these, the first ones, whose values are rotated
    pending_pieces: int
    pending: int  # slots whose received attention is recorded
    # The store's, as rows that lie one after another, which theirs need not; that of queries is transposed.
    key_rotation: torch.Tensor | None
    value_rotation: torch.Tensor | None


@lru_cache
def _programs(device: torch.device) -> int:
    """Programs that keep a device busy."""
    if device.type != "cuda":
        return 32
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _plan(store: PackedStore, layout: Layout, heads: int) -> _Plan:
    """The plan of a layout, made anew after every change of its buckets; `heads` over all rows."""
    plan = layout.derived.get("triton")
    if plan is None:
        segments = layout.segments()
        segments.sort(key=lambda pair: pair[0].value_bits == FULL_WIDTH)  # those whose values are rotated first
        even = sum(segment.slots for _, segment in segments) * heads // _programs(store.device)
        piece_tokens = min(MAX_PIECE, -(-max(even, 1) // TILE) * TILE)
        # Equal widths are always compiled, so that a policy that comes to use one does not wait for it.
        stages = tuple(sorted({(b, b) for b in WIDTHS} | {(stage.key_bits, stage.value_bits) for stage, _ in segments}))
        rows, waiting, turned, pending = [], [], 0, 0
        rotates = store.value.basis is not None
        for stage, segment in segments:
            tensors, recorded = segment.buffers.named(), segment.buffers.received is not None
            fixed = [0, segment.capacity, pending if recorded else -1]
            fixed += [tensors[name].data_ptr() if name in tensors else 0 for name in _COLUMNS[7:]]
            number = stages.index((stage.key_bits, stage.value_bits))
            for first in range(0, segment.slots, piece_tokens):
                stop = min(first + piece_tokens, segment.slots)
                rows.append([number, segment.ragged, first, stop, *fixed, 0, 0])
                turned += rotates and stage.value_bits != FULL_WIDTH
                if recorded:
                    waiting.append(rows[-1])
            pending += segment.slots if recorded else 0
        table = torch.from_numpy(np.array(rows + waiting, dtype=np.int64)).to(store.device, non_blocking=True)
        own = (store.key.dual.mT, store.value.basis) if rotates else ()
        own = [matrix.contiguous() for matrix in own] or [None] * 2
        plan = _Plan(table, stages, piece_tokens, len(rows), turned, len(waiting), pending, *own)
        layout.derived["triton"] = plan
    return plan


_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def packed_attention(
    query: torch.Tensor,
    states: PackedStates,
    attention_mask: torch.Tensor | None,
    scaling: float,
    record_variance: bool = False,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference.packed_attention`, for calls that `supports` accepts."""
    store = states.store
    rows, heads, queries, dim = query.shape
    kv_heads, tail, value_dim = states.tail_keys.shape[1], states.tail_keys.shape[2], states.tail_values.shape[3]
    tail_keys, tail_values = (_in_vectors(x) for x in (states.tail_keys, states.tail_values))
    query = query if query.stride(3) == 1 else query.contiguous()
    groups = heads // kv_heads
    grouped = groups * queries
    plan = _plan(store, states.layout, rows * kv_heads)
    pieces = plan.committed - (-tail // plan.piece_tokens)
    partials = query.new_empty(rows * kv_heads * pieces * grouped * (STATS.value + value_dim), dtype=torch.float32)
    scores = None
    if plan.pending:
        scores = query.new_empty(rows * kv_heads * grouped * plan.pending, dtype=torch.float32)
    output = query.new_empty(rows, queries, heads, value_dim)
    variance = query.new_empty(rows, heads, queries, dtype=torch.float32) if record_variance else None
    mask, mask_strides, hidden = attention_mask, (0, 0, 0, 1), 0.0
    if mask is not None:
        boolean = mask.dtype == torch.bool
        hidden = 0.0 if boolean else torch.finfo(mask.dtype).min  # how transformers writes "not visible" additively
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        mask_strides = mask.expand(rows, heads, -1, -1).stride()
        mask = mask.view(torch.uint8) if boolean else mask
    offsets, centre = None, store.key.centre
    if centre is not None:
        grouped_query = query.float().view(rows, kv_heads, groups, queries, dim)
        offsets = centre.by_cell(grouped_query, states.layer).contiguous()
    s_aux = None if s_aux is None else s_aux.detach().float().contiguous()
    at_once = 1 if grouped == 1 else ROWS_PER_PROGRAM
    with torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext():
        _attend[pieces, rows * kv_heads, -(-grouped // at_once)](
            plan.table, query, tail_keys, tail_values, plan.key_rotation, offsets, mask, scores, partials,
            dim * dim if store.key.per_head else 0, 0 if offsets is None else offsets.shape[-1],
            1 if offsets is None else min(centre.cell, LAST_POSITION),
            states.layer, kv_heads, groups, queries, plan.committed, tail, plan.piece_tokens, plan.pending,
            float(scaling), float(softcap or 1.0), hidden,
            *query.stride()[:3], *(stride // x.shape[3] for x in (tail_keys, tail_values) for stride in x.stride()[:2]),
            *mask_strides[:3], mask.shape[-1] if mask is not None else tail,
            STAGES=plan.stages, D=dim, DV=value_dim, ROWS=at_once,
            TILE=TILE if at_once == 1 and max(dim, value_dim) <= 64 else SMALL_TILE,
            FULL_TYPE=_TYPES[store.key.full_dtype], BOOL=attention_mask is not None and boolean,
            CAPPED=softcap is not None, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        _combine[grouped + plan.pending_pieces, rows * kv_heads](
            plan.table, partials, plan.value_rotation, s_aux, scores, output, variance,
            states.layer, kv_heads, groups, queries, plan.committed, plan.turned, pieces, plan.pending,
            ROWS=triton.next_power_of_2(grouped), DV=value_dim, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return output.transpose(1, 2), None if variance is None else variance.mean(1)


def _in_vectors(x: torch.Tensor) -> torch.Tensor:
    """`x` `[B, H, tokens, D]` as aligned vectors, tokens one after another, as a tail always is."""
    dim = x.shape[3]
    ordered = x.stride()[2:] == (dim, 1) and not any(stride % dim for stride in x.stride()[:2])
    return x if ordered and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
