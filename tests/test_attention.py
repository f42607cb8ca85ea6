"""Every implementation of packed attention against dense attention, in float64, over what the store gives back.

The Triton kernels run in Triton's interpreter, on the CPU, unless there is a GPU; then they run on it.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_model
from transformers import LlamaConfig

import helpers.cache.attention.dispatch as attention
from helpers.cache.balance import Balance
from helpers.cache.kv_cache import PACKED_ATTENTION, PackedKVCache
from helpers.cache.layer import PackedStates
from helpers.cache.tokens import EMPTY
from helpers.io.paths import ROOT

GPU = torch.cuda.is_available()
IMPLEMENTATIONS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("numba_cpu", "cpu"), id="numba"),
    pytest.param(("numba_cpu", "cpu", 2), id="numba, 2 threads"),
    pytest.param(
        ("triton_cuda", "cpu"),
        id="triton interpreted",
        marks=pytest.mark.skipif(GPU, reason="where there is a GPU, Triton compiles for it and interprets nothing"),
    ),
    pytest.param(
        ("triton_cuda", "cuda"), id="triton", marks=pytest.mark.skipif(not GPU, reason="this machine has no GPU")
    ),
]
ABSOLUTE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # of outputs of about 1: their rounding


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """The module of an implementation and the device on which it runs."""
    name, device, *threads = request.param
    module = import_module(f"helpers.cache.attention.{name}")
    if hasattr(module, "prepare"):
        module.prepare()
    before = torch.get_num_threads()
    torch.set_num_threads(*threads or [1])
    yield module, device
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A cache and a query: what was stored, how, and what has become of it."""

    tokens: int = 48
    bits: object = 4  # a width, a pair, or "mixed": each row chooses for each token
    pending: bool = False
    settle: tuple | None = None  # (target, blocks, keep) after a pending commit
    then: object = None  # width of a second commit
    crop: int = 0
    padding: tuple[int, ...] = ()  # of each row, on the left
    additive: bool = False  # how the mask is written
    rows: int = 1
    kv_heads: int = 2
    groups: int = 1
    head_dim: int = 32
    queries: int = 1
    dtype: torch.dtype = torch.float32
    quantizer: str = "rotated"
    block: int = 8
    sinks: int = 4
    centre: str = "rotary"
    balanced: bool = False
    partial: float = 1.0  # share of a head that rotary embedding turns; 0 for a model without
    softcap: float | None = None
    aside: bool = False  # with scores of nothing, as gpt-oss has

    @property
    def special(self) -> dict[str, object]:
        heads = self.kv_heads * self.groups
        return {"softcap": self.softcap, "s_aux": torch.linspace(-1, 3, heads) if self.aside else None}


