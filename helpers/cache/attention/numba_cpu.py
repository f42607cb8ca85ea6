"""Packed attention on the CPU, compiled by Numba: the same sums as `reference`, in one call a layer.

Tasks (see `numba_kernels`) run in the OpenMP threads that PyTorch itself uses: a second pool beside it would fight for
the cores. Compiled code is kept on disk.
"""

import ctypes
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from helpers.cache.attention import numba_kernels as kernel
from helpers.cache.layer import PackedStates
from helpers.cache.store import PackedStore

MAX_QUERIES = 32  # more new tokens at once than this are better served by matrix products
PIECE = 256  # least tokens of a task
TASKS_A_THREAD = 4  # at least, where there are tokens enough: threads that come late take fewer
SERIAL_WORK = 24_576  # multiplications below which waking other threads costs more than they save


def prepare() -> None:
    """Compile what is not on disk yet, saying so; raises what the compiler raises."""
    compiled = Path(__file__).with_name("__pycache__")
    if not any(compiled.glob("numba_kernels._enter-*.nbi")):
        print("compiling packed attention for this processor, once (about 20 s) ...", flush=True)
    kernel.entry()


@lru_cache(maxsize=1)
def _parallel():
    """`GOMP_parallel` of the OpenMP library that PyTorch has loaded; None where there is none (work is then
    serial)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    mapped = {line.split()[-1] for line in lines if "omp" in line}
    home = str(Path(torch.__file__).parent)
    for path in sorted(mapped, key=lambda name: (not name.startswith(home), name)):
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if function is not None:
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                function.restype = None
                return function
    return None


@lru_cache(maxsize=1)
def _serial():
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.entry())


def supports(
    query: torch.Tensor, states: PackedStates, attention_mask: torch.Tensor | None, record_variance: bool = False
) -> bool:
    """Whether `packed_attention` here serves this call: few queries on a CPU, computed in float32."""
    shape, cache = query.shape, states.cache
    return (
        shape[2] <= MAX_QUERIES
        and states.store.dtype is torch.float32
        and shape[3] == states.keys.shape[3]
        and (attention_mask is None or attention_mask.shape[1] == 1)
        and not (cache.record_received and states.tail > cache.block)
        and query.device.type == "cpu"
    )


@dataclass
class _Call:
    """What the calls of one step have in common: the parameters that all layers share, and the memory they point to."""

    key: tuple
    parameters: ctypes.Array
    address: int
    threads: int
    counters: np.ndarray
    held: tuple  # keeps alive what the parameters point to


@dataclass
class _Plan:
    """What the calls between two changes of a store have in common."""

    table: np.ndarray  # int64 [buckets, columns]
    parameters: list[int]
    pending: int  # slots whose received attention is recorded
    slots: list[int]  # of each bucket
    call: _Call | None = None


_COLUMNS = {
    name: getattr(kernel, name.upper())
    for name in ("key_codes", "key_scales", "value_codes", "value_scales", "token", "block_start", "received")
}


def _make_plan(store: PackedStore) -> _Plan:
    buckets = [bucket for bucket in store.buckets.values() if bucket.slots]
    table = np.zeros((len(buckets), kernel.COLUMNS), dtype=np.int64)
    for row, bucket in zip(table, buckets, strict=True):
        row[kernel.START], row[kernel.SLOTS], row[kernel.CAPACITY] = bucket.start, bucket.slots, bucket.capacity
        row[kernel.KEY_BITS], row[kernel.VALUE_BITS] = bucket.stage.key_bits, bucket.stage.value_bits
        row[kernel.RAGGED] = bucket.ragged
        for name, tensor in bucket.buffers.named().items():
            row[_COLUMNS[name]] = tensor.data_ptr()
    parameters = [0] * kernel.PARAMETERS
    parameters[kernel.TABLE], parameters[kernel.BUCKETS] = table.ctypes.data, len(buckets)
    keys, values = store.key, store.value
    parameters[kernel.BFLOAT] = int(keys.full_dtype == torch.bfloat16)
    if keys.rotation is not None:
        parameters[kernel.KEY_ROTATION] = keys.rotation.data_ptr()
        parameters[kernel.VALUE_ROTATION] = values.rotation.data_ptr()
        parameters[kernel.CENTRE] = keys.centre.data_ptr()
        dims = [len(keys.rotation), len(values.rotation)]
        parameters[kernel.HADAMARD] = int(all(dim >= 4 and dim & (dim - 1) == 0 for dim in dims))
    slots = table[:, kernel.SLOTS].tolist()
    pending = int(table[table[:, kernel.RECEIVED] != 0, kernel.SLOTS].sum())
    parameters[kernel.PENDING] = pending
    return _Plan(table, parameters, pending, slots)


def _make_call(plan: _Plan, key: tuple, kv_heads: int, dim: int, value_dim: int) -> _Call:
    rows, heads, queries, tail, scaling, threads, _ = key
    groups = heads // kv_heads
    total = sum(plan.slots) + tail
    if threads > 1 and (2 * total * rows * heads * queries * dim < SERIAL_WORK or _parallel() is None):
        threads = 1
    piece = -(-total // max(1, -(-TASKS_A_THREAD * threads // (rows * kv_heads))))
    piece = max(PIECE, -(-piece // kernel.TILE) * kernel.TILE)
    pieces = sum(-(-slots // piece) for slots in (*plan.slots, tail))
    grouped = groups * queries
    factor = ctypes.c_float(scaling)
    p = plan.parameters.copy()
    p[kernel.ROWS], p[kernel.HEADS], p[kernel.GROUPS], p[kernel.QUERIES] = rows, kv_heads, groups, queries
    p[kernel.DIM], p[kernel.VALUE_DIM], p[kernel.TAIL], p[kernel.PIECE_SIZE] = dim, value_dim, tail, piece
    p[kernel.SCALING] = ctypes.addressof(factor)
    counters = _workspace("counters", 2 + rows * kv_heads, np.int64)
    partials = _workspace("partials", rows * kv_heads * pieces * grouped * (kernel.STATS + value_dim), np.float32)
    scratch = _workspace("scratch", kernel.scratch_size.py_func(grouped, dim, value_dim) * threads, np.float32)
    scores = _workspace("scores", rows * kv_heads * grouped * plan.pending, np.float32)
    p[kernel.COUNTERS], p[kernel.PARTIALS] = counters.ctypes.data, partials.ctypes.data
    p[kernel.SCRATCH], p[kernel.SCORES] = scratch.ctypes.data, scores.ctypes.data
    parameters = (ctypes.c_int64 * kernel.PARAMETERS)(*p)
    held = (factor, partials, scratch, scores)
    return _Call(key, parameters, ctypes.addressof(parameters), threads, counters, held)


_local = threading.local()


def _workspace(name: str, size: int, dtype: type) -> np.ndarray:
    """This thread's working memory of that name, at least `size` long."""
    held = getattr(_local, name, None)
    if held is None or len(held) < size:
        held = np.empty(size, dtype)
        setattr(_local, name, held)
    return held


