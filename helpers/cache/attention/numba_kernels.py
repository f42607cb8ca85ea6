"""The compiled half of packed attention on the CPU: what one thread does, in machine numbers only.

`work` is entered by every thread with the address of one parameter list; what the entries are is below, who fills
them in is `numba_cpu`. A task is one key/value head and one piece of the tokens; it expands `TILE` tokens at a time
into a buffer that stays in the processor's first cache, and keeps a running maximum (FlashAttention,
arXiv 2205.14135), so that nothing that grows with the context is allocated.
"""

from functools import lru_cache

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from helpers.cache.compiling import compilers
from helpers.cache.quantization import FULL_WIDTH
from helpers.cache.tokens import EMPTY

TILE = 32  # tokens that are expanded at a time
MATH = {"reassoc", "nsz", "arcp", "contract"}  # not "ninf": hidden scores are -inf


# Columns of a layout's table, one row a piece of a segment: what it covers, how it is stored, where each field lies.
FIRST, STOP, CAPACITY, KEY_BITS, VALUE_BITS, RAGGED, PENDING_AT, KEY_CODES, KEY_SCALES = range(9)
VALUE_CODES, VALUE_SCALES, TOKEN, BLOCK_START, RECEIVED, COLUMNS = range(9, 15)


_compiled, _inlined = compilers(MATH)
_ordered, _ = compilers(MATH | {"nnan"})  # numbers are comparable: else a search for the largest would not vectorize


