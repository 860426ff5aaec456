"""Draws the next token of each sequence from its logits, with every request's own parameters at once.

A sample is ``argmax(z + g)`` over the adjusted logits ``z``, where ``g`` is Gumbel noise: exactly a draw from
``softmax(z)``. The noise of each vocabulary entry is a hash of (seed, choice, position, token id), so a sample depends
on these and the logits alone: not on the batch, a preemption or the replica. Against the usual inverse of the
cumulative distribution, the maximum is also the steadier choice: rounding differences of the logits change the token
only when the two best candidates are that close, and never because probabilities elsewhere in the vocabulary moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.engine.request import SamplingParams
from nanochat_core.engine.sequence import Sequence

# Temperatures below this are greedy: the division would leave the range of float32.
LOWEST_TEMPERATURE = 1e-4
# With at most so many candidates in every row only these are looked at.
MOST_CANDIDATES = 256
# Top-p first looks among this many candidates; sorting the whole vocabulary is needed only for a flat distribution.
TOP_P_CANDIDATES = 256

_GOLDEN = 0x9E3779B97F4A7C15
_U64 = (1 << 64) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A drawn token with its logprob and the best alternatives' (token id, logprob), when asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample_key(seed: int, choice: int) -> int:
    """Where the stream of random numbers of one choice starts, a 64-bit number."""
    return int(_mix(_mix(np.array([seed & _U64], np.uint64)) + np.uint64(choice))[0])


class Sampler:
    """Vectorised over sequences; keeps nothing between steps but what it can derive again."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        # A well mixed number per token id, so that per step and row two cheap rounds of mixing suffice.
        table = _mix(np.arange(vocab_size, dtype=np.uint64)).astype(np.uint32).view(np.int32)
        self._table = torch.from_numpy(table).to(device)
        self._bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Items[Sequence], positions: Items[int] | None = None) -> list[Sample]:
        """One token for each row.

        Args:
            logits: (rows, vocab_size) fp32; may be changed in place.
            sequences: whose token each row predicts.
            positions: which token of its sequence that is, counted from the start of the prompt; None is the next one.
        """
        if positions is None:
            positions = [len(seq.tokens) for seq in sequences]
        params = [seq.request.sampling for seq in sequences]
        report = _rows(params, lambda p: p.logprobs is not None)
        log_probabilities = F.log_softmax(logits[report], dim=-1) if report else None
        constrained = [row for row, seq in enumerate(sequences) if seq.matcher is not None]
        if constrained:
            self._constrain(logits, sequences, constrained)
        z = self._adjust(logits, sequences, params)
        if any(p.temperature >= LOWEST_TEMPERATURE for p in params):
            tokens = self._draw(z, sequences, positions, params)
        else:
            tokens = z.argmax(dim=-1)
        samples = [Sample(token) for token in tokens.tolist()]
        if log_probabilities is not None:
            self._report(samples, report, log_probabilities, params)
        return samples

    def _constrain(self, z: Tensor, sequences: Items[Sequence], rows: Items[int]) -> None:
        """Set what the constraints of these rows forbid to -inf, in place."""
        packed = np.empty((len(rows), -(-self._vocab_size // 32)), np.int32)
        for mask, row in zip(packed, rows, strict=True):
            matcher = sequences[row].matcher
            assert matcher is not None, "only constrained rows come here"
            matcher.fill(mask)
        octets = torch.from_numpy(packed.view(np.uint8)).to(self._device)
        allowed = (octets.unsqueeze(2) & self._bits) != 0
        z[rows] = z[rows].masked_fill(~allowed.flatten(1)[:, : self._vocab_size], float("-inf"))

    def _adjust(self, z: Tensor, sequences: Items[Sequence], params: Items[SamplingParams]) -> Tensor:
        """Penalties and biases."""
        penalized = _rows(params, lambda p: p.looks_back)
        if penalized:
            chosen = [params[i] for i in penalized]
            in_prompt = self._counts([sequences[i].tokens[: sequences[i].prompt_length] for i in penalized])
            in_completion = self._counts([sequences[i].tokens[sequences[i].prompt_length :] for i in penalized])
            some = z[penalized]
            repetition = self._column([p.repetition_penalty for p in chosen])
            repeated = torch.where(some > 0, some / repetition, some * repetition)
            some = torch.where(in_prompt + in_completion > 0, repeated, some)
            some -= self._column([p.presence_penalty for p in chosen]) * (in_completion > 0)
            some -= self._column([p.frequency_penalty for p in chosen]) * in_completion
            z[penalized] = some
        biased = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()]
        if biased:
            rows, tokens, biases = zip(*biased, strict=True)
            z[list(rows), list(tokens)] += torch.tensor(biases, device=z.device)
        return z

    def _draw(
        self, z: Tensor, sequences: Items[Sequence], positions: Items[int], params: Items[SamplingParams]
    ) -> Tensor:
        """(rows,) tokens after temperature, filters and noise; greedy rows get none of these."""
        random = [p.temperature >= LOWEST_TEMPERATURE for p in params]
        z = z / self._column([p.temperature if r else 1.0 for p, r in zip(params, random, strict=True)])
        ids = self._candidates(z, params)
        if ids is not None:
            z = z.gather(1, ids)
        filtered = [row for row, r in enumerate(random) if r and _filters(params[row])]
        if filtered:
            chosen = [params[row] for row in filtered]
            z[filtered] = self._filter(z[filtered], chosen)
        noise = self._gumbel(sequences, positions, self._table if ids is None else self._table[ids])
        if not all(random):
            noise *= self._column([float(r) for r in random])
        drawn = z.add_(noise).argmax(dim=-1, keepdim=True)
        return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)

    def _candidates(self, z: Tensor, params: Items[SamplingParams]) -> Tensor | None:
        """(rows, n) ids of the only tokens that can be drawn, where every row has a small top-k; otherwise None.

        Noise for the whole vocabulary costs several times what it takes to find a few candidates. A row in which others
        are as likely as its last candidate keeps those too, and they may be many.
        """
        if not all(p.temperature >= LOWEST_TEMPERATURE and 0 < p.top_k <= MOST_CANDIDATES for p in params):
            return None
        counts = torch.tensor([min(p.top_k, self._vocab_size) for p in params], device=z.device)
        best = z.topk(int(counts.max()))
        last = best.values.gather(1, (counts - 1).unsqueeze(1))
        return best.indices if bool(((z >= last).sum(dim=-1) == counts).all()) else None

    def _filter(self, z: Tensor, params: Items[SamplingParams]) -> Tensor:
        """Top-k, then top-p over what is left, then min-p, as thresholds on the logits of all or some tokens."""
        top_k = [p.top_k or self._vocab_size for p in params]
        limited = _rows(params, lambda p: 0 < p.top_k < self._vocab_size)
        if limited:
            counts = torch.tensor([top_k[row] for row in limited], device=z.device)
            some = z[limited]
            best = some.topk(int(counts.max())).values
            z[limited] = _drop_below(some, best.gather(1, (counts - 1).unsqueeze(1)))
        nucleus = _rows(params, lambda p: p.top_p < 1)
        if nucleus:
            some = z[nucleus]
            z[nucleus] = _drop_below(some, _top_p_threshold(some, self._column([params[row].top_p for row in nucleus])))
        if any(p.min_p > 0 for p in params):
            z = _drop_below(z, z.amax(dim=-1, keepdim=True) + self._column([p.min_p for p in params]).log())
        return z

    def _gumbel(self, sequences: Items[Sequence], positions: Items[int], table: Tensor) -> Tensor:
        """(rows, n) fp32 noise of each position for the tokens whose numbers ``table`` has."""
        start = np.array([seq.sample_key for seq in sequences], np.uint64)
        position = np.array(positions, np.uint64)
        halves = torch.from_numpy(_mix(start + position * np.uint64(_GOLDEN)).view(np.int32)).to(self._device)
        low, high = halves[0::2].unsqueeze(1), halves[1::2].unsqueeze(1)
        # Two rounds of multiply and shift (constants of the lowbias32 hash); int32 arithmetic wraps as intended.
        x = (table ^ low).mul_(0x7FEB352D)
        x ^= (x >> 15).bitwise_and_(0x1FFFF)
        x = x.add_(high).mul_(-2073254261)
        x ^= (x >> 16).bitwise_and_(0xFFFF)
        # 31 random bits as a number in (0, 1), finest near 0, where -log(1-u) is the rare strong noise. The clamp
        # keeps the other end, where float32 rounds to 1, finite.
        uniform = x.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
        return uniform.neg_().log1p_().neg_().log_().neg_()

    def _report(
        self, samples: list[Sample], rows: Items[int], log_probabilities: Tensor, params: Items[SamplingParams]
    ) -> None:
        wanted = [params[row].logprobs or 0 for row in rows]
        best = log_probabilities.topk(min(max(wanted), self._vocab_size))
        values, ids = best.values.tolist(), best.indices.tolist()
        drawn = torch.tensor([[samples[row].token] for row in rows], device=log_probabilities.device)
        of_drawn = log_probabilities.gather(1, drawn).squeeze(1).tolist()
        for i, row in enumerate(rows):
            top = tuple(zip(ids[i][: wanted[i]], values[i][: wanted[i]], strict=True))
            samples[row] = Sample(samples[row].token, of_drawn[i], top)

    def _counts(self, tokens: Items[Items[int]]) -> Tensor:
        """How often each vocabulary entry occurs in each list, (lists, vocab_size) fp32."""
        flat = [row * self._vocab_size + token for row, ids in enumerate(tokens) for token in ids]
        places = torch.tensor(flat, dtype=torch.int64, device=self._device)
        counts = torch.bincount(places, minlength=len(tokens) * self._vocab_size)
        return counts.view(len(tokens), self._vocab_size).float()

    def _column(self, values: Items[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device).unsqueeze(1)


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _rows(params: Items[SamplingParams], wants: Callable[[SamplingParams], bool]) -> list[int]:
    return [row for row, p in enumerate(params) if wants(p)]


def _drop_below(z: Tensor, threshold: Tensor) -> Tensor:
    return z.masked_fill(z < threshold, float("-inf"))


def _top_p_threshold(z: Tensor, top_p: Tensor) -> Tensor:
    """Logit of the last token that the (rows, 1) ``top_p`` keeps, (rows, 1)."""
    total = z.logsumexp(dim=-1, keepdim=True)
    candidates = min(TOP_P_CANDIDATES, z.size(1))
    while True:
        best = z.topk(candidates).values
        probabilities = (best - total).double().exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = (before < top_p).sum(dim=-1, keepdim=True)
        if candidates == z.size(1) or bool((kept < candidates).all()):
            return best.gather(1, kept - 1)
        candidates = z.size(1)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood, 2014) of 64-bit numbers."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