BASE = Case()
CODINGS = {
    "no sinks": {"sinks": 0},
    "not centred": {"centre": "none"},
    "neither": {"sinks": 0, "centre": "none"},
    "only balanced": {"sinks": 0, "centre": "none", "balanced": True},
    "balanced": {"balanced": True},
    "balanced, partial rotary": {"balanced": True, "partial": 0.25},
    "balanced, no rotary": {"balanced": True, "partial": 0},
}
CODED = {
    "": {},
    ", 3 groups, 4 queries": {"groups": 3, "queries": 4, "bits": (4, 2)},
    ", mixed, 3 rows, padded": {"bits": "mixed", "rows": 3, "padding": (0, 5, 13), "groups": 3, "head_dim": 80},
    ", settled, some kept": {"bits": 8, "pending": True, "settle": (2, 4, 3), "then": "mixed"},
    ", settled, padded": {"bits": 4, "pending": True, "settle": (2, 4, 3), "rows": 3, "padding": (0, 5, 11)},
    ", cropped into the sinks": {"crop": 46, "bits": (4, 8), "groups": 3},
}
SPECIAL = {
    "capped": {"softcap": 1.5},
    "with scores of nothing": {"aside": True},
    "capped, with scores of nothing": {"softcap": 1.5, "aside": True},
}
CASES = {
    **{f"{bits} bits": replace(BASE, bits=bits) for bits in (2, 4, 8, 16)},
    **{f"{bits} bits, 3 groups": replace(BASE, bits=bits, groups=3, head_dim=64) for bits in (2, 4, 8, 16)},
    **{f"keys {k}, values {v}": replace(BASE, bits=(k, v)) for k, v in ((8, 2), (2, 16), (16, 4))},
    "keys 4, values 8, 3 groups": replace(BASE, bits=(4, 8), groups=3),
    **{f"head_dim {dim}": replace(BASE, head_dim=dim, kv_heads=1) for dim in (64, 80, 128, 256)},
    **{f"head_dim {dim}, 4 groups": replace(BASE, head_dim=dim, kv_heads=1, groups=4) for dim in (32, 80, 128)},
    "head_dim 80 at 2 bits": replace(BASE, head_dim=80, bits=2, kv_heads=1),
    "8 groups": replace(BASE, groups=8, kv_heads=1),
    "min-max": replace(BASE, quantizer="minmax", bits=(4, 2)),
    "min-max, 3 groups": replace(BASE, quantizer="minmax", groups=3),
    "mixed": replace(BASE, bits="mixed"),
    "mixed, 3 rows": replace(BASE, bits="mixed", rows=3),
    "mixed, 3 rows, 3 groups": replace(BASE, bits="mixed", rows=3, groups=3),
    "two commits": replace(BASE, bits=8, then=(4, 2)),
    "pending": replace(BASE, bits=8, pending=True),
    "pending, 3 groups": replace(BASE, bits=8, pending=True, groups=3),
    "pending at 16 bits": replace(BASE, bits=16, pending=True),
    "settled": replace(BASE, bits=8, pending=True, settle=(2, 4, 0)),
    "settled, some kept": replace(BASE, bits=8, pending=True, settle=(2, 4, 3), then="mixed"),
    "settled, some kept, 3 groups": replace(BASE, bits=(8, 4), pending=True, settle=((4, 4), 4, 3), groups=3),
    "settled, 3 rows": replace(BASE, bits=4, pending=True, settle=(2, 4, 3), rows=3, padding=(0, 5, 11)),
    "cropped": replace(BASE, bits="mixed", rows=3, crop=20),
    "cropped, pending": replace(BASE, tokens=72, bits=8, pending=True, settle=(2, 4, 3), crop=21, groups=3),
    "padded": replace(BASE, rows=3, padding=(0, 13, 30)),
    "padded, additive": replace(BASE, rows=3, padding=(0, 13, 30), additive=True, groups=3),
    "padded, mixed": replace(BASE, rows=3, padding=(9, 0, 30), bits="mixed", groups=4),
    "padded, pending": replace(BASE, rows=3, padding=(9, 0, 30), bits=8, pending=True),
    "4 queries": replace(BASE, queries=4),
    "4 queries, 3 groups": replace(BASE, queries=4, groups=3, bits="mixed", rows=3),
    "4 queries, padded": replace(BASE, queries=4, rows=3, padding=(0, 13, 30), bits=(8, 2)),
    "4 queries, padded, additive": replace(BASE, queries=4, rows=3, padding=(3, 0, 30), additive=True, groups=3),
    "4 queries, pending": replace(BASE, queries=4, bits=8, pending=True, groups=3),
    "20 query rows": replace(BASE, queries=5, groups=4, kv_heads=1),
    "float16": replace(BASE, dtype=torch.float16, bits="mixed"),
    "float16, 3 groups": replace(BASE, dtype=torch.float16, bits="mixed", groups=3),
    "bfloat16": replace(BASE, dtype=torch.bfloat16, bits="mixed"),
    "bfloat16, 3 groups": replace(BASE, dtype=torch.bfloat16, bits="mixed", groups=3, padding=(7,)),
    **{f"{name}{more}": replace(BASE, **how, **case) for more, case in CODED.items() for name, how in CODINGS.items()},
    **{
        f"{name}{more}": replace(BASE, **how, **case)
        for more, case in {"": {}, **dict(list(CODED.items())[1:4])}.items()
        for name, how in SPECIAL.items()
    },
    "capped, several pieces, with scores of nothing": replace(
        BASE, tokens=690, block=64, groups=3, pending=True, bits=8, softcap=1.5, aside=True
    ),
    "several pieces": replace(BASE, tokens=690, bits=4, then=2, block=64),
    "several pieces, 3 groups": replace(BASE, tokens=690, bits=8, pending=True, block=64, groups=3),
}

# Combinations that Triton's interpreter, to which each is seconds, leaves out unless TRITON_CASES=all: of every coding
# two in three, so that each still meets several cases and each case several codings. A GPU and all others run all.
THINNED = {
    name + more
    for names in (CODINGS, SPECIAL)
    for i, name in enumerate(names)
    for j, more in enumerate(CODED)
    if (i + j) % 3 and os.environ.get("TRITON_CASES") != "all"
}


