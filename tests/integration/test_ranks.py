"""Training on several ranks gives the same result as on one rank. A lost rank does not make other ranks hang."""

import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_core.device import cpu_multiplies_bf16
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.training.distributed import RankLost, Ranks, joined
from tests.support.ranks import run_ranks
from tests.support.tiny_training import NAME, PRETRAIN, SFT, STEPS, Job, Jobs, OwnSignal, Result, fill

PRETRAIN_MODULE, SFT_MODULE = "jobs.train.pretrain", "jobs.train.sft"
# One rank computes two micro-batches, and two ranks compute one each. Therefore the sums are rounded equally.
FLAGS = PRETRAIN | {"depth": 2, "device-batch-rows": 4}
SFT_FLAGS = SFT | {"device-batch-rows": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prepared") / "home"
    fill(home)
    return home


@pytest.fixture
def jobs(prepared: Path, tmp_path: Path) -> Jobs:
    return on_copy(prepared, tmp_path)


@pytest.fixture(scope="module")
def one_rank(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A store in which one rank has pretrained and fine-tuned without interruption."""
    jobs = on_copy(prepared, tmp_path_factory.mktemp("one"))
    jobs.run(PRETRAIN_MODULE, FLAGS)
    jobs.run(SFT_MODULE, SFT_FLAGS)
    return jobs


def on_copy(home: Path, folder: Path) -> Jobs:
    shutil.copytree(home, folder / "home")
    (folder / "logs").mkdir()
    return Jobs(folder / "home", folder / "logs")


def finish(ranks: list[Job]) -> None:
    codes = [rank.wait() for rank in ranks]
    assert codes == [0] * len(ranks), [rank.stderr for rank in ranks]


def assert_same_run(result: Result, expected: Result) -> None:
    assert result.weights == expected.weights
    assert [point["loss"] for point in result.history] == [point["loss"] for point in expected.history]
    held_out = [point.get("val_bpb", point.get("val_loss", 0)) for point in result.history]
    assert held_out == pytest.approx([p.get("val_bpb", p.get("val_loss", 0)) for p in expected.history], rel=1e-9)


def test_two_ranks_pretrain_and_fine_tune_to_the_bit_as_one(jobs: Jobs, one_rank: Jobs) -> None:
    finish(jobs.start_ranks(2, PRETRAIN_MODULE, FLAGS))
    assert_same_run(jobs.result("base"), one_rank.result("base"))
    finish(jobs.start_ranks(2, SFT_MODULE, SFT_FLAGS))
    assert_same_run(jobs.result("sft"), one_rank.result("sft"))


def test_a_run_moves_from_one_rank_to_two_and_back(jobs: Jobs, one_rank: Jobs) -> None:
    kill = OwnSignal(signal.SIGKILL, jobs.saved("base", 12))
    assert jobs.start(PRETRAIN_MODULE, FLAGS, own_signal=kill).wait() == -signal.SIGKILL
    stop = OwnSignal(signal.SIGTERM, jobs.saved("base", 32))
    pair = jobs.start_ranks(2, PRETRAIN_MODULE, FLAGS, {0: stop})
    assert [rank.wait() for rank in pair] == [128 + signal.SIGTERM] * 2, "told to one, obeyed by all"
    assert 32 <= max(jobs.steps("base")) < STEPS
    jobs.run(PRETRAIN_MODULE, FLAGS)
    assert_same_run(jobs.result("base"), one_rank.result("base"))


def test_four_ranks_hold_their_shares_in_files_of_their_own(jobs: Jobs) -> None:
    finish(jobs.start_ranks(4, PRETRAIN_MODULE, FLAGS, steps=2, device_batch_rows=2))
    shards = sorted((jobs.home / f"models/{NAME}/base/step_000002/optim").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"rank_{rank:05d}_of_00004.safetensors" for rank in range(4)]
    sizes = [path.stat().st_size for path in shards]
    assert max(sizes) < 0.5 * sum(sizes)


def test_when_a_rank_dies_the_other_ends_with_a_code_to_restart_on_and_nothing_is_lost(
    jobs: Jobs, one_rank: Jobs
) -> None:
    pair = jobs.start_ranks(2, PRETRAIN_MODULE, FLAGS, {1: OwnSignal(signal.SIGKILL, jobs.saved("base", 8))})
    assert pair[0].wait() == RetryableError.exit_code
    (line,) = [line for line in pair[0].stderr.splitlines() if "error:" in line]
    assert "another rank has ended or did not answer in time; run again" in line
    finish(jobs.start_ranks(2, PRETRAIN_MODULE, FLAGS))
    assert_same_run(jobs.result("base"), one_rank.result("base"))


def test_a_rank_that_hangs_ends_the_job_after_the_timeout(jobs: Jobs) -> None:
    """The timeout is long enough for a busy machine, and much shorter than the default of ten minutes."""
    hang = OwnSignal(signal.SIGSTOP, jobs.saved("base", 8))
    pair = jobs.start_ranks(2, PRETRAIN_MODULE, FLAGS, {1: hang}, rank_timeout=10)
    try:
        assert pair[0].wait(120) == RetryableError.exit_code
        assert max(jobs.steps("base")) >= 8
    finally:
        pair[1].signal(signal.SIGKILL)
        pair[1].wait()


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is not a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK is not; start the job with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2; it must be from 0 to WORLD_SIZE - 1, which is 1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_does_not_say_where_to_meet_is_refused(
    jobs: Jobs, environment: dict[str, str], problem: str
) -> None:
    job = jobs.start(PRETRAIN_MODULE, FLAGS, environment=environment)
    assert job.wait() == 2
    assert problem in job.stderr


@pytest.fixture(scope="module")
def twelve_steps(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A store in which one rank has pretrained and fine-tuned for twelve steps each."""
    jobs = on_copy(prepared, tmp_path_factory.mktemp("twelve"))
    jobs.run(PRETRAIN_MODULE, FLAGS, steps=12)
    jobs.run(SFT_MODULE, SFT_FLAGS, steps=12)
    return jobs


@pytest.mark.parametrize("size", [3, 5, 6, 9])
@pytest.mark.parametrize(
    ("stage", "module", "flags"), [("base", PRETRAIN_MODULE, FLAGS), ("sft", SFT_MODULE, SFT_FLAGS)]
)
def test_any_number_of_ranks_trains_to_the_loss_of_one(
    tmp_path: Path, twelve_steps: Jobs, size: int, stage: str, module: str, flags: dict[str, Any]
) -> None:
    """The batch has eight rows. Each of three ranks gets two or three rows; with nine ranks, one rank gets no row.

    Fine-tuning starts from the model of one rank. The models of the ranks differ by rounding, and so would its losses.
    """
    jobs = on_copy(twelve_steps.home, tmp_path)
    shutil.rmtree(jobs.home / f"models/{NAME}/{stage}")
    finish(jobs.start_ranks(size, module, flags, steps=12))
    assert_close(jobs.result(stage, 12), twelve_steps.result(stage, 12))


def test_a_run_moves_from_three_ranks_to_two_to_five(jobs: Jobs, one_rank: Jobs) -> None:
    for size, until in ((3, 12), (2, 24)):
        stop = OwnSignal(signal.SIGTERM, jobs.saved("base", until))
        ranks = jobs.start_ranks(size, PRETRAIN_MODULE, FLAGS, {0: stop})
        assert [rank.wait() for rank in ranks] == [128 + signal.SIGTERM] * size
    finish(jobs.start_ranks(5, PRETRAIN_MODULE, FLAGS))
    assert_close(jobs.result("base"), one_rank.result("base"))


def assert_close(result: Result, expected: Result) -> None:
    """The losses differ only by rounding, which grows with the steps. The shares of the data shown are the same."""
    losses, alone = ([point["loss"] for point in one.history] for one in (result, expected))
    # With another number of rows, a rank uses other matrix kernels. So even the first loss is rounded differently.
    assert losses[0] == pytest.approx(alone[0], rel=1e-5)
    assert losses[:5] == pytest.approx(alone[:5], rel=2**-8 if cpu_multiplies_bf16() else 1e-3)
    assert losses == pytest.approx(alone, rel=1e-2)
    for name in ("epoch", "unseen"):
        assert [point[name] for point in result.history] == pytest.approx([point[name] for point in expected.history])


def test_a_rank_that_meets_nobody_may_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error may be temporary: the rank may have connected to an earlier run that was just ending."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        for name, value in (("WORLD_SIZE", 2), ("RANK", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, str(value))
        message = rf"rank 1 of 2 did not join the other ranks at 127\.0\.0\.1:{port}"
        with pytest.raises(RankLost, match=message) as caught, joined(torch.device("cpu"), timeout_seconds=2):
            pass
    assert caught.value.exit_code == 138


def led(ranks: Ranks) -> list[int | str | None]:
    """Two results on this rank: an action succeeds on the first rank, and another action fails on the first rank."""

    def fail() -> int:
        raise UserError(f"rank {ranks.rank} failed")

    answers: list[int | str | None] = [ranks.lead(lambda: ranks.rank + 7, 30)]
    try:
        ranks.lead(fail, 30)
    except UserError as error:
        answers.append(str(error))
    return answers


@pytest.mark.parametrize("size", [1, 3])
def test_the_first_rank_acts_and_every_rank_has_its_error(size: int) -> None:
    error = "rank 0 failed"
    assert run_ranks(size, led) == [[7, error], *[[None, error]] * (size - 1)]
