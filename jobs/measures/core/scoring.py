"""Scores the options of many questions together, and computes each shared token only once.

The options of a question often share most of their tokens: the examples and the question itself. A question becomes a
common prefix and a tree after it. The paths of the tree are the options. Each token of the prefix and each node of the
tree is computed once. Attention lets a node see the prefix and the node's ancestors, so every option has, apart from
rounding, the same loss as if it were scored alone. Questions of similar length form a batch. Logits are computed only
at positions that predict a scored token. The last layer is computed only for the tree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.measures.core.prompts import Option, Question, common_length
from nanochat_core.chunked_loss import CPU_CHUNK, GPU_CHUNK
from nanochat_core.engine.backends.torch.network import TorchNetwork
from nanochat_core.model import GPT, QK_SCALE, rotary_table

# The rotary table has this many times the length of the training context, because few-shot prompts can be longer than
# that context. The windows of attention do not depend on the length of the table.
CONTEXTS = 10
# Largest number of tokens in a batch of several questions, padding included. These sizes are large enough for matrix
# products at full speed.
CPU_TOKENS, GPU_TOKENS = 2048, 32768
# Number of queries in a block of attention with a window.
_BLOCK = 256


def right(question: Question, losses: Sequence[float]) -> bool:
    """Whether a question is answered correctly.

    The option with the lowest loss must be the right option. In language modeling the model must predict every token.

    An option without a scored token, such as a prefix of all other options, has the mean loss NaN. Comparisons with NaN
    are false, so an option with the loss NaN counts as the best if and only if it is the first option. This rule is
    kept, because published results were computed with it.
    """
    if question.kind == "language_modeling":
        return losses[0] == 0.0
    return losses.index(min(losses)) == question.gold


class Scorer:
    """Computes the mean losses of options under a model, with frozen copies of its weights.

    A longer rotary table replaces the model's rotary table, because prompts can be longer than the training context.
    """

    def __init__(self, model: GPT) -> None:
        self.longest = CONTEXTS * model.config.context_length
        model.cos, model.sin = rotary_table(
            self.longest, model.config.head_dim, model.compute_dtype, model.smear_scale.device
        )
        self._network = TorchNetwork(model)
        self.device = self._network.device
        self._windows = model.config.windows
        self._batch_tokens = GPU_TOKENS if self.device.type == "cuda" else CPU_TOKENS
        self._logits = GPU_CHUNK if self.device.type == "cuda" else CPU_CHUNK

    def score(self, questions: Sequence[Question]) -> list[list[float]]:
        """The mean loss over the scored tokens, for each option of each question of a task.

        The loss is in nats. For questions of the kind ``language_modeling``, the loss of a token is 0 if the model
        predicts this token, and 1 otherwise.
        """
        trees = [Tree.of(question.options) for question in questions]
        scores = [[math.nan] * len(question.options) for question in questions]
        for batch in _batches(trees, self._batch_tokens):
            losses = self._losses([trees[i] for i in batch], questions[batch[0]].kind == "language_modeling")
            for i in batch:
                for option, targets in enumerate(trees[i].targets):
                    own, losses = losses[: len(targets)], losses[len(targets) :]
                    if len(own):
                        scores[i][option] = float(own.mean())
        return scores

    @torch.inference_mode()
    def _losses(self, trees: list[Tree], greedy: bool) -> np.ndarray:
        """The losses of all targets of the trees, (targets,) float64, option after option.

        With ``greedy``, a loss is 0 if the target is the most likely token, and 1 otherwise.
        """
        attend = TreeAttention(trees, self._windows, self.device)
        prefixes, nodes = [tree.prefix for tree in trees], [tree.ids for tree in trees]
        none = [self._network.no_token]
        previous = [np.concatenate((none, prefix))[:-1] for prefix in prefixes]
        previous += [np.concatenate((tree.prefix, tree.ids, none))[tree.previous] for tree in trees]
        positions = [np.arange(len(prefix)) for prefix in prefixes] + [tree.positions for tree in trees]
        ids, before, where = (
            torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(self.device, non_blocking=True)
            for arrays in ((*prefixes, *nodes), previous, positions)
        )
        hidden = self._network.hidden(ids, before, where, attend, sum(map(len, nodes)))
        firsts = np.cumsum([0, *map(len, nodes)])
        pairs = [
            (first + node, target)
            for first, tree in zip(firsts, trees, strict=False)
            for targets in tree.targets
            for node, target in targets
        ]
        return self._of_pairs(hidden, np.array(pairs, dtype=np.int64).reshape(-1, 2), greedy)

    def _of_pairs(self, hidden: Tensor, pairs: np.ndarray, greedy: bool) -> np.ndarray:
        """The losses of pairs of a row of ``hidden`` and a token that should follow this row.

        ``pairs`` is (pairs, 2) int64: the index of the row, and the token. The result is (pairs,) float64. The logits
        of a row are computed once, even if several pairs have the row. With ``greedy``, a loss is 0 if the token is the
        most likely one, and 1 otherwise.
        """
        rows, place = np.unique(pairs[:, 0], return_inverse=True)
        order = np.argsort(place, kind="stable")
        place, targets = place[order], pairs[order, 1]
        size = max(1, self._logits // self._network.config.vocab_size)
        found = np.empty(len(pairs))
        for start in range(0, len(rows), size):
            wanted = hidden[torch.from_numpy(rows[start : start + size]).to(self.device)]
            logits = self._network.logits(wanted)
            low, high = np.searchsorted(place, (start, start + size))
            row, target = (torch.from_numpy(a[low:high]).to(self.device) for a in (place - start, targets))
            if greedy:
                losses = logits.argmax(-1)[row] != target
            else:
                losses = torch.logsumexp(logits, -1)[row] - logits[row, target]
            found[order[low:high]] = losses.cpu().double().numpy()
        return found


@dataclasses.dataclass(frozen=True)
class Tree:
    """The options of a question as a common prefix and a tree.

    Attributes:
        prefix: (length,) tokens at the start of all options, before any token that predicts a target.
        ids: (nodes,) token of each node. Options that begin with the same tokens share nodes.
        parents: (nodes,) parent of each node; -1 is the end of the prefix.
        targets: for each option, pairs of a node and the token to predict after that node.
    """

    prefix: np.ndarray
    ids: np.ndarray
    parents: np.ndarray
    targets: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, options: Sequence[Option]) -> Tree:
        """The tree of a question's options. An option's last token predicts no target, so it gets no node."""
        shared = common_length([option.ids for option in options])
        length = max(min(shared, *(option.start for option in options)) - 1, 0)
        children: dict[tuple[int, int], int] = {}
        ids: list[int] = []
        parents: list[int] = []
        targets = []
        for option in options:
            node, path = -1, []
            for token in option.ids[length:-1]:
                if (node, token) not in children:
                    children[node, token] = len(ids)
                    ids.append(token)
                    parents.append(node)
                node = children[node, token]
                path.append(node)
            # The first token of a text is not counted, because it has no token before it from which it could be
            # predicted.
            counted = range(max(option.start, 1), len(option.ids))
            targets.append(tuple((path[at - 1 - length], option.ids[at]) for at in counted))
        prefix = np.array(options[0].ids[:length], dtype=np.int64)
        return cls(prefix, np.array(ids, dtype=np.int64), np.array(parents, dtype=np.int64), tuple(targets))

    def __len__(self) -> int:
        return len(self.prefix) + len(self.ids)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """(nodes, nodes) boolean: whether the column's node is the row's node or an ancestor of the row's node."""
        found = np.eye(len(self.ids), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[node] |= found[parent]
        return found

    @property
    def positions(self) -> np.ndarray:
        """(nodes,) position of each node's token in its option."""
        positions: np.ndarray = len(self.prefix) + self.ancestors.sum(axis=1) - 1
        return positions

    @property
    def previous(self) -> np.ndarray:
        """(nodes,) index of the token before each node, in the prefix followed by all nodes; -1 if there is none."""
        before: np.ndarray = np.where(self.parents >= 0, len(self.prefix) + self.parents, len(self.prefix) - 1)
        return before


class TreeAttention:
    """Attention of a batch of trees.

    Queries, keys and values have the tokens of all prefixes first, and then the nodes of all trees. In the last layer,
    the queries have only the nodes.
    """

    def __init__(self, trees: Sequence[Tree], windows: Sequence[int], device: torch.device) -> None:
        self._windows, self._device = windows, device
        self._batch, self._trees = len(trees), trees
        self._prefix = max(len(tree.prefix) for tree in trees)
        self._nodes = max(len(tree.ids) for tree in trees)
        width = self._prefix + self._nodes
        slots = [i * width + np.arange(len(tree.prefix)) for i, tree in enumerate(trees)]
        slots += [i * width + self._prefix + np.arange(len(tree.ids)) for i, tree in enumerate(trees)]
        self._slots = torch.from_numpy(np.concatenate(slots)).to(device)
        self._masks: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, slots = self._windows[layer], self._slots[-len(q) :]
        # Each padded tensor has the shape (batch, heads, prefix + nodes, head_dim). The mask below hides padding from
        # all tokens.
        q_all, k_all, v_all = self._padded(q, slots), self._padded(k, self._slots), self._padded(v, self._slots)
        scale = QK_SCALE**2 * math.sqrt(q.size(-1))
        attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=q.size(1) != k.size(1))
        y = torch.empty_like(q_all)
        nodes = attend(q_all[:, :, self._prefix :], k_all, v_all, attn_mask=self._mask(window, q.dtype))
        y[:, :, self._prefix :] = nodes
        if len(q) == len(k) and self._prefix:
            self._attend_prefix(attend, y, q_all, k_all, v_all, window)
        return y.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, slots)

    def _attend_prefix(
        self, attend: Callable[..., Tensor], y: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int
    ) -> None:
        """Causal attention of the prefixes. Each block of queries reads only the keys in its window."""
        length = self._prefix
        if window >= length - 1:
            y[:, :, :length] = attend(q[:, :, :length], k[:, :, :length], v[:, :, :length], is_causal=True)
            return
        for start in range(0, length, _BLOCK):
            first, stop = max(start - window, 0), min(start + _BLOCK, length)
            queries = torch.arange(start, stop, device=self._device).unsqueeze(1)
            distance = queries - torch.arange(first, stop, device=self._device)
            seen = (distance >= 0) & (distance <= window)
            y[:, :, start:stop] = attend(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], attn_mask=seen)

    def _padded(self, x: Tensor, slots: Tensor) -> Tensor:
        padded = x.new_zeros(self._batch * (self._prefix + self._nodes), *x.shape[1:]).index_copy_(0, slots, x)
        return padded.view(self._batch, -1, *x.shape[1:]).transpose(1, 2)

    def _mask(self, window: int, dtype: torch.dtype) -> Tensor:
        """(batch, 1, nodes, prefix + nodes): 0 if the node sees the token, minus infinity otherwise."""
        if window not in self._masks:
            # Softmax over a fully masked row is NaN, so rows of padding attend to the first token.
            seen = np.zeros((self._batch, self._nodes, self._prefix + self._nodes), dtype=bool)
            seen[:, :, 0] = True
            for own, tree in zip(seen, self._trees, strict=True):
                nodes, length, positions = len(tree.ids), len(tree.prefix), tree.positions
                own[:nodes] = False
                own[:nodes, :length] = positions[:, None] - np.arange(length) <= window
                near = positions[:, None] - positions <= window
                own[:nodes, self._prefix : self._prefix + nodes] = tree.ancestors & near
            mask = torch.from_numpy(seen).to(self._device)
            self._masks[window] = torch.zeros(mask.shape, dtype=dtype, device=self._device).masked_fill_(
                ~mask, -math.inf
            )[:, None]
        return self._masks[window]


def _batches(trees: Sequence[Tree], tokens: int) -> Iterator[list[int]]:
    """The indices of the trees of each batch. A batch has at most ``tokens`` tokens, padding included.

    Trees without nodes are left out. A tree with more tokens is a batch of its own.
    """
    batch: list[int] = []
    prefix = nodes = 0
    for i, tree in enumerate(trees):
        if not len(tree.ids):
            continue
        longest = max(prefix, len(tree.prefix)), max(nodes, len(tree.ids))
        if batch and (len(batch) + 1) * sum(longest) > tokens:
            yield batch
            batch, longest = [], (len(tree.prefix), len(tree.ids))
        batch.append(i)
        prefix, nodes = longest
    if batch:
        yield batch
