"""Scores of CORE equal those of a plain forward pass over each option alone, for any grouping of questions."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.measures.core import scoring as core_scoring
from jobs.measures.core.prompts import Option, Question, common_length
from jobs.measures.core.scoring import Scorer, Tree, right
from nanochat_core.model import GPT, rotary_table
from tests.support.engine_models import BYTES, tiny_model

VOCAB = BYTES.vocab_size


def plain_losses(model: GPT, question: Question) -> list[float]:
    """The reference: a forward pass over each option alone, with all of its logits."""
    length = max(len(option.ids) for option in question.options)
    model.cos, model.sin = rotary_table(length, model.config.head_dim, torch.float32, torch.device("cpu"))
    found = []
    for option in question.options:
        start = max(option.start, 1)
        with torch.inference_mode():
            logits = model(torch.tensor([option.ids]))[0, start - 1 : -1]
        targets = torch.tensor(option.ids[start:], dtype=torch.int64)
        if question.kind == "language_modeling":
            found.append((logits.argmax(-1) != targets).float().mean().item())
        else:
            found.append(F.cross_entropy(logits, targets).item() if len(targets) else math.nan)
    return found


def ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def choice(rng: random.Random, prefix: int, lengths: list[int], number: int = 0) -> Question:
    """Options with at least ``prefix`` common first tokens. The random tokens after the prefix may be equal too."""
    shared = ids(rng, prefix)
    texts = [[*shared, *(rng.randrange(3) for _ in range(length))] for length in lengths]
    start = common_length(texts)
    return Question(number, "multiple_choice", tuple(Option(text, start) for text in texts), rng.randrange(len(texts)))


def schema(rng: random.Random, prefix: int, lengths: list[int], suffix: int) -> Question:
    shared, end = ids(rng, prefix), ids(rng, suffix)
    texts = [[*shared, *ids(rng, length), *end] for length in lengths]
    counted = common_length([text[::-1] for text in texts])
    return Question(0, "schema", tuple(Option(text, len(text) - counted) for text in texts), 0)


def continuation(model: GPT, rng: random.Random, prefix: int, length: int, *, greedy: bool) -> Question:
    """A continuation of a prompt: the model's own greedy tokens, or other tokens."""
    text = ids(rng, prefix)
    for _ in range(length):
        with torch.inference_mode():
            likely = int(model(torch.tensor([text]))[0, -1].argmax())
        text.append(likely if greedy else (likely + rng.randrange(2)) % VOCAB)
    return Question(0, "language_modeling", (Option(text, prefix),), 0)


def assert_same(model: GPT, questions: list[Question], scores: list[list[float]]) -> None:
    for question, score in zip(questions, scores, strict=True):
        expected = plain_losses(model, question)
        assert score == pytest.approx(expected, abs=2e-5, nan_ok=True)
        assert right(question, score) == right(question, expected)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), together=st.sampled_from([1, 64, 400, 100_000]))
def test_scores_are_those_of_each_option_alone(seed: int, together: int) -> None:
    rng = random.Random(seed)
    model = tiny_model(depth=3, n_kv_head=rng.choice([None, 3, 1]), head_dim=64)
    scorer = Scorer(tiny_model(depth=3, n_kv_head=model.config.n_kv_head, head_dim=64))
    scorer._batch_tokens, scorer._logits = together, rng.choice([VOCAB, 5 * VOCAB, 10**6])
    questions = [
        choice(rng, rng.randint(1, 60), [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]) for _ in range(6)
    ] + [schema(rng, rng.randint(1, 30), [rng.randint(1, 9), rng.randint(1, 9)], rng.randint(1, 8)) for _ in range(6)]
    assert_same(model, questions, scorer.score(questions))


def test_windows_and_texts_beyond_the_context_are_seen_as_in_a_plain_pass() -> None:
    rng = random.Random(5)
    # The context is 256 tokens, and its short windows are 128 tokens. Some texts are longer than the context, the
    # windows and a block of queries.
    assert tiny_model(depth=4).config.windows == (128, 128, 128, 256)
    questions = [choice(rng, prefix, [3, 9, 200]) for prefix in (1, 100, 129, 300, 700)] + [
        schema(rng, 600, [150, 5], 140)
    ]
    assert_same(tiny_model(depth=4), questions, Scorer(tiny_model(depth=4)).score(questions))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_continuation_is_right_when_every_token_is_the_most_likely_one(depth: int) -> None:
    rng = random.Random(depth)
    model = tiny_model(depth=depth)
    questions = [continuation(model, rng, rng.randint(1, 40), rng.randint(1, 3), greedy=i % 2 == 0) for i in range(20)]
    scores = Scorer(tiny_model(depth=depth)).score(questions)
    verdicts = [right(question, score) for question, score in zip(questions, scores, strict=True)]
    assert all(verdicts[::2])
    assert not all(verdicts[1::2])
    assert_same(model, questions, scores)


