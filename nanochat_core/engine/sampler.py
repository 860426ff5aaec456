"""Samples the next token of each sequence from its logits, for all sequences at once.

A sample must depend only on the request, so that the same seed gives the same text in any batch, after a preemption and
on another replica. The sampler therefore uses the Gumbel-max trick: ``argmax(z + g)`` over the adjusted logits ``z``
with Gumbel noise ``g`` is exactly a sample from ``softmax(z)``. The noise of each token id is a hash of (seed, choice,
position, token id), that is, a counter-based random number (Salmon et al. 2011).

The usual method, which inverts the cumulative distribution, is less stable than this trick: a rounding difference
anywhere in the vocabulary can change the token. With Gumbel noise, a rounding difference changes the token only if the
two best candidates almost tie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.device import precise_dtype, to_device
from nanochat_core.engine.request import SamplingParams, Token
from nanochat_core.engine.sequence import Sequence

# Below this temperature, sampling is greedy, because logits divided by such a small number could exceed the range of
# float32.
LOWEST_TEMPERATURE = 1e-4
# If every row uses a top-k of at most this number, the sampler usually processes only the most likely tokens, see
# Sampler._candidates.
MOST_CANDIDATES = 256
# Except on a GPU, top-p first sorts only this many of the most likely tokens. It sorts the whole vocabulary only if
# these tokens are too few, which means that the distribution is flat.
TOP_P_CANDIDATES = 256

_GOLDEN = 0x9E3779B97F4A7C15
_U64 = (1 << 64) - 1


def sample_key(seed: int, choice: int) -> int:
    """A 64-bit number from which all random numbers of a choice are computed."""
    return int(_mix(_mix(np.array([seed & _U64], np.uint64)) + np.uint64(choice))[0])


class Drawn:
    """Tokens (rows,) int64 that the device has sampled, or is still sampling.

    The next step on the device may use these tokens before the host has read them.
    """

    def __init__(self, tokens: Tensor, report: _Report | None) -> None:
        self.tokens = tokens
        self._report = report
        # Queue the copy now. A copy that is queued later would also wait for later steps.
        self._host = _to_host(tokens)
        self._copied = torch.cuda.Event() if tokens.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> list[Token]:
        """Wait for the device; returns one sample for each row."""
        if self._copied is not None:
            self._copied.synchronize()
        samples = [Token(token) for token in self._host.tolist()]
        if self._report is not None:
            self._report.add_to(samples)
        return samples


class _Report:
    """Log probabilities of the sampled tokens of some rows, and of the most likely tokens of these rows."""

    def __init__(self, rows: Items[int], wanted: Items[int], log_probabilities: Tensor, drawn: Tensor) -> None:
        """``wanted`` is the number of alternatives for each of ``rows``.

        ``log_probabilities`` has shape (len(rows), vocab_size). ``drawn`` (len(rows),) has the sampled token ids.
        """
        self._rows, self._wanted = rows, wanted
        best = log_probabilities.topk(min(max(wanted), log_probabilities.size(1)))
        self._values, self._ids = _to_host(best.values), _to_host(best.indices)
        self._of_drawn = _to_host(log_probabilities.gather(1, drawn.unsqueeze(1)).squeeze(1))

    def add_to(self, samples: list[Token]) -> None:
        values, ids, of_drawn = self._values.tolist(), self._ids.tolist(), self._of_drawn.tolist()
        for i, (row, wanted) in enumerate(zip(self._rows, self._wanted, strict=True)):
            top = tuple(zip(ids[i][:wanted], values[i][:wanted], strict=True))
            samples[row] = Token(samples[row].id, of_drawn[i], top)


class Sampler:
    """Samples for all sequences at once. It keeps no state between steps.

    On a GPU, no method except :meth:`score` waits for the device, so the host can prepare the next step while the
    device works.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        # A hash of each token id. With this table, the noise of a token needs only two more rounds of mixing.
        table = _mix(np.arange(vocab_size, dtype=np.uint64)).astype(np.uint32).view(np.int32)
        self._table = torch.from_numpy(table).to(device)
        self._bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def draw(self, logits: Tensor, sequences: Items[Sequence], positions: Items[int]) -> Drawn:
        """Sample one token for each row.

        Args:
            logits: (rows, vocab_size) fp32; they may be changed in place.
            sequences: the sequence of each row.
            positions: for each row, the position of the token to sample; the first token of the prompt has position 0.
        """
        params = [seq.request.sampling for seq in sequences]
        report = _rows(params, lambda p: p.logprobs is not None)
        log_probabilities = F.log_softmax(self.take(logits, report), dim=-1) if report else None
        constrained = [row for row, seq in enumerate(sequences) if seq.matcher is not None]
        if constrained:
            self._constrain(logits, sequences, constrained)
        self._forbid_stops(logits, sequences, positions)
        z = self.adjust(logits, sequences, params)
        if any(p.temperature >= LOWEST_TEMPERATURE for p in params):
            tokens = self._draw(z, sequences, positions, params)
        else:
            tokens = z.argmax(dim=-1)
        if log_probabilities is None:
            return Drawn(tokens, None)
        wanted = [params[row].logprobs or 0 for row in report]
        return Drawn(tokens, _Report(report, wanted, log_probabilities, self.take(tokens, report)))

    @torch.inference_mode()
    def score(self, logits: Tensor, tokens: Items[int], alternatives: int) -> list[Token]:
        """Return the given tokens, each with its log probability and the ``alternatives`` most likely tokens.

        ``logits`` (len(tokens), vocab_size) fp32 has one row for each token. The method waits for the device.
        """
        given = to_device(np.array(tokens, np.int64), self._device)
        rows, wanted = range(len(tokens)), [alternatives] * len(tokens)
        return Drawn(given, _Report(rows, wanted, F.log_softmax(logits, dim=-1), given)).read()

    def _forbid_stops(self, z: Tensor, sequences: Items[Sequence], positions: Items[int]) -> None:
        """Set to -inf, in place, the logits of stop tokens in rows that have not reached their ``min_tokens``."""
        forbidden = [
            (row, token)
            for row, (seq, position) in enumerate(zip(sequences, positions, strict=True))
            if position - seq.prompt_length < seq.request.sampling.min_tokens
            for token in seq.request.sampling.stop_token_ids
        ]
        if forbidden:
            rows, tokens = to_device(np.array(forbidden, np.int64).T.copy(), self._device)
            z.index_put_((rows, tokens), z.new_full((), float("-inf")))

    def _constrain(self, z: Tensor, sequences: Items[Sequence], rows: Items[int]) -> None:
        """Set to -inf, in place, the logits of all tokens that the constraints of the given rows forbid."""
        packed = np.empty((len(rows), -(-self._vocab_size // 32)), np.int32)
        for mask, row in zip(packed, rows, strict=True):
            matcher = sequences[row].matcher
            assert matcher is not None, "only constrained rows come here"
            matcher.fill(mask)
        octets = to_device(packed.view(np.uint8), self._device)
        allowed = (octets.unsqueeze(2) & self._bits) != 0
        some = self.take(z, rows).masked_fill(~allowed.flatten(1)[:, : self._vocab_size], float("-inf"))
        self._put(z, rows, some)

    def adjust(self, z: Tensor, sequences: Items[Sequence], params: Items[SamplingParams]) -> Tensor:
        """Apply penalties and biases, in place, to the logits ``z`` (rows, vocab_size) fp32; returns ``z``."""
        penalized = _rows(params, lambda p: p.looks_back)
        if penalized:
            chosen = [params[i] for i in penalized]
            in_prompt = self._counts([sequences[i].tokens[: sequences[i].prompt_length] for i in penalized])
            in_completion = self._counts([sequences[i].tokens[sequences[i].prompt_length :] for i in penalized])
            some = self.take(z, penalized)
            repetition = self._column([p.repetition_penalty for p in chosen])
            repeated = torch.where(some > 0, some / repetition, some * repetition)
            some = torch.where(in_prompt + in_completion > 0, repeated, some)
            some -= self._column([p.presence_penalty for p in chosen]) * (in_completion > 0)
            some -= self._column([p.frequency_penalty for p in chosen]) * in_completion
            self._put(z, penalized, some)
        biased = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()]
        if biased:
            rows, tokens, biases = zip(*biased, strict=True)
            places = to_device(np.array([rows, tokens], np.int64), self._device)
            added = to_device(np.array(biases, np.float32), self._device)
            z.index_put_((places[0], places[1]), added, accumulate=True)
        return z

    def _draw(
        self, z: Tensor, sequences: Items[Sequence], positions: Items[int], params: Items[SamplingParams]
    ) -> Tensor:
        """Sample with temperature, filters and noise; greedy rows use none of these. Returns token ids (rows,)."""
        random = [p.temperature >= LOWEST_TEMPERATURE for p in params]
        z = z / self._column([p.temperature if r else 1.0 for p, r in zip(params, random, strict=True)])
        ids = self._candidates(z, params)
        if ids is not None:
            z = z.gather(1, ids)
        filtered = [
            row
            for row, r in enumerate(random)
            if r and (params[row].top_k > 0 or params[row].top_p < 1 or params[row].min_p > 0)
        ]
        if filtered:
            chosen = [params[row] for row in filtered]
            self._put(z, filtered, self.filter(self.take(z, filtered), chosen))
        noise = self._gumbel(sequences, positions, self._table if ids is None else self._table[ids])
        if not all(random):
            noise *= self._column([float(r) for r in random])
        drawn = z.add_(noise).argmax(dim=-1, keepdim=True)
        return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)

    def _candidates(self, z: Tensor, params: Items[SamplingParams]) -> Tensor | None:
        """Ids (rows, n) of candidates that include all tokens that top-k keeps.

        The result is None if a row is greedy or has no small top-k. The result is also None if, in a row, more than k
        tokens are at least as likely as the k-th best token (a tie), because top-k then keeps more than k tokens.
        Finding a few candidates is several times as fast as noise for the whole vocabulary. On a GPU, the result is
        always None, because the test for ties reads numbers from the device, and this takes longer than computing the
        noise.
        """
        if z.is_cuda or not all(p.temperature >= LOWEST_TEMPERATURE and 0 < p.top_k <= MOST_CANDIDATES for p in params):
            return None
        counts = [min(p.top_k, self._vocab_size) for p in params]
        best, place = z.topk(max(counts)), self._last_of(counts)
        candidates = (z >= best.values.gather(1, place)).sum(dim=-1, keepdim=True)
        return best.indices if bool((candidates - 1 == place).all()) else None

    def filter(self, z: Tensor, params: Items[SamplingParams]) -> Tensor:
        """Set to -inf the logits of tokens that top-k, top-p or min-p excludes.

        Top-k applies first, then top-p, then min-p, each to the tokens that the filters before it have left. ``z``
        (rows, n) fp32 has the logits of all tokens, or only of candidates. The method may change ``z``.
        """
        top_k = [p.top_k or self._vocab_size for p in params]
        limited = _rows(params, lambda p: 0 < p.top_k < self._vocab_size)
        if limited:
            counts = [top_k[row] for row in limited]
            some = self.take(z, limited)
            best = some.topk(max(counts)).values
            self._put(z, limited, _drop_below(some, best.gather(1, self._last_of(counts))))
        nucleus = _rows(params, lambda p: p.top_p < 1)
        if nucleus:
            some, top_p = self.take(z, nucleus), self._column([params[row].top_p for row in nucleus])
            self._put(z, nucleus, _drop_below(some, _top_p_threshold(some, top_p)))
        if any(p.min_p > 0 for p in params):
            z = _drop_below(z, z.amax(dim=-1, keepdim=True) + self._column([p.min_p for p in params]).log())
        return z

    def _gumbel(self, sequences: Items[Sequence], positions: Items[int], table: Tensor) -> Tensor:
        """Gumbel noise (rows, n) fp32 for each row's position. ``table`` has a hash of each of the n token ids."""
        start = np.array([seq.sample_key for seq in sequences], np.uint64)
        position = np.array(positions, np.uint64)
        halves = to_device(_mix(start + position * np.uint64(_GOLDEN)).view(np.int32), self._device)
        low, high = halves[0::2].unsqueeze(1), halves[1::2].unsqueeze(1)
        # Two rounds of multiply and shift, with the constants of the lowbias32 hash. The int32 arithmetic must wrap
        # around.
        x = (table ^ low).mul_(0x7FEB352D)
        x ^= (x >> 15).bitwise_and_(0x1FFFF)
        x = x.add_(high).mul_(-2073254261)
        x ^= (x >> 16).bitwise_and_(0xFFFF)
        # A uniform number u in (0, 1) from 31 random bits. Gumbel noise is -log(-log(1 - u)). Large noise comes from u
        # near 0, where float32 is most precise. Near 1, float32 rounds u to 1, and the clamp keeps the noise finite.
        uniform = x.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
        return uniform.neg_().log1p_().neg_().log_().neg_()

    def _counts(self, tokens: Items[Items[int]]) -> Tensor:
        """Number of occurrences of each token id in each list, (lists, vocab_size) fp32."""
        lengths = [len(ids) for ids in tokens]
        flat = np.fromiter(itertools.chain.from_iterable(tokens), np.int64, sum(lengths))
        flat += np.repeat(np.arange(len(tokens)) * self._vocab_size, lengths)
        places = to_device(flat, self._device)
        counts = torch.zeros(len(tokens) * self._vocab_size, device=self._device)
        return counts.index_add_(0, places, torch.ones_like(places, dtype=counts.dtype)).view(len(tokens), -1)

    def _column(self, values: Items[float]) -> Tensor:
        return to_device(np.array(values, np.float32), self._device).unsqueeze(1)

    def _last_of(self, counts: Items[int]) -> Tensor:
        """Index (rows, 1) of each row's k-th largest logit in the result of ``topk``; ``counts`` has each row's k."""
        return to_device(np.array(counts, np.int64) - 1, self._device).unsqueeze(1)

    def take(self, x: Tensor, rows: Items[int]) -> Tensor:
        """The given rows of ``x``: ``x`` itself if these are all rows, otherwise a copy."""
        return x if len(rows) == len(x) else x.index_select(0, to_device(np.array(rows, np.int64), self._device))

    def _put(self, x: Tensor, rows: Items[int], values: Tensor) -> None:
        if len(rows) == len(x):
            x.copy_(values)
        else:
            x.index_copy_(0, to_device(np.array(rows, np.int64), self._device), values)


def _to_host(x: Tensor) -> Tensor:
    """Queue a copy to host memory. On a GPU, the numbers are valid only after the device has made the copy."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _rows(params: Items[SamplingParams], wants: Callable[[SamplingParams], bool]) -> list[int]:
    return [row for row, p in enumerate(params) if wants(p)]


def _drop_below(z: Tensor, threshold: Tensor) -> Tensor:
    return z.masked_fill(z < threshold, float("-inf"))


def _top_p_threshold(z: Tensor, top_p: Tensor) -> Tensor:
    """For each row, the lowest logit (rows, 1) that ``top_p`` (rows, 1) keeps."""
    highest = z.amax(dim=-1, keepdim=True)
    precise = precise_dtype(z.device)
    whole = (z.logsumexp(dim=-1, keepdim=True) - highest).to(precise).exp()
    left = (z > float("-inf")).sum(dim=-1, keepdim=True)
    # A GPU sorts the whole vocabulary faster than the host can test whether a few candidates are enough.
    candidates = z.size(1) if z.is_cuda else min(TOP_P_CANDIDATES, z.size(1))
    while True:
        best = z.topk(candidates).values
        weights = (best - highest).to(precise).exp()
        sums = weights.cumsum(dim=-1)
        # The total weight of a row's tokens must have the same bits in every batch. For a row with at most
        # TOP_P_CANDIDATES tokens left, it is therefore the sum of the row's sorted weights. The other rows of the batch
        # change only the number of removed tokens at the end of ``weights``, and removed tokens have the weight 0.
        total = torch.where(left <= TOP_P_CANDIDATES, sums[:, -1:], whole)
        kept = (sums - weights < top_p * total).sum(dim=-1, keepdim=True).clamp_(min=1)
        if candidates == z.size(1) or bool((kept < candidates).all()):
            return best.gather(1, kept - 1)
        candidates = z.size(1)


def _mix(x: np.ndarray) -> np.ndarray:
    """Output function of SplitMix64 (Steele, Lea and Flood 2014), applied to 64-bit numbers."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
