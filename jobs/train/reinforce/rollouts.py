"""Answers of the model in training, and the batches that are made of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from jobs.generation.python_tool import SandboxTool
from jobs.tasks.problems import Problem
from jobs.train.reinforce.policy_gradient import RolloutBatch, advantages, pack
from jobs.train.reinforce.rewards import Reward, Rollout
from nanochat_core import tokenizer as tok
from nanochat_core.chat import AssistantStream, parse_messages, render_prompt
from nanochat_core.engine import (
    Completion,
    Engine,
    EngineConfig,
    FinishReason,
    SamplingParams,
    ToolCall,
    ToolOutput,
    ToolPolicy,
    ToolResult,
    ToolRunner,
)
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.sandbox import SandboxConfig, SandboxExecutor
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import Ranks

# More sequences at a time make no step of the engine cheaper per token.
_MOST_RUNNING = 256
# What a call may take, and what it may with waiting for its turn: a busy machine is to change no answer.
_CALL_SECONDS, _TURN_SECONDS = 10.0, 300.0
# Training needs the rest of a GPU's free memory.
_CUDA_MEMORY_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn; a temperature of 0 is greedy."""

    temperature: float
    top_k: int
    max_new_tokens: int

    @property
    def greedy(self) -> Sampling:
        return dataclasses.replace(self, temperature=0.0, top_k=0)