def build(case: Case, device: str = "cpu", seed: int = 0) -> tuple[PackedStates, torch.Tensor, torch.Tensor | None]:
    """The second of two layers of a cache, a query of its newest tokens, and the mask."""
    heads = case.kv_heads * case.groups
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=case.kv_heads, head_dim=case.head_dim,
        hidden_size=heads * case.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": case.partial},
    )  # fmt: skip
    config._attn_implementation = PACKED_ATTENTION
    generator = torch.Generator().manual_seed(seed)
    balance = None
    if case.balanced:
        moments = torch.randn(2, 2, case.kv_heads, 2 * case.head_dim, case.head_dim, generator=generator)
        balance = Balance.of_moments(*(moments.mT @ moments))
    coding = {"sinks": case.sinks, "centre": case.centre, "balance": balance}
    cache = PackedKVCache(config, block=case.block, quantizer=case.quantizer, **coding)
    cache.record_received = case.pending
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    def feed(tokens: int) -> None:
        shape = (case.rows, case.kv_heads, tokens, case.head_dim)
        for layer in cache.layers:
            layer.update(numbers(*shape) + 0.5, numbers(*shape))

    def commit(bits: object, pending: bool = False) -> None:
        if bits == "mixed":
            bits = rng.choice([2, 4, 8, 16], size=(case.rows, cache.committable))
        cache.commit(bits, pending=pending)

    visible = torch.ones(case.rows, case.tokens + 40, dtype=torch.bool, device=device)
    for row, hidden in enumerate(case.padding):
        visible[row, :hidden] = False
    cache.visible = visible[:, : case.tokens] if case.padding else None
    feed(case.tokens)
    commit(case.bits, case.pending)
    if case.settle:
        target, blocks, keep = case.settle
        chosen = numbers(2, case.rows, case.kv_heads, blocks * case.block)
        scores = (lambda demotion: chosen[..., -demotion.key_error.shape[-1] :]) if keep else None
        cache.settle(case.bits, target, blocks, keep, scores)
    if case.then:
        feed(2 * case.block)
        commit(case.then)
    if case.crop:
        cache.crop(-case.crop)
    feed(max(case.queries, 5))
    states = cache.states(1)
    query = numbers(case.rows, heads, case.queries, case.head_dim)
    if not case.padding:
        return states, query, None
    length = cache.get_seq_length()
    at = torch.arange(length, device=device)
    mask = visible[:, None, None, :length] & (at <= at[length - case.queries :, None])
    if case.additive:
        mask = torch.zeros(mask.shape, dtype=case.dtype, device=device).masked_fill(~mask, torch.finfo(case.dtype).min)
    return states, query, mask


def dense_weights(
    states: PackedStates,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
):
    """Attention `[B, H, G, Q, tokens]` over the dequantized tokens in text order, and their values, in float64."""
    committed = states.store.dense(states.layer, states.cache.committed)
    tails = states.tail_keys, states.tail_values
    keys, values = (torch.cat([x.double(), tail.double()], 2) for x, tail in zip(committed, tails, strict=True))
    scores = query.double().unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None].mT * scaling
    queries, length = scores.shape[-2:]
    at = torch.arange(length, device=query.device)
    seen = (at <= at[length - queries :, None])[None, None]
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask == 0
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp().masked_fill(~seen[:, :, None], 0.0)
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + (s_aux.to(scores).view(*scores.shape[1:3], 1, 1) - top).exp()
    return weights / total, values, seen


def received_of(states: PackedStates) -> list[torch.Tensor]:
    parts = [part for _, part in states.segments if part.buffers.received is not None]
    return [part.used(states.layer).received.double() for part in parts]


