"""The CPU kernels agree with the trained model, and a token's bits do not depend on the rest of the batch."""

import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_model import random_ids, random_model
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.engine import Engine, EngineConfig, SamplingParams, Token
from nanochat_core.engine.backends import cpu
from nanochat_core.engine.backends.cpu import library
from nanochat_core.engine.backends.cpu.network import CpuAttention, CpuNetwork
from nanochat_core.engine.backends.runner import EagerRunner, Runner, build_runner
from nanochat_core.engine.backends.torch.network import TorchNetwork
from nanochat_core.engine.backends.weights import packs
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.kv_cache import BlockMemory
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT
from tests.support.engine_models import BYTES, SHAPES, Place, count_rows, shape_of, tiny_model

BLOCK = 16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def needs_kernels() -> None:
    """Build the kernels when a test needs them. Building them while tests are collected would delay all tests."""
    if library.load_kernels() is None:
        pytest.skip("the kernels cannot be built: no C++ compiler")


def place(
    shape: ModelConfig, *lengths: int, dtype: torch.dtype = torch.float32, int8: bool = False
) -> tuple[Place, GPT, list[Tensor]]:
    model = random_model(shape, dtype=dtype)
    rows = [random_ids(1, length)[0] for length in lengths]

    def make(model: GPT, groups: list[CacheGroup]) -> Runner:
        """A runner that uses the CPU kernels, with a cache full of NaN."""
        cache = BlockMemory(model, groups, BLOCK)
        for tensor in cache.blocks:
            tensor.fill_(float("nan"))
        return EagerRunner(CpuNetwork(model, BLOCK, int8=int8), cache, CpuAttention)

    return Place(model, rows, make, BLOCK), model, rows


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_model(shape: ModelConfig) -> None:
    here, model, rows = place(shape, 190, 1, 17, 40)
    got = here.logits(*((s, 0, len(row)) for s, row in enumerate(rows)))
    with torch.no_grad():
        for row, logits in zip(rows, got, strict=True):
            torch.testing.assert_close(logits, model(row[None])[0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_as_near_to_the_model_as_the_other_path_is(shape: ModelConfig) -> None:
    here, model, rows = place(shape, 60, dtype=torch.bfloat16)
    [logits] = here.logits((0, 0, 60))
    other, _ = build_runner(model, EngineConfig(kernels=False))
    seq = here.sequences[0]
    seq.tokens = rows[0].tolist()[:1]
    _, expected = other.run([Chunk(seq, 0, 1, rows[0].tolist()[1:])])
    with torch.no_grad():
        exact = random_model(shape)(rows[0][None])[0]
    assert logits.dtype == torch.float32
    assert (logits - exact).square().mean() < 1.1 * (expected - exact).square().mean()


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_the_same_bits_however_it_is_computed(shape: ModelConfig, dtype: torch.dtype, int8: bool) -> None:
    """Tokens are computed alone and in a batch; by decoding, and by a prefill in several steps or in one step."""
    if not packs(dtype) and not int8:
        pytest.skip("on this CPU oneDNN has no products of bf16 weights, and PyTorch's depend on the number of rows")
    here, _, rows = place(shape, 190, 33, 150, dtype=dtype, int8=int8)
    at_once = [here.logits((s, 0, len(row)))[0] for s, row in enumerate(rows)]
    together = here.logits((2, 0, 150), (0, 0, 190), (1, 0, 33))
    for logits, s in zip(together, (2, 0, 1), strict=True):
        assert torch.equal(logits, at_once[s])
    decoded = torch.cat([here.logits((0, t, t + 1))[0] for t in range(190)])
    assert torch.equal(decoded, at_once[0])
    pieces = torch.cat([here.logits((0, t, min(t + 7, 190)), (1, t % 33, t % 33 + 1))[0] for t in range(0, 190, 7)])
    assert torch.equal(pieces, at_once[0])


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param(shape_of(1, 64), id="one layer")])
def test_the_last_layer_computes_only_wanted_rows_and_no_bit_changes(shape: ModelConfig, int8: bool) -> None:
    """The steps hold the start of a prompt, a whole prompt, and a decoded token with a draft."""
    here, _, rows = place(shape, 190, 33, 150, int8=int8)
    whole = [here.logits((s, 0, len(row)))[0] for s, row in enumerate(rows)]
    counts = count_rows(here.runner.network._layers[-1])
    none, one = here.sampled_logits((0, 0, 100, 0), (1, 0, 33, 1))
    assert torch.equal(one, whole[1][-1:])
    assert len(none) == 0
    first, second, third = here.sampled_logits((0, 100, 180, 1), (1, 30, 33, 3), (2, 0, 150, 1))
    assert torch.equal(first, whole[0][179:180])
    assert torch.equal(second, whole[1][30:33])
    assert torch.equal(third, whole[2][149:150])
    [nothing] = here.sampled_logits((0, 180, 185, 0))
    assert nothing.shape == (0, shape.vocab_size)
    assert counts == [1, 5]