def test_options_that_are_the_same_lose_alike_and_the_first_is_chosen() -> None:
    rng = random.Random(1)
    text, other = ids(rng, 20), ids(rng, 20)
    options = tuple(Option(each, 10) for each in ([*text[:10], *other[10:]], text, text))
    (scores,) = Scorer(tiny_model()).score([Question(0, "multiple_choice", options, 1)])
    assert scores[1] == scores[2]
    assert scores[0] != scores[1]
    winner = scores.index(min(scores))
    assert right(Question(0, "multiple_choice", options, winner), scores)
    assert not right(Question(0, "multiple_choice", options, 2), scores)


def test_an_option_with_nothing_of_its_own_is_chosen_only_where_it_comes_first() -> None:
    short, long = [256, 1, 2, 3], [256, 1, 2, 3, 4]
    for order, chosen in (((short, long), 0), ((long, short), 0)):
        question = Question(0, "multiple_choice", tuple(Option(text, 4) for text in order), chosen)
        (scores,) = Scorer(tiny_model()).score([question])
        assert [math.isnan(score) for score in scores] == [text is short for text in order]
        assert right(question, scores)
    same = Question(0, "multiple_choice", (Option(short, 4), Option(short, 4)), 0)
    (scores,) = Scorer(tiny_model()).score([same])
    assert all(math.isnan(score) for score in scores)
    assert right(same, scores)


def test_a_token_that_options_share_is_computed_once() -> None:
    shared, ends = [1] * 50, ([2, 3, 4], [2, 3, 5, 6], [2, 7, 8])
    tree = Tree.of([Option([*shared, *end], 50) for end in ends])
    # The last token of the prefix predicts a target. The last token of an option does not.
    assert len(tree.prefix) == 49
    assert tree.ids.tolist() == [1, 2, 3, 5, 7]
    assert tree.positions.tolist() == [49, 50, 51, 52, 51]
    assert tree.targets == (((0, 2), (1, 3), (2, 4)), ((0, 2), (1, 3), (2, 5), (3, 6)), ((0, 2), (1, 7), (4, 8)))
    assert len(tree) == 54 < sum(len(shared) + len(end) for end in ends)


def test_what_is_computed_together_changes_a_score_by_no_more_than_rounding() -> None:
    rng = random.Random(9)
    questions = [choice(rng, 30, [4, 4, 4], i) for i in range(12)]
    scorer = Scorer(tiny_model(head_dim=64))
    whole = scorer.score(questions)
    assert scorer.score(questions) == whole
    for question, score in zip(questions, whole, strict=True):
        assert scorer.score([question]) == [pytest.approx(score, rel=1e-6)]


def test_batches_hold_no_more_than_they_may_and_everything_once() -> None:
    rng = random.Random(3)
    trees = [Tree.of(choice(rng, rng.randint(1, 80), [5, 5]).options) for _ in range(40)]
    empty = Tree.of((Option([1, 2], 2), Option([1, 2], 2)))
    batches = list(core_scoring._batches([*trees, empty], 300))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(40))
    for batch in batches:
        longest = max(len(trees[i].prefix) for i in batch) + max(len(trees[i].ids) for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 300
    assert len(batches) < 20


def test_scores_in_bf16_are_those_of_a_plain_pass_in_bf16_but_for_its_rounding() -> None:
    rng = random.Random(4)
    questions = [choice(rng, 40, [5, 8, 3]), schema(rng, 20, [4, 6], 7)]

    def model() -> GPT:
        fp32 = tiny_model(depth=3, head_dim=64)
        bf16 = GPT(fp32.config, torch.bfloat16)
        bf16.load_state_dict(fp32.state_dict())
        return bf16.eval()

    for question, score in zip(questions, Scorer(model()).score(questions), strict=True):
        assert score == pytest.approx(plain_losses(tiny_model(depth=3, head_dim=64), question), abs=0.3)
        assert score != pytest.approx(plain_losses(tiny_model(depth=3, head_dim=64), question), abs=1e-5)
