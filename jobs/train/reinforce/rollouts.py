"""Rollouts: the answers that the model samples while it is trained, and the batches made from them.

The inference engine samples the answers of a step with continuous batching. It uses the same Python tool as in serving,
and the current weights or, with ``--asynchronous``, weights that are one step older. Seeds depend only on the run's
seed, the step and the problem. So a resumed run samples the same answers again, on any number of ranks, unless the
logits of two tokens differ by no more than rounding, or an asynchronous run was stopped by a signal between two
checkpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from jobs.generation import SandboxTool, read_completion
from jobs.tasks.task import Problem
from jobs.train.batches.sources import EpochShuffle
from jobs.train.loop.stage import StageSettings
from jobs.train.reinforce.policy_gradient import RolloutBatch, advantages, pack
from jobs.train.reinforce.rewards import Reward, Rollout
from nanochat_core.chat import parse_messages, render_prompt, stop_token_ids
from nanochat_core.device import precise_dtype
from nanochat_core.engine import (
    Completion,
    Engine,
    EngineConfig,
    FinishReason,
    SamplingParams,
    ToolOutput,
    ToolPolicy,
    ToolRunner,
)
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.sandbox import SandboxConfig, SandboxExecutor
from nanochat_core.settings import setting
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import Ranks

# At most this many sequences run at a time, because with more, the engine's steps do not become cheaper per token.
_MAX_RUNNING = 256
# Time limits of a Python call in seconds. The first limit is for the code itself. The second limit includes the wait
# for a free sandbox and is long, so that a busy machine does not change any answer.
_CALL_SECONDS, _WAIT_SECONDS = 10.0, 300.0
# The engine's share of a GPU's free memory; training needs the rest.
_CUDA_MEMORY_SHARE = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings(StageSettings):
    """Settings of the rollouts in each training step."""

    examples: int = setting(16, "problems per step, all ranks together", minimum=1)
    samples: int = setting(16, "answers per problem", minimum=2)
    temperature: float = setting(1.0, "sampling temperature of the answers", minimum=0.01)
    top_k: int = setting(50, "number of most likely tokens to sample from; 0 samples from all", minimum=0)
    max_new_tokens: int = setting(256, "longest answer in tokens, tool output included", minimum=1)
    normalize: bool = setting(False, "divide advantages by the standard deviation of their problem's rewards")
    asynchronous: bool = setting(
        False, "sample the next step's answers while a step trains, from weights that are one step older"
    )

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_new_tokens)


class Answerer:
    """Answers problems with the engine and the Python tool, using the weights of the last :meth:`update_weights`."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, tool: ToolRunner, sequences: int) -> None:
        """At most ``sequences`` answers are sampled at the same time."""
        self._tokenizer, self._tool = tokenizer, SharedCalls(tool)
        running = min(sequences, _MAX_RUNNING)
        self.device = device = model.cos.device
        memory = int(torch.cuda.mem_get_info(device)[0] * _CUDA_MEMORY_SHARE) if device.type == "cuda" else None
        config = EngineConfig(
            kv_cache_bytes=memory,
            max_running=running,
            token_budget=max(EngineConfig.token_budget, 2 * running),
            tool_timeout_seconds=_WAIT_SECONDS,
        )
        self._engine = Engine(model, tokenizer, config, tool_runner=self._tool)
        self._engine.warm_up()  # warmed up now, because training does not use the device yet
        self._stop = stop_token_ids(tokenizer)

    def update_weights(self, model: GPT) -> None:
        """Use the current weights of ``model`` from now on."""
        self._engine.update_weights(model)

    def answer(
        self, problems: Sequence[Problem], seeds: Sequence[int], samples: int, sampling: SamplingParams
    ) -> list[list[Rollout]]:
        """Sample ``samples`` answers to each problem. ``seeds`` has one seed for each problem.

        An answer depends only on the problem, its seed, the number of the sample, ``sampling`` and the weights. Raises
        UserError if a problem does not fit the model's context.
        """
        self._tool.forget()
        prompts = [tuple(render_prompt(self._tokenizer, parse_messages(problem.messages))) for problem in problems]
        params = dataclasses.replace(sampling, stop_token_ids=self._stop, logprobs=0)
        each = [dataclasses.replace(params, seed=seed) for seed in seeds]
        completions = self._engine.generate(prompts, each, n=samples, tools=ToolPolicy(enabled=True))
        return [
            [self._rollout(prompt, completion) for completion in choices]
            for prompt, choices in zip(prompts, completions, strict=True)
        ]

    def close(self) -> None:
        """Stop the calls that the tool still runs."""
        self._engine.close()

    def _rollout(self, prompt: tuple[int, ...], completion: Completion) -> Rollout:
        response = read_completion(self._tokenizer, completion)
        return Rollout(
            prompt,
            tuple(completion.token_ids),
            tuple(not token.forced for token in completion.tokens),
            tuple(token.logprob or 0.0 for token in completion.tokens),
            response.text.strip(),
            response.tool_calls,
            completion.finish_reason is FinishReason.STOP,
        )


@contextlib.contextmanager
def answering(model: GPT, tokenizer: Tokenizer, sequences: int) -> Iterator[Answerer]:
    """An answerer whose Python calls run in the sandbox of this process."""
    with (
        SandboxExecutor(SandboxConfig(queue=_MAX_RUNNING)) as executor,
        contextlib.closing(Answerer(model, tokenizer, SandboxTool(executor), sequences)) as answerer,
    ):
        yield answerer


