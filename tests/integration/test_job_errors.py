"""A wrong setting or input of a job gives one line with the error, and leaves no files behind."""

import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.tiny_training import NAME, ROOT, fill

# The jobs run in this process, and this process has already imported some of their modules.
pytestmark = pytest.mark.filterwarnings("ignore:'jobs.* found in sys.modules")

TOKENIZER = ["jobs.train.tokenizer", f"--dataset={NAME}", "--name=new", "--vocab-size=300"]
PRETRAIN = [
    "jobs.train.pretrain", f"--dataset={NAME}", f"--tokenizer={NAME}", "--model=new", "--depth=1", "--head-dim=16",
    "--context-length=32", "--batch-tokens=64", "--steps=2", "--no-compile", "--threads=1",
]  # fmt: skip
SFT = ["jobs.train.sft", f"--model={NAME}", f"--mixture={NAME}", "--steps=2", "--no-compile", "--threads=1"]
PIPELINE = ["jobs.train.pipeline", "--recipe=small", "--model=new"]
CONVERT = ["jobs.train.dataset", "convert", "--dataset=new"]
DOWNLOAD = ["jobs.train.dataset", "download", "--dataset=new"]
CHAT = ["jobs.eval.chat", f"--model={NAME}"]
BENCH = ["jobs.eval.bench_engine"]
REPORT = ["jobs.eval.report", f"--model={NAME}", "--recipe=demo"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("filled") / "home"
    store = fill(home)
    tokenizer = Tokenizer.from_json(store.read(f"tokenizers/{NAME}/tokenizer.json"))
    model = GPT(ModelConfig.from_depth(1, vocab_size=tokenizer.vocab_size, head_dim=16, context_length=32))
    meta = {"dtype": "float32", "plan": {"batch_tokens": 64}}
    save_checkpoint(store, CheckpointRef(NAME, "base", 1), model=model, tokenizer=tokenizer, meta=meta)
    return home


@pytest.fixture
def home(filled: Path, tmp_path: Path) -> Path:
    shutil.copytree(filled, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("NANOCHAT_", "AWS_"))]:
        monkeypatch.delenv(name)


def files(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.rglob("*")}