@pytest.mark.parametrize("name", CASES)
def test_attention_is_dense_attention_over_what_is_stored(implementation, name):
    module, device = implementation
    if name in THINNED and module.__name__.endswith("triton_cuda") and device == "cpu":
        pytest.skip("one in three of these in Triton's interpreter; TRITON_CASES=all runs them")
    case = CASES[name]
    states, query, mask = build(case, device)
    scaling = case.head_dim**-0.5
    special = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.special.items()}
    weights, values, seen = dense_weights(states, query, mask, scaling, **special)
    if module.__name__ != "helpers.cache.attention.reference":
        assert module.supports(query, states, mask, True)
    before = received_of(states)
    output, variance = module.packed_attention(query, states, mask, scaling, record_variance=True, **special)

    expected = (weights @ values[:, :, None]).flatten(1, 2)
    assert output.dtype == case.dtype
    assert output.shape == expected.shape
    assert (output.double() - expected).abs().max() < ABSOLUTE[case.dtype]

    count = seen.sum(-1).double()
    spread = weights.square().sum(-1).flatten(1, 2).mean(1) / count[:, 0]
    spread -= weights.sum(-1).square().flatten(1, 2).mean(1) / count[:, 0].square()
    assert torch.allclose(variance.double(), spread, rtol=2e-4, atol=1e-9)

    assert bool(before) == case.pending
    share = weights.sum((2, 3))  # [B, H, tokens]
    recorded = [part for _, part in states.segments if part.buffers.received is not None]
    for segment, was, now in zip(recorded, before, received_of(states), strict=True):
        at = segment.used(states.layer).positions().clamp(max=share.shape[-1] - 1)
        empty = segment.used(states.layer).token == EMPTY
        added = share.gather(-1, at).masked_fill(empty, 0.0)
        assert added.sum() > 0
        assert torch.allclose(now, was + added, rtol=1e-3, atol=1e-4)  # kept in half precision
        assert (segment.used(0).received == 0).all()  # the other layer's


def test_cases_hold_what_they_are_for():
    """Empty slots, several buckets, both kinds of neighbours: otherwise the test above would pass for nothing."""
    for name in ("mixed, 3 rows", "cropped", "4 queries, 3 groups"):
        assert any(segment.ragged for _, segment in build(CASES[name])[0].segments), name
    assert len({stage for stage, _ in build(CASES["mixed"])[0].segments}) == 4
    settled = build(CASES["settled, some kept"])[0]
    assert {stage.pending for stage, _ in settled.segments} == {True, False}
    assert {(stage.key_bits, stage.pending) for stage, _ in settled.segments} >= {(8, True), (8, False), (2, False)}


def test_a_sequence_that_sees_nothing_gives_zeros(implementation):
    module, device = implementation
    states, query, mask = build(replace(BASE, rows=2, padding=(0, 3), groups=3, queries=2), device)
    mask[1, :, 0] = False
    output, variance = module.packed_attention(query, states, mask, 0.2, record_variance=True)
    assert (output[1, :, 0] == 0).all()
    assert variance[1, 0] == 0
    assert output.isfinite().all()
    assert (output[0] != 0).all()


def test_query_strides_do_not_matter(implementation):
    """Models hand over a transposed view of their projections."""
    module, device = implementation
    states, query, mask = build(replace(BASE, rows=2, groups=3, queries=2), device)
    expected, _ = module.packed_attention(query, states, mask, 0.2)
    view = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not view.is_contiguous()
    assert torch.allclose(module.packed_attention(view, states, mask, 0.2)[0], expected, atol=1e-6)


@pytest.mark.parametrize("change", ["commit", "crop", "rows", "settle"])
def test_what_is_derived_from_the_store_follows_its_changes(implementation, change):
    module, device = implementation
    states, query, _ = build(replace(BASE, rows=2, bits=8, pending=True), device)
    cache = states.cache
    cache.record_received = False
    module.packed_attention(query, states, None, 0.2)
    if change == "commit":
        for layer in cache.layers:
            layer.update(*(torch.randn(2, 2, 8, 32, device=device) for _ in range(2)))
        cache.commit(2)
    elif change == "crop":
        cache.crop(-20)
    elif change == "rows":
        cache.map_rows(torch.tensor([1, 0], device=device))
    else:
        cache.settle(8, (4, 2), blocks=3)
    if change == "crop":
        for layer in cache.layers:
            layer.update(*(torch.randn(2, 2, 1, 32, device=device) for _ in range(2)))
    states = cache.states(1)
    weights, values, _ = dense_weights(states, query, None, 0.2)
    output, _ = module.packed_attention(query, states, None, 0.2)
    assert (output - (weights @ values[:, :, None]).flatten(1, 2)).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["numba_cpu", "triton_cuda"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": torch.float64}, "double precision"),
        ({"queries": 40}, "many queries"),
        ({"pending": True, "queries": 9}, "received attention of a tail of more than a block"),
    ],
)
def test_what_a_fast_implementation_does_not_serve_goes_to_the_reference(name, changes, why, monkeypatch):
    module = import_module(f"helpers.cache.attention.{name}")
    monkeypatch.setattr(attention, "implementation", lambda device: module)
    states, query, mask = build(replace(BASE, **changes))
    assert attention.choose(query, states, mask, False) is attention.packed_attention, why
    states, query, mask = build(BASE)
    assert attention.choose(query, states, mask, False) is module.packed_attention


