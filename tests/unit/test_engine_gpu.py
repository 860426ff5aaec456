"""The GPU kernels agree with the trained model. The tests run on a GPU if there is one, else in Triton's interpreter.

The interpreter runs one program of a kernel after another. Therefore it gets shorter prompts than a GPU, with smaller
windows, tiles and splits, so that a prompt still takes several of each. Coverage is not measured in the longest tests.
The interpreter cannot show whether the kernels compile for real devices. Therefore one test compiles every launch of a
step for several devices. This needs no GPU.
"""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_model import random_ids, random_model
from torch import Tensor

from nanochat_core import config
from nanochat_core.config import ModelConfig
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.engine.backends import gpu
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.model import GPT
from tests.support.engine_models import BYTES, SHAPES, Place, count_rows, shape_of, tiny_model

pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which this platform has not")


from nanochat_core.engine.backends.gpu import network as gpu_network
from nanochat_core.engine.backends.gpu import runner as gpu_runner
from nanochat_core.engine.backends.gpu.network import FlashKernel, GpuCache, GpuNetwork, flash_kernel
from nanochat_core.engine.backends.gpu.runner import GpuRunner

BLOCK = 16
ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Length of a prompt that is longer than a window, and of another prompt that is longer than a block.
LONG, SHORT = (150, 40) if DEVICE.type == "cuda" else (60, 24)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles in steps of more than 12 tokens. Use several splits for the last tokens of a long prompt."""
    monkeypatch.setattr(gpu_runner, "GRAPH_SIZES", (1, 2, 4, 12))
    monkeypatch.setattr(gpu_network, "SPLIT", 64 if DEVICE.type == "cuda" else 32)
    if DEVICE.type != "cuda":
        monkeypatch.setattr(gpu_network, "LARGEST_TILE", 32)
        monkeypatch.setattr(config, "WINDOW_MULTIPLE", 32)


def make_runner(model: GPT, groups: list[CacheGroup], flash: FlashKernel | None = None) -> GpuRunner:
    """A runner that uses the GPU kernels, with a cache full of NaN."""
    cache = GpuCache(model, groups, BLOCK)
    for tensor in cache.blocks:
        tensor.fill_(float("nan"))
    return GpuRunner(GpuNetwork(model, flash), cache, token_budget=512, max_running=8)


def fitted(shape: ModelConfig) -> ModelConfig:
    """The shape, with a shorter context (and a window of 32 tokens) for the interpreter."""
    return shape if DEVICE.type == "cuda" else dataclasses.replace(shape, context_length=100)


def place(shape: ModelConfig, *lengths: int, dtype: torch.dtype = torch.float32) -> tuple[Place, GPT, list[Tensor]]:
    model = random_model(fitted(shape), dtype=dtype).to(DEVICE)
    rows = [random_ids(1, length)[0] for length in lengths]
    return Place(model, rows, make_runner, BLOCK), model, rows


def expected(model: GPT, row: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(row[None].to(DEVICE))[0]
    return logits


@pytest.mark.no_cover
@pytest.mark.parametrize("shape", SHAPES if DEVICE.type == "cuda" else [SHAPES[1], shape_of(2, 64)])
def test_logits_are_those_of_the_model_in_tiles_and_token_by_token(shape: ModelConfig) -> None:
    """One step computes the prompts. Padded steps then compute tokens beyond the window, beside other sequences."""
    here, model, rows = place(shape, LONG, 1, SHORT)
    whole = here.logits((0, 0, LONG - 5), (1, 0, 1), (2, 0, SHORT - 4))
    single = [here.logits((0, LONG - 5, LONG - 4))[0]]
    pairs = here.logits((2, SHORT - 4, SHORT - 1), (0, LONG - 4, LONG - 2))
    last = here.logits((0, LONG - 2, LONG), (2, SHORT - 1, SHORT), (1, 0, 1))
    for row, parts in (
        (rows[0], (whole[0], single[0], pairs[1], last[0])),
        (rows[1], (whole[1],)),
        (rows[1], (last[2],)),
        (rows[2], (whole[2], pairs[0], last[1])),
    ):
        torch.testing.assert_close(torch.cat(parts), expected(model, row), atol=5e-3, rtol=0)


@pytest.mark.no_cover
def test_the_last_layer_of_a_large_step_computes_only_wanted_rows() -> None:
    here, model, rows = place(shape_of(2, 32, 2), LONG, SHORT, 20)
    counts = count_rows(here.runner._network._layers[-1])
    none, first = here.sampled_logits((0, 0, LONG - 20, 0), (1, 0, SHORT, 1))
    assert len(none) == 0
    second, third = here.sampled_logits((0, LONG - 20, LONG, 1), (2, 0, 20, 2))
    [nothing] = here.sampled_logits((1, 0, 20, 0))
    assert nothing.shape == (0, model.config.vocab_size)
    assert counts == [1, 3]
    for got, row in ((first, rows[1]), (second, rows[0]), (third, rows[2])):
        torch.testing.assert_close(got, expected(model, row)[-len(got) :], atol=5e-3, rtol=0)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """Slow reference for FlashAttention 3's function. It supports only the engine's arguments, one query at a time."""
    assert causal
    assert window_size[1] == 0
    assert {t.dtype for t in (cache_seqlens, page_table, cu_seqlens_q)} == {torch.int32}
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    out = torch.empty_like(q)
    shared = q.size(1) // k_cache.size(2)
    for s, (first, last) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        length = int(cache_seqlens[s])
        pages = page_table[s, : -(-length // k_cache.size(1))].long()
        keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        for token in range(first, last):
            position = length - (last - token)  # the last query is at the position of the last key
            seen = slice(max(position - window_size[0], 0), position + 1)
            k, v = (x[seen].repeat_interleave(shared, 1) for x in (keys, values))
            weights = (torch.einsum("hd,khd->hk", q[token], k) * softmax_scale).softmax(-1)
            out[token] = torch.einsum("hk,khd->hd", weights, v)
    return out


@pytest.mark.no_cover
@pytest.mark.skipif(DEVICE.type == "cuda", reason="stands in for the package, where that cannot be")
def test_steps_of_many_tokens_go_through_flash_attention_where_it_is_given() -> None:
    model = random_model(fitted(shape_of(2, 32, 2)))
    rows = [random_ids(1, length)[0] for length in (LONG, SHORT)]
    here = Place(model, rows, functools.partial(make_runner, flash=flash_attn_with_kvcache), BLOCK)
    parts = [here.logits((0, 0, LONG - 10), (1, 0, 13)), here.logits((1, 13, SHORT), (0, LONG - 10, LONG - 1))]
    for row, got in ((rows[0][: LONG - 1], (parts[0][0], parts[1][1])), (rows[1], (parts[0][1], parts[1][0]))):
        torch.testing.assert_close(torch.cat(got), expected(model, row), atol=5e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(
    DEVICE.type != "cuda" or flash_kernel(DEVICE, torch.bfloat16) is None,
    reason="needs a Hopper GPU and the package flash_attn_interface",
)
def test_the_real_flash_attention_agrees_with_the_kernels() -> None:
    model = random_model(shape_of(4, 64), dtype=torch.bfloat16).to(DEVICE)
    rows = [random_ids(1, length)[0] for length in (150, 40)]
    got = []
    for flash in (None, flash_kernel(DEVICE, torch.bfloat16)):
        here = Place(model, rows, functools.partial(make_runner, flash=flash), BLOCK)
        got.append(torch.cat(here.logits((0, 0, 150), (1, 0, 40))))
    exact = torch.cat([expected(random_model(shape_of(4, 64)).to(DEVICE), row) for row in rows])
    assert (got[1] - exact).square().mean() < 1.2 * (got[0] - exact).square().mean()


def test_flash_attention_is_for_hopper_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
    monkeypatch.setattr(
        sys.modules["flash_attn_interface"], "flash_attn_with_kvcache", flash_attn_with_kvcache, raising=False
    )
    cuda = torch.device("cuda")
    for capability, found in (((9, 0), flash_attn_with_kvcache), ((8, 0), None), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, it=capability: it)
        assert flash_kernel(cuda, torch.bfloat16) is found
        assert flash_kernel(cuda, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert flash_kernel(cuda, torch.bfloat16) is None
    assert flash_kernel(torch.device("cpu"), torch.bfloat16) is None


def test_bf16_is_as_near_to_the_model_as_pytorchs_operators_are() -> None:
    """The step is too small for the kernel with tiles, because the interpreter cannot multiply bf16 matrices."""
    shape = shape_of(2, 32, 2)
    here, model, rows = place(shape, 12, dtype=torch.bfloat16)
    logits = here.logits((0, 0, 12))[0]
    exact = expected(random_model(fitted(shape)).to(DEVICE), rows[0])
    assert (logits - exact).square().mean() < 1.1 * (expected(model, rows[0]) - exact).square().mean()


@pytest.mark.no_cover
@pytest.mark.skipif(DEVICE.type == "cuda", reason="cuBLAS takes other kernels for other numbers of rows")
def test_a_token_has_the_same_bits_alone_and_in_any_small_step() -> None:
    here, *_ = place(shape_of(2, 64), 24, 5, 9)
    here.logits((0, 0, 20))
    together = here.logits((1, 0, 4), (0, 20, 24), (2, 0, 2))
    alone = [here.logits((0, t, t + 1))[0] for t in range(20, 24)]
    assert torch.equal(together[1], torch.cat(alone))


@pytest.mark.no_cover
def test_inputs_are_at_the_same_address_in_every_step_of_a_size() -> None:
    """A graph reads its inputs at the addresses that they had when it was recorded."""
    here, *_ = place(shape_of(2, 128), 24, 5, 9)
    runner = here.runner
    assert isinstance(runner, GpuRunner)
    addresses: dict[int, set[tuple[int, ...]]] = {1: set(), 4: set(), 12: set()}
    fill = runner.inputs.fill

    def noting(*args: object, **options: object) -> object:
        step = fill(*args, **options)  # type: ignore[arg-type]
        tensors = (step.ids, step.previous_ids, step.positions, step.rows, *step.slots, *step.tables)
        addresses[step.tokens].add(tuple(tensor.data_ptr() for tensor in tensors))
        return step

    runner.inputs.fill = noting  # type: ignore[method-assign,assignment]
    for parts in ([(0, 0, 1)], [(1, 0, 1)], [(0, 1, 2), (1, 1, 3)], [(2, 0, 4)], [(0, 2, 10)], [(1, 3, 5), (2, 4, 9)]):
        here.logits(*parts)
    assert [len(places) for places in addresses.values()] == [1, 1, 1]


def test_tokens_that_fill_a_step_up_touch_no_block() -> None:
    here, *_ = place(shape_of(2, 128), 5)
    runner = here.runner
    assert isinstance(runner, GpuRunner)
    here.logits((0, 0, 5))
    for tensor, group in zip(runner.cache.keys, runner.cache.group_of, strict=True):
        written = {int(block) for block in tensor.isfinite().flatten(1).any(1).nonzero()}
        assert written == {here.sequences[0].block_tables[group][0], runner.cache.groups[group].num_blocks}


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes engines use the GPU kernels."""
    monkeypatch.setattr(gpu, "usable", lambda *_: True)