def _bias(mask: torch.Tensor) -> torch.Tensor:
    """A mask `[B or 1, 1, Q, tokens]` as what is added to scores, float32; the layers of a step share one mask."""
    held = getattr(_local, "bias", None)
    if held is not None and held[0] is mask and held[1] == mask._version:
        return held[2]
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    else:
        hidden = mask <= torch.finfo(mask.dtype).min  # how transformers writes "not visible" additively
        bias = mask.float().masked_fill(hidden, -torch.inf)
    bias = bias[:, 0].contiguous()
    _local.bias = (mask, mask._version, bias)
    return bias


def packed_attention(
    query: torch.Tensor,
    states: PackedStates,
    attention_mask: torch.Tensor | None,
    scaling: float,
    record_variance: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference.packed_attention`, for calls that `supports` accepts."""
    rows, heads, queries, dim = query.shape
    keys, values, tail = states.keys, states.values, states.tail
    dtype = query.dtype
    if dtype is not torch.float32:
        query, keys, values = query.float(), states.tail_keys.float(), states.tail_values.float()
    query_strides = query.stride()
    if query_strides[3] != 1:
        query = query.contiguous()
        query_strides = query.stride()
    value_dim = values.shape[3]
    derived = states.store.derived
    plan = derived.get("numba")
    if plan is None:
        plan = derived["numba"] = _make_plan(states.store)
    call, key = plan.call, (rows, heads, queries, tail, scaling, torch.get_num_threads(), threading.get_ident())
    if call is None or call.key != key:
        call = plan.call = _make_call(plan, key, keys.shape[1], dim, value_dim)

    p = call.parameters
    output = torch.empty((rows, queries, heads, value_dim))
    p[kernel.LAYER], p[kernel.QUERY], p[kernel.OUT] = states.layer, query.data_ptr(), output.data_ptr()
    p[kernel.QUERY_ROW], p[kernel.QUERY_HEAD], p[kernel.QUERY_TOKEN], _ = query_strides
    p[kernel.TAIL_KEYS], p[kernel.TAIL_VALUES] = keys.data_ptr(), values.data_ptr()
    p[kernel.TAIL_KEYS_ROW], p[kernel.TAIL_KEYS_HEAD], _, _ = keys.stride()
    p[kernel.TAIL_VALUES_ROW], p[kernel.TAIL_VALUES_HEAD], _, _ = values.stride()
    p[kernel.BIAS] = p[kernel.VARIANCE] = 0
    if attention_mask is not None:
        bias = _bias(attention_mask)
        p[kernel.BIAS], p[kernel.BIAS_TOKENS] = bias.data_ptr(), bias.shape[-1]
        p[kernel.BIAS_ROW], p[kernel.BIAS_QUERY] = bias.stride(0) if bias.shape[0] > 1 else 0, bias.stride(1)
    variance = None
    if record_variance:
        variance = query.new_empty(rows, heads, queries)
        p[kernel.VARIANCE] = variance.data_ptr()
    call.counters.fill(0)
    if call.threads > 1:
        _parallel()(kernel.entry(), call.address, call.threads, 0)
    else:
        _serial()(call.address)
    if dtype is not torch.float32:
        output = output.to(dtype)
    return output.transpose(1, 2), None if variance is None else variance.mean(1)