class SharedCalls:
    """A tool that runs equal code only once, until :meth:`forget` is called.

    Answers to the same problem often run the same code. Each call runs in a separate process, without any state of
    earlier calls, so equal code has equal output, unless it uses random numbers or the time. The results of calls that
    the sandbox could not run to their end, for example because they exceeded a limit, are not remembered.
    """

    def __init__(self, runner: ToolRunner) -> None:
        self._runner = runner
        self._calls: dict[str, asyncio.Task[ToolOutput]] = {}

    def forget(self) -> None:
        """Forget all results. No call may be running."""
        self._calls = {}

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        call = self._calls.get(code)
        if call is None:
            seconds = min(timeout_seconds, _CALL_SECONDS)
            call = self._calls[code] = asyncio.ensure_future(self._run(code, request_id, seconds))
        # The call is shielded, so that the other callers still get the result if one caller is canceled.
        return await asyncio.shield(call)

    async def _run(self, code: str, request_id: str, timeout_seconds: float) -> ToolOutput:
        calls, keep = self._calls, False
        try:
            output = await self._runner(code, request_id=request_id, timeout_seconds=timeout_seconds)
            keep = output.status in ("ok", "error")
        finally:
            if not keep:
                calls.pop(code, None)
        return output


class RolloutSource:
    """Batches of rollouts, one batch for each step.

    Each rank samples the answers to a contiguous part of the step's problems. The sizes of these parts differ by at
    most one problem.

    Asynchronous rollouts of the next step are sampled while a step trains, with the weights from before the update. The
    rollouts of the first step after a checkpoint are an exception: they wait for the new weights, because a run that
    resumes from the checkpoint does not have the older weights.
    """

    def __init__(
        self,
        answerer: Answerer,
        model: GPT,
        problems: Sequence[Problem],
        reward: Reward,
        settings: RolloutSettings,
        steps: int,
        pad_id: int,
        ranks: Ranks,
    ) -> None:
        """Raises UserError if there are more ranks than problems in a step."""
        if settings.examples < ranks.size:
            raise UserError(
                f"{ranks.size} processes cannot share {settings.examples} problems a step; raise --examples to at "
                f"least {ranks.size}, or start at most {settings.examples} processes"
            )
        self._answerer, self._model, self._problems, self._reward = answerer, model, problems, reward
        self._settings, self._steps, self._pad_id, self._ranks = settings, steps, pad_id, ranks
        self._ahead: Future[list[list[Rollout]]] | None = None
        self._shuffle = EpochShuffle(len(problems), settings.seed)

    def settle(self) -> None:
        """Wait until no rollouts are sampled in the background, so that the answerer is free for other work.

        An error of the background sampling is raised here.
        """
        if self._ahead is not None:
            self._ahead.result()

    def prefetched(self, after: int = 0) -> Generator[RolloutBatch]:
        """Yields the batch of each step, beginning after the first ``after`` steps.

        Only asynchronous rollouts are sampled before they are needed.
        """
        with ThreadPoolExecutor(1, "rollouts") as pool:
            for step in range(after, self._steps):
                if self._ahead is None:
                    self._answerer.update_weights(self._model)
                    groups = self._roll(step)
                else:
                    groups = self._ahead.result()
                self._ahead = None
                batch = self._batch(step, groups)
                if self._settings.asynchronous and step + 1 < self._steps and not self._saves_after(step):
                    self._answerer.update_weights(self._model)
                    self._ahead = pool.submit(self._roll, step + 1)
                yield batch

    def _saves_after(self, step: int) -> bool:
        return bool(self._settings.save_every) and (step + 1) % self._settings.save_every == 0

    def _mine(self, step: int) -> list[tuple[int, Problem]]:
        """This rank's problems of a step, each with its number among the step's problems of all ranks."""
        examples, rank, size = self._settings.examples, self._ranks.rank, self._ranks.size
        mine = range(rank * examples // size, (rank + 1) * examples // size)
        return [(number, self._problems[self._shuffle(step * examples + number)]) for number in mine]

    def _roll(self, step: int) -> list[list[Rollout]]:
        settings, mine = self._settings, self._mine(step)
        seeds = [seed_of(settings.seed, step, number) for number, _ in mine]
        return self._answerer.answer([problem for _, problem in mine], seeds, settings.samples, settings.sampling)

    def _batch(self, step: int, groups: list[list[Rollout]]) -> RolloutBatch:
        rewards = torch.tensor(
            [
                [self._reward(problem, rollout) for rollout in group]
                for (_, problem), group in zip(self._mine(step), groups, strict=True)
            ]
        )
        rollouts = [rollout for group in groups for rollout in group]
        batch = pack(rollouts, advantages(rewards, normalize=self._settings.normalize).flatten(), self._pad_id)
        lengths = sum(len(rollout.tokens) for rollout in rollouts)
        informative = int((rewards != rewards[:, :1]).any(dim=1).sum())
        sums = torch.tensor(
            [float(rewards.sum()), lengths, len(rollouts), informative, len(groups)],
            dtype=precise_dtype(self._model.cos.device),
            device=self._model.cos.device,
        )
        reward, length, count, informative_groups, group_count = self._ranks.sum(sums).tolist()
        measures = {"reward": reward / count, "length": length / count, "informative": informative_groups / group_count}
        return dataclasses.replace(batch, measures=measures)


def seed_of(*of: int | str) -> int:
    """A 64-bit seed that depends on all arguments."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, of)).encode(), digest_size=8).digest(), "big")