@pytest.mark.skipif(GPU, reason="where there is a GPU, Triton compiles for it and interprets nothing")
def test_a_model_decodes_alike_through_triton_and_through_the_reference(monkeypatch):
    """Every layer, every step, commits in between: the table is made once a block."""
    module = import_module("helpers.cache.attention.triton_cuda")
    model, ids = tiny_model("llama"), random_ids(1, 27)
    tables = []
    make = torch.from_numpy
    monkeypatch.setattr(module.torch, "from_numpy", lambda array: tables.append(1) or make(array))
    logits = []
    for chosen in (None, module):
        monkeypatch.setattr(attention, "implementation", lambda device, chosen=chosen: chosen)
        cache = PackedKVCache(model.config, bits=4, block=8)
        with torch.no_grad():
            model(input_ids=ids[:, :20], cache=cache)
            steps = [model(input_ids=ids[:, i : i + 1], cache=cache).logits for i in range(20, 27)]
        logits.append(torch.cat(steps, 1))
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert cache.committed == 24
    assert len(tables) == 2


@pytest.mark.skipif(not GPU, reason="this machine has no GPU")
def test_nothing_is_read_back_from_the_gpu():
    module = import_module("helpers.cache.attention.triton_cuda")
    states, query, mask = build(replace(BASE, bits="mixed", rows=3, padding=(0, 13, 30)), "cuda")
    expected, _ = module.packed_attention(query, states, mask, 0.2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = module.packed_attention(query, states, mask, 0.2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_the_compiler_the_reference_serves_after_one_printed_line(device, monkeypatch, capsys):
    compiler, name = {"cpu": ("numba", "numba_cpu"), "cuda": ("triton", "triton_cuda")}[device]
    for module in [
        m for m in sys.modules if m == compiler or m.startswith((f"{compiler}.", f"helpers.cache.attention.{name}"))
    ]:
        monkeypatch.setitem(sys.modules, module, None)
    attention.implementation.cache_clear()
    try:
        assert attention.implementation(device) is None
        assert attention.implementation(device) is None
        if device == "cpu":
            states, query, mask = build(BASE)
            assert attention.choose(query, states, mask, False) is attention.packed_attention
    finally:
        attention.implementation.cache_clear()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"packed attention: {name} cannot run here, plain PyTorch is used" in printed


AHEAD_OF_TIME = '''
import os
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from helpers.cache.attention import triton_cuda
from test_attention import BASE, build, replace

os.environ["TRITON_INTERPRET"] = "0"  # what came with the tests' settings
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.uint8: "*u8"}

class Compiled:
    """Compiles for compute capability 9.0 what would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps, enable_fp_fusion, **constants):
        signature, attributes = {}, {}
        for i, (name, value) in enumerate(zip(self.kernel.arg_names, arguments)):
            if value is None:
                signature[name], constants[name] = "constexpr", None
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[i,] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        signature |= dict.fromkeys(constants, "constexpr")
        signature = {name: signature[name] for name in self.kernel.arg_names}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(done.asm["cubin"]) > 1000
        print(self.kernel.fn.__name__, "compiled", *tiles_ahead(done.asm["ttgir"]))

def tiles_ahead(text):
    """Of each loop over tiles: how many arrays it fetches ahead."""
    loops, inside, fetched = [], None, 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line and inside is None:
            inside, fetched = indent, 0
        elif inside == indent and "}" in line:
            loops, inside = [*loops, fetched] if "num_stages" in line else loops, None
        elif inside is not None:
            fetched += "async_copy_global_to_local" in line
    return loops

triton_cuda._attend, triton_cuda._combine = Compiled(triton_cuda._attend), Compiled(triton_cuda._combine)
triton_cuda.WIDTHS = (4, 16)
shape = replace(BASE, head_dim=64, dtype=torch.bfloat16)
for case in (replace(shape, pending=True), replace(shape, groups=4, rows=2, padding=(0, 5))):
    states, query, mask = build(case)
    triton_cuda.packed_attention(query, states, mask, 0.125, record_variance=True)
'''


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """As they would be launched, for one query row a head and for several; whole tiles are fetched ahead."""
    if not (Path(import_module("triton").__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this build of Triton brings no assembler for NVIDIA GPUs")
    environment = {
        "PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path),
        "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if "compiled" in line]
    assert [line[0] for line in lines] == ["_attend", "_combine"] * 2
    for name, _, *fetched in lines:
        if name == "_attend":  # keys and values of the tail and of full width; of codes the scales as well
            assert len(fetched) == 3
            assert min(map(int, fetched)) >= 2
            assert max(map(int, fetched)) >= 4