@intrinsic
def _address(typingctx, number):
    """An integer as a pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def _half(typingctx, bits):
    """float32 value of an IEEE half given as its uint16 bits."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _to_half(typingctx, value):
    """uint16 bits of the IEEE half nearest to a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _bfloat(typingctx, bits):
    """float32 value of a bfloat16 given as its uint16 bits."""

    def codegen(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _next(typingctx, address):
    """Add one to the int64 at an address, atomically, and return what it was."""

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), codegen


@_inlined
def _unpack(codes, bits, tokens, dim, bfloat, out):
    if bits == 4:
        half = dim // 2
        for t in range(tokens):
            for j in range(half):
                byte = codes[t * half + j]
                out[t, j] = np.float32(np.int32(byte & 15))
                out[t, half + j] = np.float32(np.int32(byte >> 4))
    elif bits == 2:
        quarter = dim // 4
        for t in range(tokens):
            for j in range(quarter):
                byte = codes[t * quarter + j]
                out[t, j] = np.float32(np.int32(byte & 3))
                out[t, quarter + j] = np.float32(np.int32((byte >> 2) & 3))
                out[t, 2 * quarter + j] = np.float32(np.int32((byte >> 4) & 3))
                out[t, 3 * quarter + j] = np.float32(np.int32(byte >> 6))
    elif bits == 8:
        for t in range(tokens):
            for j in range(dim):
                out[t, j] = np.float32(np.int32(codes[t * dim + j]))
    else:
        wide = codes.view(np.uint16)
        for t in range(tokens):
            if bfloat:
                for j in range(dim):
                    out[t, j] = _bfloat(wide[t * dim + j])
            else:
                for j in range(dim):
                    out[t, j] = _half(wide[t * dim + j])


@_compiled
def _expand(codes, bits, tokens, dim, bfloat, out):
    """Codes of `tokens` vectors, one after another, as float32 `[tokens, dim]`; scales are not applied."""
    if dim == 64:
        _unpack(codes, bits, tokens, 64, bfloat, out)
    elif dim == 128:
        _unpack(codes, bits, tokens, 128, bfloat, out)
    elif dim == 32:
        _unpack(codes, bits, tokens, 32, bfloat, out)
    else:
        _unpack(codes, bits, tokens, dim, bfloat, out)


@_inlined
def _dots_of(keys, tokens, query, dim, out):
    t = 0
    while t + 4 <= tokens:
        a = np.float32(0)
        b = np.float32(0)
        c = np.float32(0)
        d = np.float32(0)
        for j in range(dim):
            x = query[j]
            a += x * keys[t, j]
            b += x * keys[t + 1, j]
            c += x * keys[t + 2, j]
            d += x * keys[t + 3, j]
        out[t] = a
        out[t + 1] = b
        out[t + 2] = c
        out[t + 3] = d
        t += 4
    while t < tokens:
        a = np.float32(0)
        for j in range(dim):
            a += query[j] * keys[t, j]
        out[t] = a
        t += 1


@_compiled
def _dots(keys, tokens, query, out):
    """`out[t] = keys[t] . query`, four tokens at a time."""
    dim = query.shape[0]
    if dim == 64:
        _dots_of(keys, tokens, query, 64, out)
    elif dim == 128:
        _dots_of(keys, tokens, query, 128, out)
    else:
        _dots_of(keys, tokens, query, dim, out)


@_inlined
def _add_weighted_of(values, tokens, weights, dim, out):
    rows = out.shape[0]
    fours = tokens // 4
    r = 0
    while r + 3 <= rows:
        x, y, z = out[r], out[r + 1], out[r + 2]
        for u in range(fours):
            t = 4 * u
            x0, x1, x2, x3 = weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            y0, y1, y2, y3 = weights[r + 1, t], weights[r + 1, t + 1], weights[r + 1, t + 2], weights[r + 1, t + 3]
            z0, z1, z2, z3 = weights[r + 2, t], weights[r + 2, t + 1], weights[r + 2, t + 2], weights[r + 2, t + 3]
            for j in range(dim):
                a, b, c, d = values[t, j], values[t + 1, j], values[t + 2, j], values[t + 3, j]
                x[j] += x0 * a + x1 * b + x2 * c + x3 * d
                y[j] += y0 * a + y1 * b + y2 * c + y3 * d
                z[j] += z0 * a + z1 * b + z2 * c + z3 * d
        for t in range(4 * fours, tokens):
            for j in range(dim):
                x[j] += weights[r, t] * values[t, j]
                y[j] += weights[r + 1, t] * values[t, j]
                z[j] += weights[r + 2, t] * values[t, j]
        r += 3
    while r < rows:
        x = out[r]
        for u in range(fours):
            t = 4 * u
            x0, x1, x2, x3 = weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            for j in range(dim):
                x[j] += x0 * values[t, j] + x1 * values[t + 1, j] + x2 * values[t + 2, j] + x3 * values[t + 3, j]
        for t in range(4 * fours, tokens):
            x0 = weights[r, t]
            for j in range(dim):
                x[j] += x0 * values[t, j]
        r += 1


@_compiled
def _add_weighted(values, tokens, weights, out):
    """`out[r] += sum of weights[r, t] * values[t]`: three rows at a time share each load, four tokens each store."""
    dim = out.shape[1]
    if dim == 64:
        _add_weighted_of(values, tokens, weights, 64, out)
    elif dim == 128:
        _add_weighted_of(values, tokens, weights, 128, out)
    else:
        _add_weighted_of(values, tokens, weights, dim, out)


@_compiled
def _hadamard(x):
    """Multiply `x`, whose length is a power of two, by Sylvester's Hadamard matrix, in place: n log n additions."""
    n = x.shape[0]
    i = 0
    while i + 4 <= n:
        a, b, c, d = x[i] + x[i + 1], x[i] - x[i + 1], x[i + 2] + x[i + 3], x[i + 2] - x[i + 3]
        x[i], x[i + 1], x[i + 2], x[i + 3] = a + c, b + d, a - c, b - d
        i += 4
    step = 4
    while step < n:
        for i in range(0, n, 2 * step):
            for j in range(i, i + step):
                a, b = x[j], x[j + step]
                x[j], x[j + step] = a + b, a - b
        step *= 2