class Answerer:
    """Answers problems with the weights that it was given last, all in one continuous batch, with Python calls."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, tool: ToolRunner, sequences: int) -> None:
        """
        Args:
            tool: runs the model's code.
            sequences: answers that are wanted at a time.
        """
        self._tokenizer, self._tool = tokenizer, SharedCalls(tool)
        running = min(sequences, _MOST_RUNNING)
        self.device = device = model.cos.device
        memory = int(torch.cuda.mem_get_info(device)[0] * _CUDA_MEMORY_SHARE) if device.type == "cuda" else None
        config = EngineConfig(
            kv_cache_bytes=memory,
            max_running=running,
            token_budget=max(EngineConfig.token_budget, 2 * running),
            tool_timeout_seconds=_TURN_SECONDS,
        )
        self._engine = Engine(model, tokenizer, config, tool_runner=self._tool)
        self._engine.warm_up()  # now, when nothing trains beside it
        self._stop = frozenset({tokenizer.special_ids[tok.ASSISTANT_END], tokenizer.bos_id})

    def update_weights(self, model: GPT) -> None:
        """Answer with the weights that ``model`` has now."""
        self._engine.update_weights(model)

    def answer(
        self, problems: Sequence[Problem], seeds: Sequence[int], samples: int, sampling: Sampling
    ) -> list[list[Rollout]]:
        """``samples`` answers to each problem.

        What is drawn depends on the problem's seed, the number of the sample and the weights alone.

        Raises:
            UserError: a problem does not fit the model's context.
        """
        self._tool.forget()
        prompts = [tuple(render_prompt(self._tokenizer, parse_messages(problem.messages))) for problem in problems]
        each = [
            SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                seed=seed,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self._stop,
                logprobs=0,
            )
            for seed in seeds
        ]
        completions = self._engine.generate(prompts, each, n=samples, tools=ToolPolicy(enabled=True))
        return [
            [self._rollout(prompt, completion) for completion in choices]
            for prompt, choices in zip(prompts, completions, strict=True)
        ]

    def close(self) -> None:
        """Stop what the tool still does."""
        self._engine.close()

    def _rollout(self, prompt: tuple[int, ...], completion: Completion) -> Rollout:
        stream = AssistantStream(self._tokenizer)
        parts = [part for token in completion.token_ids for part in stream.push(token)] + stream.finish()
        codes = [event.code for event in completion.tool_events if isinstance(event, ToolCall)]
        outputs = [event.output for event in completion.tool_events if isinstance(event, ToolResult)]
        return Rollout(
            prompt,
            tuple(completion.token_ids),
            tuple(not token.forced for token in completion.tokens),
            tuple(token.logprob or 0.0 for token in completion.tokens),
            "".join(part.text for part in parts if part.type == "text").strip(),
            tuple(itertools.zip_longest(codes, outputs, fillvalue="")),
            completion.finish_reason is FinishReason.STOP,
        )


@contextlib.contextmanager
def answering(model: GPT, tokenizer: Tokenizer, sequences: int) -> Iterator[Answerer]:
    """An answerer whose tool is the sandbox, in this process."""
    with SandboxExecutor(SandboxConfig(queue=_MOST_RUNNING)) as executor:
        answerer = Answerer(model, tokenizer, SandboxTool(executor), sequences)
        try:
            yield answerer
        finally:
            answerer.close()


class SharedCalls:
    """A tool that runs equal code once.

    Samples of one problem mostly call the same; a call has a process of its own and no memory of others, so what came
    out once is what would come out again. Limits and failures of the sandbox are not remembered.
    """

    def __init__(self, runner: ToolRunner) -> None:
        self._runner = runner
        self._calls: dict[str, asyncio.Task[ToolOutput]] = {}

    def forget(self) -> None:
        """Run everything again when it is called the next time. No call may be under way."""
        self._calls = {}

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        call = self._calls.get(code)
        if call is None:
            seconds = min(timeout_seconds, _CALL_SECONDS)
            call = self._calls[code] = asyncio.ensure_future(self._run(code, request_id, seconds))
        # One that gives up does not take the result from the others.
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
    """Batches of answers to the training problems: of each step its own problems, drawn with seeds of its own.

    A step's rollouts depend on (seed, step, problem, sample) and the weights alone, so that a resumed run draws the
    same again, on any number of ranks: each has a run of the step's problems.

    Asynchronous rollouts of the next step are drawn while a step trains, with the weights from before it. Only the
    first step after one that saves a checkpoint waits for its weights: a run resumed from there has no older ones.
    """

    def __init__(
        self,
        answerer: Answerer,
        model: GPT,
        problems: Sequence[Problem],
        reward: Reward,
        *,
        examples: int,
        samples: int,
        sampling: Sampling,
        normalize: bool,
        seed: int,
        steps: int,
        save_every: int,
        asynchronous: bool,
        pad_id: int,
        ranks: Ranks,
    ) -> None:
        """
        Args:
            examples, samples: problems of a step, all ranks together, and answers to each.
            normalize: see :func:`~jobs.train.reinforce.policy_gradient.advantages`.
            steps: of the whole run.

        Raises:
            UserError: the problems of a step cannot be shared evenly.
        """
        if examples % ranks.size:
            raise UserError(f"{ranks.size} processes cannot share {examples} examples a step; use a multiple of that")
        self._answerer, self._model, self._problems, self._reward = answerer, model, problems, reward
        self._examples, self._samples, self._sampling, self._normalize = examples, samples, sampling, normalize
        self._seed, self._steps, self._save_every, self._asynchronous = seed, steps, save_every, asynchronous
        self._pad_id, self._ranks = pad_id, ranks
        self._first = 0
        self._ahead: Future[list[list[Rollout]]] | None = None
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def starting(self, step: int) -> RolloutSource:
        """The same, from the batch on that comes after ``step`` steps."""
        self._first = step
        return self

    def settle(self) -> None:
        """Return when nothing is drawn in the background, and the answerer is free for others.

        What went wrong in the background is raised here.
        """
        if self._ahead is not None:
            self._ahead.result()

    def prefetched(self) -> Generator[RolloutBatch, None, None]:
        """A batch for each step. What is drawn before a batch is asked for is what ``asynchronous`` says."""
        with ThreadPoolExecutor(1, "rollouts") as pool:
            for step in range(self._first, self._steps):
                if self._ahead is None:
                    self._answerer.update_weights(self._model)
                    groups = self._roll(step)
                else:
                    groups = self._ahead.result()
                self._ahead = None
                batch = self._batch(step, groups)
                if self._asynchronous and step + 1 < self._steps and not self._saves_after(step):
                    self._answerer.update_weights(self._model)
                    self._ahead = pool.submit(self._roll, step + 1)
                yield batch

    def _saves_after(self, step: int) -> bool:
        return bool(self._save_every) and (step + 1) % self._save_every == 0

    def _mine(self, step: int) -> list[tuple[int, Problem]]:
        """This rank's problems of a step, each with its number among those of all ranks."""
        share = self._examples // self._ranks.size
        first = self._ranks.rank * share
        return [(number, self._problem(step * self._examples + number)) for number in range(first, first + share)]

    def _problem(self, number: int) -> Problem:
        epoch, position = divmod(number, len(self._problems))
        return self._problems[self._order(epoch)[position]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._problems)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # noqa: S311
        return order

    def _roll(self, step: int) -> list[list[Rollout]]:
        mine = self._mine(step)
        seeds = [seed_of(self._seed, step, number) for number, _ in mine]
        return self._answerer.answer([problem for _, problem in mine], seeds, self._samples, self._sampling)

    def _batch(self, step: int, groups: list[list[Rollout]]) -> RolloutBatch:
        rewards = torch.tensor(
            [
                [self._reward(problem, rollout) for rollout in group]
                for (_, problem), group in zip(self._mine(step), groups, strict=True)
            ]
        )
        rollouts = [rollout for group in groups for rollout in group]
        batch = pack(rollouts, advantages(rewards, normalize=self._normalize).flatten(), self._pad_id)
        lengths = sum(len(rollout.tokens) for rollout in rollouts)
        informative = int((rewards != rewards[:, :1]).any(dim=1).sum())
        sums = torch.tensor(
            [float(rewards.sum()), lengths, len(rollouts), informative, len(groups)],
            dtype=torch.float64,
            device=self._model.cos.device,
        )
        reward, length, count, informative_groups, group_count = self._ranks.sum(sums).tolist()
        noted = {
            "reward": reward / count,
            "length": length / count,
            "informative": informative_groups / group_count,
        }
        return dataclasses.replace(batch, noted=noted)


def seed_of(*of: int | str) -> int:
    """64 bits that depend on every number given."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, of)).encode(), digest_size=8).digest(), "big")