def error_of(home: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr of ``python -m`` that is not a log event. The exit code must be 2."""
    module, *arguments = command
    if not any(argument.startswith("--home") for argument in arguments):
        arguments.append(f"--home={home}")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    output = capfd.readouterr()
    assert output.out == ""
    (line,) = [line for line in output.err.splitlines() if not line.startswith("{")]
    assert line.startswith(f"python -m {module}: error: ")
    return line


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["jobs.train.tokenizer", "--name=x"], "--dataset (or NANOCHAT_TOKENIZER_DATASET) is required"),
        ([*TOKENIZER, "--vocab-size=100"], "--vocab-size is 100; it must be at least 265"),
        ([*TOKENIZER, "--vocab-size=many"], "--vocab-size is 'many', which is not a whole number"),
        ([*TOKENIZER, "--bytes-per-token=0"], "--bytes-per-token is 0; it must be at least 1"),
        ([*TOKENIZER, "--dataset=missing"], "data/missing in {home} holds 0 parquet shard(s)"),
        ([*TOKENIZER, "--dataset=../x"], "'data/../x/dataset.json' is no key of the store"),
        ([*TOKENIZER, "--name=../../x"], "'../../x' cannot name a tokenizer; use letters, digits"),
        ([*TOKENIZER, "--name="], "--name is empty; it is required: name to save the tokenizer under"),
        ([*TOKENIZER, "--name=."], "'.' cannot name a tokenizer"),
        ([*TOKENIZER, "--name=a b"], "'a b' cannot name a tokenizer"),
        ([*TOKENIZER, f"--name={'x' * 300}"], "cannot name a tokenizer: it is longer than 200 characters"),
        ([*TOKENIZER, "--dataset="], "--dataset is empty"),
        ([*TOKENIZER, "--dataset=."], "'data/./dataset.json' is no key of the store"),
        ([*TOKENIZER, "--home="], "the store URL '' is neither a folder nor s3://bucket/prefix"),
        ([*TOKENIZER, "--home=~nobody-of-this-name/x"], "there is no such user's home folder"),
        ([*TOKENIZER, f"--home=/{'x' * 5000}"], "File name too long"),
        (
            [*TOKENIZER, "--home=ftp://host/x"],
            "the store URL 'ftp://host/x' is neither a folder nor s3://bucket/prefix",
        ),
        ([*TOKENIZER, "--home=s3://"], "names no bucket"),
        ([*TOKENIZER, "--home={home}/data/tiny/dataset.json"], "cannot be made"),
        ([*TOKENIZER, "--log-level=loud"], "--log-level is 'loud'; choose one of debug, info, warning, error"),
        ([*PRETRAIN, "--dataset=missing"], "data/missing in {home} holds 0 parquet shard(s)"),
        ([*PRETRAIN, "--tokenizer=missing"], "there is no tokenizer 'missing' in {home}; train it with"),
        ([*PRETRAIN, "--model=../x"], "'../x' cannot name a model"),
        ([*PRETRAIN, "--depth=0"], "--depth is 0; it must be at least 1"),
        ([*PRETRAIN, "--depth=1000000"], "--depth is 1000000; it must be at most 1000"),
        ([*PRETRAIN, "--depth=900"], "a model of depth 900 and width 57600 has more than 35,8"),
        ([*PRETRAIN, f"--steps={'9' * 30}"], "it must be at most 9223372036854775807"),
        ([*PRETRAIN, "--head-dim=15"], "head_dim 15 is odd"),
        ([*PRETRAIN, "--window-pattern=SX"], "window_pattern 'SX' may hold only S and L"),
        ([*PRETRAIN, "--batch-tokens=100"], "a batch of 100 tokens is not a whole number of rows of 32"),
        ([*PRETRAIN, "--lr-scale=nan"], "--lr-scale is nan"),
        ([*PRETRAIN, "--weight-decay=-1"], "--weight-decay is -1.0; it must be at least 0"),
        ([*PRETRAIN, "--seed=-1"], "--seed is -1; it must be at least 0"),
        ([*PRETRAIN, "--seed=99999999999999999999"], "--seed is 99999999999999999999; it must be at most"),
        ([*PRETRAIN, "--device=tpu"], "--device is 'tpu'; choose one of auto, cpu, cuda"),
        ([*PRETRAIN, "--dtype=int8"], "--dtype is 'int8'; choose one of auto, fastest, fp32, bf16, fp16, fp8"),
        ([*PRETRAIN, "--device=cpu", "--dtype=fp8"], "dtype fp8 needs a GPU of compute capability 9.0"),
        ([*PRETRAIN, "--device=cpu", "--dtype=fp16"], "dtype fp16 needs a GPU; use fp32 or bf16 on a CPU"),
        ([*PRETRAIN, "--device=cpu", "--attention=flash"], "attention flash needs a GPU; use auto or sdpa on a CPU"),
        ([*PRETRAIN, "--lr-scale=inf"], "--lr-scale is inf; it must be a finite number"),
        ([*PRETRAIN, "--weight-decay=1e999"], "--weight-decay is inf; it must be a finite number"),
        ([*PRETRAIN, "--rank-timeout=1e300"], "--rank-timeout is 1e+300; it must be at most 10000000.0"),
        ([*PRETRAIN, "--threads=1000000000"], "--threads is 1000000000; it must be at most 4096"),
        ([*PRETRAIN, "--loader-workers=1000000000"], "--loader-workers is 1000000000; it must be at most 1024"),
        ([*PRETRAIN, f"--steps={'9' * 5000}"], "which is not a whole number"),
        ([*PRETRAIN, f"--dataset={NAME}:1e300"], "the weight 1e300; it must be at most 1,000,000"),
        ([*PRETRAIN, "--tokenizer=."], "'tokenizers/./tokenizer.json' is no key of the store"),
        ([*PRETRAIN, f"--model={'x' * 300}"], "cannot name a model: it is longer than 200 characters"),
        ([*PRETRAIN, "--track=excel"], "--track has no 'excel'; choose from tensorboard, wandb"),
        ([*PRETRAIN, "--track=wandb"], "--track wandb needs the package wandb; run: pip install wandb"),
        ([*PRETRAIN, "--keep=0"], "--keep is 0; it must be at least 1"),
        ([*PRETRAIN, "--rank-timeout=0"], "--rank-timeout is 0.0; it must be at least 1"),
        ([*PRETRAIN[:-4], "--ratio=0"], "--ratio is 0.0; it must be at least"),
        ([*PRETRAIN[:-4], "--ratio=inf"], "--ratio is inf"),
        ([*PRETRAIN[:-4], "--target-flops=1e5"], "the horizon is shorter than one batch of"),
        ([*SFT, "--model=missing"], "model 'missing' has no base checkpoint; run python -m jobs.train.pretrain first"),
        ([*SFT, "--mixture=missing"], "there is no train.jsonl in {home}/data/missing"),
        ([*SFT, "--batch-tokens=100"], "a batch of 100 tokens is not a whole number of rows of 32"),
        ([*SFT, "--epochs=inf"], "--epochs is inf"),
        ([*SFT, f"--mixture={NAME}:1e300"], "the weight 1e300; it must be at most 1,000,000"),
        ([*PIPELINE, "--recipe=huge"], "--recipe is 'huge'; choose one of demo, small"),
        (PIPELINE, "recipe small needs text: give --data FILE_OR_FOLDER"),
        ([*PIPELINE, "--data=missing.txt"], "missing.txt does not exist; give a file, a pattern in quotes"),
        ([*PIPELINE, "--data={home}/models"], "item 1 has no 'text' field; it has format, files"),
        ([*PIPELINE, f"--data={'x' * 300}"], "cannot be read: File name too long"),
        ([*PIPELINE, "--data=~nobody-of-this-name/x"], "there is no such user's home folder"),
        ([*PIPELINE, "--ranks=1000000"], "--ranks is 1000000; it must be at most 1024"),
        ([*CONVERT, "--data="], "--data is empty"),
        ([*CONVERT, "--data=/dev/zero"], "/dev/zero is neither a file nor a folder"),
        ([*CONVERT, "--data={home}", "--dataset=a/b"], "'a/b' cannot name a dataset"),
        ([*CONVERT, "--data={home}", "--dataset=a,b"], "'a,b' cannot name a dataset"),
        ([*CONVERT, "--data={home}", "--dataset=a\nb"], "'a\\nb' cannot name a dataset"),
        ([*DOWNLOAD, "--shards=0-999999999999"], "--shards names shard 999999999999; the last possible one is 99999"),
        ([*DOWNLOAD, "--source-shards=1000000000000"], "--source-shards is 1000000000000; it must be at most 100000"),
        ([*DOWNLOAD, "--source=http://x/{{shard:99999d}}"], "has no place for the shard's number"),
        ([*DOWNLOAD, "--source=http://x/{{shard.x}}"], "has no place for the shard's number"),
        ([*PIPELINE, "--val-data=x.txt"], "--val-data is the validation text beside --data; give --data too"),
        ([*PIPELINE, "--recipe=demo", "--data=x.txt"], "recipe demo makes its own data; leave --data out"),
        ([*PIPELINE, "--model=a/b"], "'a/b' cannot name a model"),
        ([*CHAT, "--model=missing"], "model 'missing' has no sft checkpoint in {home}; train or import it first"),
        ([*CHAT, "--revision=newest"], "'newest' names no checkpoint; use <stage>/step_<n>"),
        ([*CHAT, "--revision=sft/step_7"], "there is no checkpoint models/tiny/sft/step_000007"),
        ([*CHAT, "--recipe=huge", "--revision=base/step_1"], "there is no recipe 'huge'; choose one of demo, small"),
        ([*CHAT, "--items=-1"], "--items is -1; it must be at least 0"),
        ([*CHAT, "--stage=rl"], "model 'tiny' has no rl checkpoint in {home}; train or import it first"),
        ([*CHAT, "--tasks=chess"], "there is no task 'chess'; choose from demo, mmlu, arc-easy"),
        ([*CHAT, "--tasks=gsm8k"], "in {home}/data/gsm8k: hf download openai/gsm8k"),
        ([*CHAT, "--tasks=gsm8k", "--data={home}/no"], "--data {home}/no is no folder"),
        ([*CHAT, "--tasks=own.jsonl"], "the file own.jsonl does not exist"),
        ([*CHAT, "--samples=2"], "2 greedy answers are all the same; give a --temperature above 0"),
        (
            [*CHAT, "--samples=99", "--temperature=1"],
            "--samples 99 are generated together, so --batch must",
        ),
        (BENCH, "give one of --model, --depth and --endpoint"),
        ([*BENCH, "--depth=2", "--mixes=wild"], "--mixes has wild; choose from fixed, mixed, samples, prefix"),
        ([*BENCH, "--depth=2", "--device=cpu", "--dtype=fp16"], "--dtype is 'fp16'; choose one of auto, fp32, bf16"),
        ([*BENCH, "--model=missing"], "model 'missing' has no sft checkpoint in {home}; train or import it first"),
        ([*BENCH, "--endpoint=grpc://127.0.0.1:1"], "no engine answers at grpc://127.0.0.1:1 (UNAVAILABLE"),
        (
            [*REPORT, "--model=missing"],
            "model 'missing' has no base or sft or rl checkpoint in {home}; train or import it first",
        ),
        ([*REPORT, "--revision=sft/step_1"], "there is no checkpoint models/tiny/sft/step_000001"),
        ([*REPORT, "--price-per-hour=-1"], "--price-per-hour is -1.0; it must be at least 0"),
        (
            ["jobs.eval.gate", "--model=missing"],
            "model 'missing' has no sft or rl checkpoint in {home}; train or import it first",
        ),
        (["jobs.eval.gate", f"--model={NAME}", "--recipe=none"], "no sft or rl checkpoint"),
        (["jobs.eval.compare", NAME], "name at least two models to compare"),
        (["jobs.eval.compare", NAME, "missing"], "model 'missing' has no base or sft or rl checkpoint in {home}"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, list) else "",
)
def test_bad_settings_and_missing_inputs(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: Any, complaint: str
) -> None:
    before = files(home)
    line = error_of(home, [part.format(home=home) for part in command], monkeypatch, capfd)
    assert complaint.format(home=home) in line
    assert files(home) == before


def test_values_from_the_environment_are_named_by_their_variable(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_PRETRAIN_WARMUP_STEPS", "few")
    line = error_of(home, PRETRAIN, monkeypatch, capfd)
    assert "NANOCHAT_PRETRAIN_WARMUP_STEPS is 'few', which is not a whole number" in line


def test_asking_for_a_gpu_that_is_not_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device; use auto or cpu" in error_of(
        home, [*PRETRAIN, "--device=cuda"], monkeypatch, capfd
    )


@pytest.mark.parametrize("command", [PRETRAIN, SFT])
def test_a_taken_metrics_port(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: Any
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = error_of(home, [*command, f"--metrics-port={port}"], monkeypatch, capfd)
    assert f"--metrics-port {port} cannot be used" in line


def test_a_damaged_tokenizer(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (home / "tokenizers" / NAME / "tokenizer.json").write_text('{"format": ')
    assert "tokenizer.json is damaged" in error_of(home, PRETRAIN, monkeypatch, capfd)


@pytest.mark.parametrize("command", [TOKENIZER, PRETRAIN])
def test_a_damaged_shard(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: Any
) -> None:
    shard = home / "data" / NAME / "shard_00000.parquet"
    content = bytearray(shard.read_bytes())
    content[50 : len(content) // 2] = random.Random(1).randbytes(len(content) // 2 - 50)
    shard.write_bytes(content)
    assert f"data/{NAME}/shard_00000.parquet is damaged in row group 0" in error_of(home, command, monkeypatch, capfd)


def test_a_damaged_conversation(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    key = home / "data" / NAME / "train.jsonl"
    key.write_text(key.read_text() + '{"messages": [{"role": "user"}]}\n')
    assert f"data/{NAME}/train.jsonl:301: " in error_of(home, SFT, monkeypatch, capfd)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_bad_text_leaves_no_half_written_dataset(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    before = files(home)
    (tmp_path / name).write_bytes(b"\xff\n")
    assert name in error_of(home, [*PIPELINE, f"--data={tmp_path / name}"], monkeypatch, capfd)
    assert files(home) == before


def test_an_unknown_flag(home: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *TOKENIZER, "--vocabulary=300", f"--home={home}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("error: unrecognized arguments: --vocabulary=300")
    assert "Traceback" not in ended.stderr