@intrinsic
def _float(typingctx, bits):
    """The float32 of these int32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@_compiled
def _exp(x):
    """`exp(x)` for x <= 0 to 2 units in the last place, in operations that vectorize; 0 below -87."""
    y = max(x, np.float32(-87.0)) * np.float32(1.44269504)
    whole = np.floor(y + np.float32(0.5))
    f = y - whole
    p = np.float32(1.5353362e-4)
    p = p * f + np.float32(1.3398874e-3)
    p = p * f + np.float32(9.6184373e-3)
    p = p * f + np.float32(5.5503324e-2)
    p = p * f + np.float32(2.4022648e-1)
    p = p * f + np.float32(6.9314720e-1)
    p = p * f + np.float32(1.0)
    power = _float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))
    return p * power if x > np.float32(-87.0) else np.float32(0.0)


@_compiled
def _capped(x, cap):
    """`cap * tanh(x / cap)`"""
    e = _exp(np.float32(-2.0) * abs(x) / cap)
    y = cap * (np.float32(1.0) - e) / (np.float32(1.0) + e)
    return y if x >= np.float32(0.0) else -y


@_ordered
def _highest(scores, tokens):
    """The largest score; which one where some are not numbers is left open."""
    highest = scores[0]
    for t in range(1, tokens):
        highest = scores[t] if scores[t] > highest else highest
    return highest


@_compiled
def _exponentials(scores, tokens, highest):
    """Replace scores by `exp(score - highest)`; return their sum and the sum of their squares."""
    total = np.float32(0)
    squares = np.float32(0)
    for t in range(tokens):
        e = _exp(scores[t] - highest)
        scores[t] = e
        total += e
        squares += e * e
    return total, squares


@_compiled
def _floats(address, count):
    return carray(_address(address), (count,), np.float32)


# Entries of the parameter list of a call, int64 each. SCALING points to two float32, the factor of scores and what they
# are capped by (0: by nothing); S_AUX to one for each query head, if there are any.
(
    TABLE, TABLE_ROWS, TASK_STARTS, PACKED_TASKS,
    LAYER, ROWS, HEADS, GROUPS, QUERIES, DIM, VALUE_DIM, TAIL, PIECE_SIZE, BFLOAT, SCALING,
    QUERY, QUERY_ROW, QUERY_HEAD, QUERY_TOKEN,
    TAIL_KEYS, TAIL_KEYS_ROW, TAIL_KEYS_HEAD, TAIL_VALUES, TAIL_VALUES_ROW, TAIL_VALUES_HEAD,
    KEY_ROTATION, KEY_HADAMARD, KEY_HEAD, VALUE_ROTATION, VALUE_HADAMARD,
    CENTRE, PHASES, PAIRS, CELL, BIAS, BIAS_ROW, BIAS_QUERY, BIAS_TOKENS,
    OUT, VARIANCE, COUNTERS, PARTIALS, SCRATCH, SCORES, PENDING, S_AUX, PARAMETERS,
) = range(47)  # fmt: skip


STATS = 4  # maximum, sum, sum of squares and number of visible tokens, before a partial result


@_compiled
def scratch_size(rows, dim, value_dim):
    """float32 numbers that one thread works in."""
    return rows * (3 * dim + value_dim + 2 * TILE + 8) + TILE * (max(dim, value_dim) + 8)


@_compiled
def work(params):
    """Take tasks until none is left; the last task of a head puts its pieces together."""
    p = carray(params, (PARAMETERS,), np.int64)
    table = carray(_address(p[TABLE]), (p[TABLE_ROWS], COLUMNS), np.int64)
    pieces = p[PACKED_TASKS] + (p[TAIL] + p[PIECE_SIZE] - 1) // p[PIECE_SIZE]
    heads = p[ROWS] * p[HEADS]
    counters = p[COUNTERS]  # next task, next thread, then tasks done of each head
    rows = p[GROUPS] * p[QUERIES]
    thread = _next(counters + 8)
    scratch = p[SCRATCH] + thread * 4 * scratch_size(rows, p[DIM], p[VALUE_DIM])
    while True:
        task = _next(counters)
        if task >= heads * pieces:
            break
        head = task // pieces
        _attend(p, table, head, task % pieces, pieces, scratch)
        if _next(counters + 8 * (2 + head)) == pieces - 1:
            _combine(p, table, head, pieces, scratch)


@_compiled
def _attend(p, table, head, piece, pieces, scratch):
    """One piece of one head: its running maximum, sums and weighted values, for every query."""
    groups, queries, dim, value_dim = p[GROUPS], p[QUERIES], p[DIM], p[VALUE_DIM]
    rows = groups * queries
    row, kv_head = head // p[HEADS], head % p[HEADS]
    wide = max(dim, value_dim)

    # Which rows of the table make up the piece; their keys are all coded or all not, and their values likewise.
    in_tail = piece >= p[PACKED_TASKS]
    task_starts = carray(_address(p[TASK_STARTS]), (p[PACKED_TASKS] + 1,), np.int64)
    entry = np.int64(0) if in_tail else task_starts[piece]
    end = np.int64(1) if in_tail else task_starts[piece + 1]
    coded = (not in_tail) and table[entry, KEY_BITS] < FULL_WIDTH

    query = carray(_address(scratch), (rows, dim), np.float32)
    turned = carray(_address(scratch + 4 * rows * dim), (rows, dim), np.float32)
    scores = carray(_address(scratch + 4 * rows * 2 * dim), (rows, TILE), np.float32)
    totals = carray(_address(scratch + 4 * rows * (2 * dim + TILE)), (rows, 8), np.float32)
    products = carray(_address(scratch + 4 * rows * (2 * dim + TILE + 8)), (rows, dim), np.float32)
    offsets = carray(_address(scratch + 4 * rows * (3 * dim + TILE + 8)), (rows, TILE), np.float32)
    base = scratch + 4 * rows * (3 * dim + 2 * TILE + 8)
    scale = _floats(base + 4 * TILE * wide, TILE)
    zero = _floats(base + 4 * TILE * (wide + 1), TILE)
    place = p[PARTIALS] + 4 * (head * pieces + piece) * rows * (STATS + value_dim)
    weighted = carray(_address(place), (rows, value_dim), np.float32)
    stats = carray(_address(place + 4 * rows * value_dim), (rows, STATS), np.float32)
    scaling, cap = _floats(p[SCALING], 2)[0], _floats(p[SCALING], 2)[1]
    place0 = (p[LAYER] * p[ROWS] + row) * p[HEADS] + kv_head
    centred = coded and p[CENTRE] != 0
    moving = centred and p[PAIRS] > 0
    phase_start = np.int32(-1)

    for r in range(rows):
        g, q = r // queries, r % queries
        source = _floats(
            p[QUERY] + 4 * (row * p[QUERY_ROW] + (kv_head * groups + g) * p[QUERY_HEAD] + q * p[QUERY_TOKEN]), dim
        )
        total = np.float32(0)
        for j in range(dim):
            query[r, j] = source[j]
            total += source[j]
        offset = np.float32(0)
        if coded and p[KEY_ROTATION] != 0:
            matrix = (p[LAYER] * p[HEADS] + kv_head) * p[KEY_HEAD]
            rotation = carray(_address(p[KEY_ROTATION] + 4 * matrix), (dim, dim), np.float32)
            for j in range(dim):
                turned[r, j] = source[j] * rotation[j, 0] if p[KEY_HADAMARD] else np.float32(0)
            if p[KEY_HADAMARD]:
                _hadamard(turned[r])
            else:
                for i in range(dim):
                    for j in range(dim):
                        turned[r, j] += source[i] * rotation[i, j]
            total = np.float32(0)
            for j in range(dim):
                total += turned[r, j]
                query[r, j] = turned[r, j]
        if moving:  # what the phases of a block are multiplied by, see `Rotary.products`
            centre = _floats(p[CENTRE] + 4 * place0 * dim, dim)
            pairs = p[PAIRS]
            for j in range(pairs):
                products[r, j] = source[j] * centre[j] + source[pairs + j] * centre[pairs + j]
                products[r, pairs + j] = source[pairs + j] * centre[j] - source[j] * centre[pairs + j]
            for j in range(2 * pairs, dim):
                products[r, j] = source[j] * centre[j]
        elif centred:
            centre = _floats(p[CENTRE] + 4 * place0 * dim, dim)
            for j in range(dim):
                offset += source[j] * centre[j]
        totals[r, 0] = total
        totals[r, 1] = offset
        totals[r, 2] = np.float32(-np.inf)  # maximum so far
        totals[r, 3] = np.float32(0)  # sum of exponentials
        totals[r, 4] = np.float32(0)  # of their squares
        totals[r, 5] = np.float32(0)  # visible tokens
        totals[r, 6] = np.float32(0)  # weighted zeros of the values
        for j in range(value_dim):
            weighted[r, j] = np.float32(0)

    tail_at = p[BIAS_TOKENS] - p[TAIL]
    while entry < end:
        if in_tail:
            at = (piece - p[PACKED_TASKS]) * p[PIECE_SIZE]
            stop = min(at + p[PIECE_SIZE], p[TAIL])
            capacity = np.int64(0)
            key_bits = value_bits = np.int64(32)
            before = np.int64(0)
            ragged = received = False
        else:
            at, stop, capacity = table[entry, FIRST], table[entry, STOP], table[entry, CAPACITY]
            key_bits, value_bits = table[entry, KEY_BITS], table[entry, VALUE_BITS]
            before = table[entry, PENDING_AT] - at
            ragged, received = table[entry, RAGGED] != 0, table[entry, RECEIVED] != 0
        slot0, positions0 = place0 * capacity, row * capacity
        while at < stop:
            n = min(np.int64(TILE), stop - at)
            slot = slot0 + at
            # Keys of the tile.
            if in_tail:
                source = carray(
                    _address(p[TAIL_KEYS] + 4 * (row * p[TAIL_KEYS_ROW] + kv_head * p[TAIL_KEYS_HEAD] + at * dim)),
                    (n, dim),
                    np.float32,
                )
                for r in range(rows):
                    _dots(source, n, query[r], scores[r])
            else:
                size = dim * key_bits // 8
                codes = carray(_address(table[entry, KEY_CODES] + slot * size), (n * size,), np.uint8)
                keys = carray(_address(base), (TILE, dim), np.float32)
                _expand(codes, key_bits, n, dim, p[BFLOAT], keys)
                for r in range(rows):
                    _dots(keys, n, query[r], scores[r])
                if coded:
                    halves = carray(_address(table[entry, KEY_SCALES] + slot * 4), (n, 2), np.uint16)
                    for t in range(n):
                        scale[t] = _half(halves[t, 0])
                        zero[t] = _half(halves[t, 1])
            hides = p[BIAS] != 0 or ragged
            if not in_tail and (hides or moving):
                tokens = carray(_address(table[entry, TOKEN] + slot), (n,), np.uint8)
                starts = carray(_address(table[entry, BLOCK_START] + 4 * (positions0 + at)), (n,), np.int32)
            if moving:
                for t in range(n):
                    if starts[t] != phase_start:  # the tokens of a block lie together
                        phase_start = starts[t]
                        phase = _floats(p[PHASES] + 4 * (phase_start // p[CELL]) * dim, dim)
                        for r in range(rows):
                            offset = np.float32(0)
                            for j in range(dim):
                                offset += products[r, j] * phase[j]
                            totals[r, 1] = offset
                    for r in range(rows):
                        offsets[r, t] = totals[r, 1]
            for r in range(rows):
                q = r % queries
                if moving:
                    total = totals[r, 0]
                    for t in range(n):
                        scores[r, t] = (scores[r, t] * scale[t] + zero[t] * total + offsets[r, t]) * scaling
                elif coded:
                    total, offset = totals[r, 0], totals[r, 1]
                    for t in range(n):
                        scores[r, t] = (scores[r, t] * scale[t] + zero[t] * total + offset) * scaling
                else:
                    for t in range(n):
                        scores[r, t] *= scaling
                if cap > np.float32(0):
                    for t in range(n):
                        scores[r, t] = _capped(scores[r, t], cap)
                if hides or (in_tail and queries > 1):
                    if p[BIAS]:
                        bias = _floats(p[BIAS] + 4 * (row * p[BIAS_ROW] + q * p[BIAS_QUERY]), p[BIAS_TOKENS])
                        for t in range(n):
                            if in_tail:
                                scores[r, t] += bias[tail_at + at + t]
                            elif tokens[t] == EMPTY:
                                scores[r, t] = np.float32(-np.inf)
                            else:
                                scores[r, t] += bias[starts[t] + tokens[t]]
                    elif in_tail:
                        for t in range(n):
                            if at + t > p[TAIL] - queries + q:
                                scores[r, t] = np.float32(-np.inf)
                    else:
                        for t in range(n):
                            if tokens[t] == EMPTY:
                                scores[r, t] = np.float32(-np.inf)
                if received:
                    kept = _floats(p[SCORES] + 4 * ((head * rows + r) * p[PENDING] + before + at), n)
                    for t in range(n):
                        kept[t] = scores[r, t]
                highest = max(totals[r, 2], _highest(scores[r], n))
                seen = n
                if hides or (in_tail and queries > 1):
                    seen = 0
                    for t in range(n):
                        seen += scores[r, t] > np.float32(-np.inf)
                totals[r, 5] += np.float32(seen)
                if highest == np.float32(-np.inf):
                    for t in range(n):
                        scores[r, t] = np.float32(0)
                    continue
                shrink = _exp(totals[r, 2] - highest)
                if shrink != np.float32(1):
                    for j in range(value_dim):
                        weighted[r, j] *= shrink
                    totals[r, 3] *= shrink
                    totals[r, 4] *= shrink * shrink
                    totals[r, 6] *= shrink
                totals[r, 2] = highest
                total, squares = _exponentials(scores[r], n, highest)
                totals[r, 3] += total
                totals[r, 4] += squares
            # Values of the tile.
            if in_tail:
                source = carray(
                    _address(
                        p[TAIL_VALUES] + 4 * (row * p[TAIL_VALUES_ROW] + kv_head * p[TAIL_VALUES_HEAD] + at * value_dim)
                    ),
                    (n, value_dim),
                    np.float32,
                )
                _add_weighted(source, n, scores, weighted)
            else:
                size = value_dim * value_bits // 8
                codes = carray(_address(table[entry, VALUE_CODES] + slot * size), (n * size,), np.uint8)
                values = carray(_address(base), (TILE, value_dim), np.float32)
                _expand(codes, value_bits, n, value_dim, p[BFLOAT], values)
                if value_bits < FULL_WIDTH:
                    halves = carray(_address(table[entry, VALUE_SCALES] + slot * 4), (n, 2), np.uint16)
                    for t in range(n):
                        scale[t] = _half(halves[t, 0])
                        zero[t] = _half(halves[t, 1])
                    for r in range(rows):
                        shift = np.float32(0)
                        for t in range(n):
                            shift += scores[r, t] * zero[t]
                            scores[r, t] *= scale[t]
                        totals[r, 6] += shift
                _add_weighted(values, n, scores, weighted)
            at += n
        entry += 1
    for r in range(rows):
        for j in range(value_dim):
            weighted[r, j] += totals[r, 6]
        for j in range(STATS):
            stats[r, j] = totals[r, 2 + j]


@_compiled
def _combine(p, table, head, pieces, scratch):
    """Put the pieces of one head together: output, variance of its rows, attention that pending tokens received."""
    groups, queries, value_dim = p[GROUPS], p[QUERIES], p[VALUE_DIM]
    rows = groups * queries
    row, kv_head = head // p[HEADS], head % p[HEADS]
    heads = p[HEADS] * groups
    width = STATS + value_dim
    parts = carray(_address(p[PARTIALS] + 4 * head * pieces * rows * width), (pieces, rows * width), np.float32)
    starts = carray(_address(p[TASK_STARTS]), (p[PACKED_TASKS] + 1,), np.int64)
    stats0 = rows * value_dim
    turned = _floats(scratch, value_dim)
    back = _floats(scratch + 4 * value_dim, value_dim)
    for r in range(rows):
        g, q = r // queries, r % queries
        highest = np.float32(-np.inf)
        for i in range(pieces):
            highest = max(highest, parts[i, stats0 + r * STATS])
        aside = np.float32(-np.inf)
        if p[S_AUX]:
            aside = _floats(p[S_AUX], heads)[kv_head * groups + g]
            highest = max(highest, aside)
        out = _floats(p[OUT] + 4 * ((row * queries + q) * heads + kv_head * groups + g) * value_dim, value_dim)
        for j in range(value_dim):
            out[j] = np.float32(0)
            turned[j] = np.float32(0)
        total = np.float32(0)
        squares = np.float32(0)
        seen = np.float32(0)
        for piece in range(pieces):
            part = parts[piece, r * value_dim : (r + 1) * value_dim]
            stats = parts[piece, stats0 + r * STATS : stats0 + (r + 1) * STATS]
            if stats[0] == np.float32(-np.inf):
                continue
            weight = _exp(stats[0] - highest)
            total += weight * stats[1]
            squares += weight * weight * stats[2]
            seen += stats[3]
            packed = piece < p[PACKED_TASKS]
            if packed and table[starts[piece], VALUE_BITS] < FULL_WIDTH and p[VALUE_ROTATION] != 0:
                for j in range(value_dim):
                    turned[j] += weight * part[j]
            else:
                for j in range(value_dim):
                    out[j] += weight * part[j]
        if p[VALUE_ROTATION]:
            rotation = carray(_address(p[VALUE_ROTATION]), (value_dim, value_dim), np.float32)
            if p[VALUE_HADAMARD]:
                _hadamard(turned)
                for j in range(value_dim):
                    out[j] += turned[j] * rotation[j, 0]
            else:
                _dots(rotation, value_dim, turned, back)
                for j in range(value_dim):
                    out[j] += back[j]
        visible = total
        if p[S_AUX]:
            total += _exp(aside - highest)
        share = np.float32(1) / total if total > 0 else np.float32(0)
        for j in range(value_dim):
            out[j] *= share
        if p[VARIANCE]:
            variance = _floats(p[VARIANCE] + 4 * ((row * heads + kv_head * groups + g) * queries + q), 1)
            seen = max(seen, np.float32(1))
            mean = visible * share / seen
            variance[0] = max(squares * share * share / seen - mean * mean, np.float32(0))
        for b in range(p[TABLE_ROWS]):
            if table[b, RECEIVED]:
                slots = table[b, STOP] - table[b, FIRST]
                kept = _floats(p[SCORES] + 4 * ((head * rows + r) * p[PENDING] + table[b, PENDING_AT]), slots)
                for t in range(slots):
                    kept[t] = _exp(kept[t] - highest) * share if total > 0 else np.float32(0)
    for b in range(p[TABLE_ROWS]):
        if table[b, RECEIVED]:
            slots = table[b, STOP] - table[b, FIRST]
            at = ((p[LAYER] * p[ROWS] + row) * p[HEADS] + kv_head) * table[b, CAPACITY] + table[b, FIRST]
            received = carray(_address(table[b, RECEIVED] + 2 * at), (slots,), np.uint16)
            for t in range(slots):
                added = np.float32(0)
                for r in range(rows):
                    place = (head * rows + r) * p[PENDING] + table[b, PENDING_AT] + t
                    added += _floats(p[SCORES] + 4 * place, 1)[0]
                received[t] = _to_half(_half(received[t]) + added)


def _enter(params):
    work(params)


@lru_cache(maxsize=1)
def entry() -> int:
    """Address of the compiled function that threads enter; compiled at first use on a machine, then read from disk."""
    compiled = numba.cfunc("void(voidptr)", cache=True)(_enter)
    return compiled.address