@pytest.mark.no_cover
@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_says_the_same_as_on_pytorchs_operators(overlap: bool) -> None:
    """Prompts share a beginning, some requests have a seed, and some requests must wait in the queue."""
    prompts = [[*range(20), 30 + i] for i in range(4)]
    sampling = [SamplingParams(max_tokens=4 + i, temperature=i % 2 * 1.0, seed=i) for i in range(4)]
    model, said = tiny_model(depth=1, context_length=64).to(DEVICE), []
    for kernels in (True, False):
        config = EngineConfig(
            kernels=kernels, kv_cache_bytes=1 << 20, max_running=3, overlap=overlap, speculative_tokens=0
        )
        engine = Engine(model, BYTES, config)
        assert isinstance(engine.runner, GpuRunner) is kernels
        answers = [c for [c] in engine.generate(prompts, sampling)]
        said.append([c.token_ids for c in answers])
        # One block is shared, and the common part of the next block is copied.
        assert [c.usage and c.usage.cached_prompt_tokens for c in answers] == [0, 20, 20, 20]
        engine.close()
    assert said[0] == said[1]


@pytest.mark.usefixtures("on_kernels")
def test_new_weights_are_taken_up() -> None:
    """CUDA graphs that were recorded earlier also use the new weights."""
    model = tiny_model(depth=1, context_length=32).to(DEVICE)
    engine = Engine(model, BYTES, EngineConfig(kv_cache_bytes=1 << 20, max_running=2))
    engine.warm_up()
    [[before]] = engine.generate([[1, 2]], SamplingParams(max_tokens=3))
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, 0))
    engine.update_weights(model)
    [[after]] = engine.generate([[1, 2]], SamplingParams(max_tokens=3))
    assert after.token_ids[0] == before.token_ids[0] + 1
    engine.close()


_COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, "tests/unit")
from nanochat_core.engine.backends.gpu import kernels, runner
from tests.support.engine_models import Place
from test_engine_gpu import make_runner
from test_model import random_ids, random_model
from nanochat_core.config import ModelConfig

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
capability, head_dim, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
target = GPUTarget("cuda", capability, 32)
compiled = {}

def compile_instead(self, *args, grid, warmup, **options):
    named = dict(zip(self.arg_names, args))
    constants = {name: options.pop(name) for name in list(options) if name in self.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(self.arg_names):
        value = named.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            assert value.data_ptr() % 16 == 0
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    key = self.__name__, tuple(constants.items()), tuple(signature.values())
    if key not in compiled:
        source = ASTSource(self, signature, constants, attributes)
        compiled[key] = triton.compile(source, target=target, options=options).metadata

JITFunction.run = compile_instead
shape = ModelConfig.from_depth(2, vocab_size=70, head_dim=head_dim, n_kv_head=1, context_length=200)
model = random_model(shape, dtype=dtype)
place = Place(model, [random_ids(1, 60)[0]], make_runner, 16)
place.logits((0, 0, 59))
place.runner.sizes = ()
place.logits((0, 0, 59))
names = {name for name, _, _ in compiled}
every = {name for name, value in vars(kernels).items() if isinstance(value, JITFunction) and not name.startswith("_")}
assert names == every, every - names
print(max(metadata.shared for metadata in compiled.values()))
"""


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "shared_memory"),
    [(100, 128, "bfloat16", 227), (90, 128, "bfloat16", 227), (80, 64, "float32", 163), (86, 128, "bfloat16", 99)],
)
def test_every_kernel_compiles_for_gpus_and_fits_their_shared_memory(
    capability: int, head_dim: int, dtype: str, shared_memory: int, tmp_path: Path
) -> None:
    """The limits in KiB apply to B200, H100, A100 and the RTX 30 series (CUDA C++ Programming Guide)."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(capability), str(head_dim), dtype],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= shared_memory << 10
