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
from helpers.cache.layout import Layout
from helpers.cache.quantization import FULL_WIDTH
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
    """What the calls between two changes of a layout have in common: pieces of segments, and tasks made of them."""

    table: np.ndarray  # int64 [pieces, columns]
    task_starts: np.ndarray  # int64 [tasks + 1]: which rows of the table each task reads
    parameters: list[int]
    pending: int  # slots whose received attention is recorded
    slots: int
    piece: int  # tokens of a task at most
    call: _Call | None = None


_FIELDS = {
    name: getattr(kernel, name.upper())
    for name in ("key_codes", "key_scales", "value_codes", "value_scales", "token", "block_start", "received")
}


def _make_plan(store: PackedStore, layout: Layout, heads: int, threads: int) -> _Plan:
    """Pieces and tasks for `heads` key/value heads over all rows. A task reads tokens of several stages and segments,
    as long as all are rotated or none is: the query is turned once a task."""
    segments = layout.segments()
    slots = sum(segment.slots for _, segment in segments)
    piece = -(-slots // max(1, -(-TASKS_A_THREAD * threads // heads)))
    piece = max(PIECE, -(-piece // kernel.TILE) * kernel.TILE)
    kinds = [(stage.key_bits < FULL_WIDTH, stage.value_bits < FULL_WIDTH) for stage, _ in segments]
    rows, starts, room, pending, last = [], [], 0, 0, None
    for at in sorted(range(len(segments)), key=lambda i: kinds[i]):
        (stage, segment), first = segments[at], 0
        fields = segment.buffers.named()
        addresses = [fields[name].data_ptr() if name in fields else 0 for name in _FIELDS]
        while first < segment.slots:
            if not room or kinds[at] != last:
                starts.append(len(rows))
                room, last = piece, kinds[at]
            stop = min(segment.slots, first + room)
            rows.append([first, stop, segment.capacity, stage.key_bits, stage.value_bits, segment.ragged, pending])
            rows[-1] += addresses
            pending += stop - first if "received" in fields else 0
            room, first = room - (stop - first), stop
    table = np.array(rows, dtype=np.int64)
    task_starts = np.array([*starts, len(rows)], dtype=np.int64)
    parameters = [0] * kernel.PARAMETERS
    parameters[kernel.TABLE], parameters[kernel.TABLE_ROWS] = table.ctypes.data, len(rows)
    parameters[kernel.TASK_STARTS], parameters[kernel.PACKED_TASKS] = task_starts.ctypes.data, len(starts)
    parameters[kernel.BFLOAT] = int(store.key.full_dtype == torch.bfloat16)
    parameters[kernel.PENDING] = pending
    if store.key.basis is not None:
        parameters[kernel.KEY_ROTATION], parameters[kernel.VALUE_ROTATION] = (
            x.data_ptr() for x in (store.key.dual, store.value.basis)
        )
        parameters[kernel.KEY_HEAD] = store.key.dual.shape[-1] ** 2 if store.key.per_head else 0
        parameters[kernel.KEY_HADAMARD] = int(not store.key.per_head and _is_hadamard(store.key.dual))
        parameters[kernel.VALUE_HADAMARD] = int(_is_hadamard(store.value.basis))
    if (centre := store.key.centre) is not None:
        parameters[kernel.CENTRE] = centre.mean.data_ptr()
        if centre.turns:
            parameters[kernel.PHASES] = centre.phases.data_ptr()
            parameters[kernel.PAIRS], parameters[kernel.CELL] = centre.rotary.pairs, centre.cell
    return _Plan(table, task_starts, parameters, pending, slots, piece)


def _is_hadamard(rotation: torch.Tensor) -> bool:
    """Whether `quantization.rotation_matrix` made a Hadamard matrix with signs, large enough for its fast form."""
    dim = len(rotation)
    return dim >= 4 and dim & (dim - 1) == 0


def _make_call(plan: _Plan, key: tuple, kv_heads: int, dim: int, value_dim: int) -> _Call:
    rows, heads, queries, tail, scaling, softcap, threads, _ = key
    groups = heads // kv_heads
    total = plan.slots + tail
    if threads > 1 and (2 * total * rows * heads * queries * dim < SERIAL_WORK or _parallel() is None):
        threads = 1
    pieces = len(plan.task_starts) - 1 - (-tail // plan.piece)
    grouped = groups * queries
    factor = (ctypes.c_float * 2)(scaling, softcap or 0.0)
    p = plan.parameters.copy()
    p[kernel.ROWS], p[kernel.HEADS], p[kernel.GROUPS], p[kernel.QUERIES] = rows, kv_heads, groups, queries
    p[kernel.DIM], p[kernel.VALUE_DIM], p[kernel.TAIL], p[kernel.PIECE_SIZE] = dim, value_dim, tail, plan.piece
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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
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
    derived, threads = states.layout.derived, torch.get_num_threads()
    plan = derived.get(("numba", threads))
    if plan is None:
        plan = derived["numba", threads] = _make_plan(states.store, states.layout, rows * keys.shape[1], threads)
    call, key = plan.call, (rows, heads, queries, tail, scaling, softcap, threads, threading.get_ident())
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
    p[kernel.S_AUX] = 0
    if s_aux is not None:
        s_aux = s_aux.detach().float().contiguous()
        p[kernel.S_AUX] = s_aux.data_ptr()
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