def test_the_number_of_threads_changes_no_bit() -> None:
    here, *_ = place(shape_of(4, 64), 190)
    one = here.logits((0, 0, 190))[0]
    torch.set_num_threads(2)
    assert torch.equal(here.logits((0, 0, 190))[0], one)


def test_a_large_batch_gives_the_bits_of_small_ones() -> None:
    source = random.Random(5)
    model, count = tiny_model(context_length=512), 90
    prompts = [[source.randrange(256) for _ in range(source.choice([5, 40, 100, 130, 250, 300]))] for _ in range(count)]
    sampling = [SamplingParams(temperature=1.0, top_k=50, seed=i, max_tokens=6, logprobs=0) for i in range(count)]

    def answers(first: int, last: int) -> list[list[Token]]:
        config = EngineConfig(kv_cache_bytes=1 << 26, max_running=last - first, token_budget=8192)
        engine = Engine(model, BYTES, config)
        return [one.tokens for (one,) in engine.generate(prompts[first:last], sampling[first:last])]

    assert answers(0, count) == [tokens for first in range(0, count, 10) for tokens in answers(first, first + 10)]


def test_the_engine_says_the_same_with_and_without_the_kernels() -> None:
    prompts = [tuple(range(i, 3 * i + 2)) for i in range(20)]
    model, said = tiny_model(head_dim=32), []
    for kernels in (True, False):
        engine = Engine(model, BYTES, EngineConfig(kernels=kernels))
        said.append([c.token_ids for [c] in engine.generate(prompts, SamplingParams(max_tokens=30))])
        engine.close()
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("head_dim", "settings", "network"),
    [
        (16, {}, CpuNetwork),
        (16, {"kernels": False}, TorchNetwork),
        (16, {"block_size": 8}, TorchNetwork),
        (24, {}, TorchNetwork),
    ],
)
def test_what_the_kernels_are_not_made_for_runs_on_pytorch(
    head_dim: int, settings: dict[str, int], network: type[object]
) -> None:
    engine = Engine(tiny_model(head_dim=head_dim), BYTES, EngineConfig(**settings))
    assert type(engine.runner.network) is network
    assert len(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0][0].token_ids) == 5
    engine.close()


@pytest.fixture(scope="module")
def file_name() -> str:
    """Name of the library's file in a cache folder."""
    path = library.find_cached()
    assert path is not None
    return path.name


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in which the cache of libraries will be made. No library is loaded or built before the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "prebuilt")
    library.load_kernels.cache_clear()
    yield tmp_path
    library.load_kernels.cache_clear()


@pytest.fixture
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds libraries in less time, for tests that do not compute with them."""
    monkeypatch.setattr(library, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in library._FLAGS))


@pytest.mark.usefixtures("quick_builds")
def test_the_library_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two threads need the library at the same time, only one of them builds it."""
    builds: list[Path] = []

    def build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
        builds.append(path)
        _build(compiler, flags, path)

    _build = library._build
    monkeypatch.setattr(library, "_build", build)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: library.find_cached(), range(2)))
    assert paths == builds * 2
    assert library.load_kernels() is not None
    built = list(fresh.rglob("*.so"))
    assert len(built) == 1
    library.load_kernels.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert library.load_kernels() is not None
    assert list(fresh.rglob("*.so")) == built


def test_without_a_compiler_there_are_no_kernels(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    assert library.load_kernels() is None
    model = tiny_model()
    assert not cpu.usable(model.config, BLOCK, torch.float32, torch.device("cpu"))


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = fresh / "kernels.cpp"
    source.write_text("int main( {")
    monkeypatch.setattr(library, "SOURCE", source)
    assert library.load_kernels() is None
    assert "cannot be built" in caplog.text
    assert "error" in caplog.records[0].__dict__["error"]
    assert not [path for path in fresh.rglob("*") if path.is_file() and path != source]


def test_a_library_that_cannot_be_loaded_is_reported(
    file_name: str, fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = fresh / "cache" / "nanochat" / "kernels" / file_name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"damaged")
    assert library.load_kernels() is None
    assert "cannot be loaded" in caplog.text


@pytest.mark.usefixtures("quick_builds")
def test_an_image_takes_libraries_along_and_the_best_that_runs_is_taken(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.main()
    assert {path.stem for path in (fresh / "prebuilt").iterdir()} == set(library.LEVELS)
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.setattr(library, "processor_features", lambda: frozenset().union(*library.LEVELS.values()))
    assert library.find_prebuilt() == fresh / "prebuilt" / "x86-64-v4.so"
    monkeypatch.setattr(library, "processor_features", lambda: frozenset(library.LEVELS["x86-64-v3"]))
    assert library.find_prebuilt() == fresh / "prebuilt" / "x86-64-v3.so"
    assert library.load_kernels() is not None
    monkeypatch.setattr(library, "processor_features", frozenset)
    assert library.find_prebuilt() is None
