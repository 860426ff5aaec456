"""Constrained completions match their pattern, and other requests in the batch do not change."""

import asyncio
import collections
import json
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_core.constraints.compiler import Compiler
from nanochat_core.constraints.trial import Trial
from nanochat_core.engine import (
    AsyncEngine,
    Completion,
    Constraint,
    ConstraintError,
    ConstraintKind,
    Engine,
    EngineConfig,
    FinishReason,
    Request,
    SamplingParams,
    ToolPolicy,
)
from nanochat_core.engine.constraints import CACHE_BYTES, LEAST_BYTES, Grammars
from nanochat_core.engine.sampler import Sampler, sample_key
from nanochat_core.engine.sequence import Sequence
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import ASSISTANT_END, BOS, PYTHON_END, PYTHON_START, Tokenizer
from tests.support.engine_models import BYTES, SPECIAL, config_with_blocks, tiny_model

ROOT = Path(__file__).parents[2]
ENDS = frozenset({SPECIAL[ASSISTANT_END], SPECIAL[BOS]})
ANY_OBJECT = Constraint(ConstraintKind.JSON_OBJECT)
# Some tokens span several parts of the grammar; other tokens are parts of a character.
MERGED = Tokenizer([*(bytes([i]) for i in range(256)), b'{"', b'": ', b'", "', b"true,", b"12", b"\xc3\xa9a", b"}]"])


def regex(pattern: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, pattern)


def schema(value: Any) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def params(constraint: Constraint | None, **changes: Any) -> SamplingParams:
    values = {"temperature": 1.0, "seed": 5, "max_tokens": 120, "stop_token_ids": ENDS}
    return SamplingParams(**{**values, **changes}, constraint=constraint)


def make_engine(**config: Any) -> Engine:
    return Engine(tiny_model(), BYTES, EngineConfig(kv_cache_bytes=1 << 22, **config))


def one(sampling: SamplingParams, prompt: tuple[int, ...] = (65, 66), **options: Any) -> Completion:
    [[completion]] = make_engine().generate([prompt], sampling, **options)
    return completion


def text(completion: Completion) -> str:
    return BYTES.decode_bytes([i for i in completion.token_ids if i not in ENDS]).decode("utf-8")


def conforms(value: Any, rules: Any) -> bool:
    """Slow reference: whether a JSON value follows a schema with the keywords that these tests use."""
    if "anyOf" in rules:
        return any(conforms(value, option) for option in rules["anyOf"])
    if "enum" in rules:
        return any(value == option and type(value) is type(option) for option in rules["enum"])
    kind = rules["type"]
    if kind == "object":
        known = rules.get("properties", {})
        return (
            isinstance(value, dict)
            and all(name in value for name in rules.get("required", ()))
            and (rules.get("additionalProperties", True) or value.keys() <= known.keys())
            and all(conforms(value[name], rule) for name, rule in known.items() if name in value)
        )
    if kind == "array":
        least, most = rules.get("minItems", 0), rules.get("maxItems", len(value) if isinstance(value, list) else 0)
        return (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(conforms(item, rules["items"]) for item in value)
        )
    if kind == "string":
        return (
            isinstance(value, str)
            and rules.get("minLength", 0) <= len(value) <= rules.get("maxLength", len(value))
            and re.search(rules.get("pattern", ""), value) is not None
        )
    if kind == "integer":
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and rules.get("minimum", value) <= value <= rules.get("maximum", value)
    return isinstance(value, bool) if kind == "boolean" else value is None


def test_the_reference_knows_what_does_not_conform() -> None:
    person = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 3}, "b": {"type": "array", "items": {"type": "null"}}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert conforms({"a": 3, "b": [None]}, person)
    wrong: Any
    for wrong in ({}, {"a": 2}, {"a": True}, {"a": 3, "b": [0]}, {"a": 3, "c": 1}, [], "a"):
        assert not conforms(wrong, person)
    assert not conforms("xyz", {"type": "string", "pattern": "^[ab]*$"})
    assert not conforms(1, {"enum": [True, "1"]})


names = st.sampled_from(["a", "b", "name", "größe", 'quo"te', "with space"])
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-20, 5), st.integers(5, 300)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(3, 6)).map(
        lambda ends: {"type": "string", "minLength": ends[0], "maxLength": ends[1]}
    ),
    st.sampled_from(["^[a-c]{2,4}$", "^(x|yy)é?$", "^\\d{3}-\\d{2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern.replace("\\d", "[0-9]")}
    ),
    st.just({"enum": ["red", "grün", 7, None, True]}),
)


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(names, inner, min_size=1, max_size=3).flatmap(
        lambda known: st.sets(st.sampled_from(sorted(known))).map(
            lambda required: {
                "type": "object",
                "properties": known,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(inner, st.integers(0, 1), st.integers(1, 3)).map(
        lambda parts: {"type": "array", "items": parts[0], "minItems": parts[1], "maxItems": parts[2]}
    )
    return st.one_of(objects, arrays, st.lists(inner, min_size=2, max_size=2).map(lambda options: {"anyOf": options}))


schemas = st.recursive(leaves, _nested, max_leaves=6)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(schemas, min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 3.0]))
def test_every_finished_answer_follows_its_schema(rules: list[Any], seed: int, temperature: float) -> None:
    sampling = [params(schema(rule), seed=seed, temperature=temperature, top_p=0.95) for rule in rules]
    for rule, [completion] in zip(rules, make_engine().generate([(1, 2)] * len(rules), sampling), strict=True):
        if completion.finish_reason is FinishReason.STOP:
            assert conforms(json.loads(text(completion)), rule)
        else:
            assert completion.usage is not None
            assert completion.usage.completion_tokens == 120


# \w and \d are left out, because Rust and Python define them differently outside ASCII.
atoms = st.sampled_from(["a", "é", "[0-9]", "[^a-z]", "[0-9A-Za-z_]", ".", r"\.", "(ab|c)", r"[\]x^-]", "日本"])
pieces = st.tuples(atoms, st.sampled_from(["", "?", "*", "+", "{2}", "{0,3}", "+?"])).map("".join)
alternatives = st.lists(pieces, min_size=1, max_size=4).map("".join)
patterns = st.lists(alternatives, min_size=1, max_size=3).map(lambda options: f"({'|'.join(options)})x{{1,2}}")


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(patterns, min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([0.0, 1.0]))
def test_every_finished_answer_matches_its_expression_from_end_to_end(
    wanted: list[str], seed: int, temperature: float
) -> None:
    sampling = [params(regex(pattern), seed=seed, temperature=temperature, max_tokens=60) for pattern in wanted]
    for pattern, [completion] in zip(wanted, make_engine().generate([(7,)] * len(wanted), sampling), strict=True):
        if completion.finish_reason is FinishReason.STOP:
            assert re.fullmatch(pattern, text(completion))


def test_any_object_is_any_object_and_answers_do_finish() -> None:
    [completions] = make_engine().generate(
        [(3,)], params(ANY_OBJECT, max_tokens=250, logit_bias={ord('"'): 4.0, ord("}"): 4.0}), n=8
    )
    finished = [c for c in completions if c.finish_reason is FinishReason.STOP]
    assert len(finished) >= 2
    assert all(isinstance(json.loads(text(c)), dict) for c in finished)
    assert len({text(c) for c in finished}) > 1


def test_every_allowed_token_leads_to_a_match_and_every_match_can_be_written() -> None:
    """The reference lists every string of a finite language."""
    space = ["", " "]
    language = {f'{{"a":{s}{value}{end}' for s in space for value in ("12", "true", '"éa"') for end in ("}", "}]")}
    language = {f"[{match}" for match in language if match.endswith("]")}
    rules = {
        "type": "object",
        "properties": {"a": {"enum": [12, True, "éa"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = schema({"type": "array", "items": rules, "minItems": 1, "maxItems": 1})
    end, vocab_size = MERGED.special_ids[ASSISTANT_END], MERGED.vocab_size + 3
    grammars = Grammars(MERGED, vocab_size)
    grammar = grammars.compile(constraint)
    matches = {match.encode() for match in language}
    unseen: list[list[int]] = [[]]
    seen, ended = set(), set()
    while unseen:
        tokens = unseen.pop()
        written = MERGED.decode_bytes(tokens)
        if written in seen:
            continue
        seen.add(written)
        matcher = grammars.matcher(grammar, [end])
        finished = [matcher.advance(token) for token in tokens]
        mask = np.zeros(-(-vocab_size // 32), np.int32)
        matcher.fill(mask)
        allowed = set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())
        assert allowed
        assert not matcher.stuck
        assert (end in allowed) == (written in matches) == matcher.complete == any(finished)
        ended |= {written} & matches
        for token in allowed - {end}:
            assert token < len(MERGED.token_bytes), "a special token"
            assert any(match.startswith(written + MERGED.token_bytes[token]) for match in matches)
            unseen.append([*tokens, token])
    assert ended == matches


def jobs() -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Constrained and free requests, greedy and seeded, with every filter and penalty."""
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "integer"}}},
        "required": ["name", "tags"],
    }
    constraints = [None, ANY_OBJECT, schema(person), regex(r"[a-f]{3,40}( \d+)?"), None, regex(r"([a-zé]+, )*\w+\.")]
    source = random.Random(3)
    made = []
    for i in range(18):
        made.append(
            (
                tuple(source.randrange(256) for _ in range(source.choice([2, 17, 40]))),
                params(
                    constraints[i % len(constraints)],
                    seed=i,
                    temperature=source.choice([0.0, 1.0, 1.5]),
                    top_k=source.choice([0, 5]),
                    top_p=source.choice([1.0, 0.8]),
                    min_p=source.choice([0.0, 0.05]),
                    repetition_penalty=source.choice([1.0, 1.3]),
                    frequency_penalty=source.choice([0.0, 0.4]),
                    logit_bias={source.randrange(256): 4.0},
                    max_tokens=60,
                    logprobs=2,
                ),
            )
        )
    return made


def test_a_constrained_request_gets_the_same_tokens_alone_in_a_batch_and_after_preemptions() -> None:
    prompts, sampling = zip(*jobs(), strict=True)
    alone = [one(s, prompt) for prompt, s in zip(prompts, sampling, strict=True)]
    model = tiny_model()
    tight = Engine(model, BYTES, config_with_blocks(16, model, token_budget=80))
    for engine in (make_engine(), tight):
        together = [c for [c] in engine.generate(prompts, sampling)]
        # Each compared token includes its log probability, so log probabilities are equal to the bit.
        assert [c.tokens for c in together] == [c.tokens for c in alone]
        assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]
    assert tight.scheduler.preemptions > 0


def test_free_rows_keep_their_logits_bit_for_bit() -> None:
    sampler, grammars = Sampler(BYTES.vocab_size, torch.device("cpu")), Grammars(BYTES, BYTES.vocab_size)

    def sequence(sampling: SamplingParams) -> Sequence:
        seq = Sequence(Request("r", (1, 2), sampling), 0, 0, sample_key(1, 0), 100)
        if sampling.constraint is not None:
            seq.matcher = grammars.matcher(grammars.compile(sampling.constraint), ENDS)
        return seq

    logits = torch.randn(3, BYTES.vocab_size, generator=torch.Generator().manual_seed(1))
    changed = logits.clone()
    sequences = [sequence(params(c, temperature=0.0)) for c in (None, regex("[ab]"), None)]
    samples = sampler.draw(changed, sequences, [2, 2, 2]).read()
    assert torch.equal(changed[[0, 2]], logits[[0, 2]])
    assert samples[1].id == 97 + int(logits[1, 98] > logits[1, 97])
    assert int(changed[1].isfinite().sum()) == 2


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    constrained = one(params(regex("[xyz]{5}"), logprobs=3, temperature=0.0))
    ids = [65, 66, *constrained.token_ids]
    with torch.no_grad():
        expected = tiny_model()(torch.tensor([ids]))[0].log_softmax(-1)
    for i, token in enumerate(constrained.tokens, start=1):
        assert token.logprob == pytest.approx(float(expected[i, token.id]), abs=1e-4)
        assert [id for id, _ in token.top_logprobs] == expected[i].topk(3).indices.tolist()


def test_greedy_takes_the_likeliest_token_that_the_grammar_allows() -> None:
    completion = one(params(regex("[xyz]{5}"), temperature=0.0))
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([[65, 66, *completion.token_ids]]))[0]
    for i, token in enumerate(completion.token_ids[:5], start=1):
        assert token == max(b"xyz", key=lambda c: logits[i, c])


@pytest.mark.parametrize("reason", ["stop token", "no stop token", "max_tokens"])
def test_a_whole_text_ends_with_stop(reason: str) -> None:
    if reason == "stop token":
        completion = one(params(regex("[0-9]{4}")))
        assert completion.token_ids[-1] in ENDS
        assert len(completion.token_ids) == 5
    else:
        stops = frozenset() if reason == "no stop token" else ENDS
        limit = 4 if reason == "max_tokens" else 50
        completion = one(params(regex("[0-9]{4}"), stop_token_ids=stops, max_tokens=limit))
        assert len(completion.token_ids) == 4
    assert re.fullmatch("[0-9]{4}", text(completion))
    assert completion.finish_reason is FinishReason.STOP


def test_a_text_that_is_cut_off_ends_with_length() -> None:
    completion = one(params(regex("[0-9]{40}"), max_tokens=10))
    assert (len(completion.token_ids), completion.finish_reason) == (10, FinishReason.LENGTH)


def test_the_empty_text_is_a_match_too() -> None:
    assert [t in ENDS for t in one(params(regex(""))).token_ids] == [True]
    nothing = one(params(regex(""), stop_token_ids=frozenset()))
    assert (nothing.token_ids, nothing.finish_reason) == ([], FinishReason.STOP)
    assert nothing.usage is not None
    assert nothing.usage.completion_tokens == 0


def test_an_ordinary_token_that_stops_comes_only_where_the_text_matches() -> None:
    for seed in range(5):
        completion = one(params(regex("[ab]{3,}"), stop_token_ids=frozenset(b"a"), seed=seed))
        assert re.fullmatch("b{3,}a", BYTES.decode(completion.token_ids))
        assert completion.finish_reason is FinishReason.STOP


def test_a_dead_end_ends_with_length_at_once() -> None:
    # The only continuation is a stop token, and a stop token may not come before the text matches.
    completion = one(params(regex("bbac"), stop_token_ids=frozenset(b"a")))
    assert (completion.token_ids, completion.finish_reason) == (list(b"bb"), FinishReason.LENGTH)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 2


def test_a_grammar_that_outgrows_its_limits_ends_with_length(caplog: pytest.LogCaptureFixture) -> None:
    completion = one(params(regex(r"(\w|b)*a(\w|b){200}"), max_tokens=200, logit_bias={97: 4.0}))
    assert completion.finish_reason is FinishReason.LENGTH
    failures = [record for record in caplog.records if record.message == "constraint failed"]
    assert bool(failures) == (len(completion.token_ids) < 200)


def test_a_constraint_turns_the_tools_off() -> None:
    calling = {SPECIAL[PYTHON_START]: 50.0, SPECIAL[PYTHON_END]: 60.0}
    sampling = params(regex("[0-9]{6}"), logit_bias=calling)
    completion = one(sampling, tools=ToolPolicy(enabled=True))
    assert re.fullmatch("[0-9]{6}", text(completion))
    assert completion.tool_events == []
    # The engine does not run a call at the end of the prompt either, because constraints turn tools off.
    prompt = (SPECIAL[PYTHON_START], *b"1+1", SPECIAL[PYTHON_END])
    assert re.fullmatch("[0-9]{6}", text(one(sampling, prompt, tools=ToolPolicy(enabled=True))))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (regex("(ab"), "the regex cannot be used: regex parse error: .* unclosed group"),
        (regex(r"a(?=b)"), "look-around, including look-ahead and look-behind, is not supported"),
        (regex(r"(a)\1"), "backreferences are not supported"),
        (regex(r"a\bb"), "lookarounds not supported"),
        (regex(r"a[^\x00-\U0010FFFF]"), "nothing matches it"),
        (regex("a" * 65_537), "65537 characters; at most 65536"),
        (regex("a{999999999999999999999}"), "decimal literal invalid"),
        (Constraint(ConstraintKind.JSON_SCHEMA, "{"), "the json_schema cannot be used: it is not valid JSON"),
        (Constraint(ConstraintKind.JSON_SCHEMA, "[" * 60_000), "not valid JSON"),
        (schema([]), "a schema is a JSON object"),
        (schema({"type": "strin"}), "Invalid type: strin"),
        (schema({"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (schema({"type": "integer", "minimum": 5, "maximum": 4}), r"minimum \(5\) is greater than maximum \(4\)"),
        (schema({"$ref": "#/nope"}), "'/nope' does not exist"),
        (schema({"$ref": "#"}), "nothing matches it"),
        (schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (schema({"type": "object", "properties": {f"p{i}": {} for i in range(4000)}}), "grammar size"),
    ],
    ids=lambda value: None if isinstance(value, Constraint) else value[:30],
)
def test_a_constraint_that_cannot_be_used_is_refused_with_the_reason(constraint: Constraint, message: str) -> None:
    engine = make_engine()
    with pytest.raises(ConstraintError, match=message) as refused:
        engine.add(Request("r", (1,), params(constraint)))
    assert refused.value.kind is constraint.kind
    assert len(str(refused.value)) < 700
    assert engine.load().waiting == 0


def test_a_deep_schema_is_refused_or_served_but_kills_nothing() -> None:
    for depth in (50, 130, 900, 5000):
        deep = '{"type":"array","items":' * depth + '{"type":"null"}' + "}" * depth
        if len(deep) <= 65_536:
            try:
                Grammars(BYTES, BYTES.vocab_size).compile(Constraint(ConstraintKind.JSON_SCHEMA, deep))
            except ConstraintError:
                assert depth > 50


def counted(monkeypatch: pytest.MonkeyPatch, kind: Any, method: str) -> collections.Counter[str]:
    """From now on, counts the calls of a method for each constraint's source."""
    calls: collections.Counter[str] = collections.Counter()
    original = getattr(kind, method)

    def counting(self: Any, constraint: Constraint) -> Any:
        calls[constraint.source] += 1
        return original(self, constraint)

    monkeypatch.setattr(kind, method, counting)
    return calls


def test_a_grammar_is_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = counted(monkeypatch, Compiler, "compile")
    monkeypatch.setattr("nanochat_core.engine.constraints.CACHE_BYTES", 8 * LEAST_BYTES)
    engine = make_engine()
    sampling = params(regex("[ab]{3}"), max_tokens=5)
    engine.generate([(1,), (2,)], sampling, n=3)
    engine.generate([(3,)], sampling)
    assert compiled == {"[ab]{3}": 1}
    for i in range(8):
        engine.grammars.compile(regex(f"x{i}"))
    engine.grammars.compile(regex("x0"))
    engine.grammars.compile(regex("[ab]{3}"))
    assert (compiled["x0"], compiled["[ab]{3}"]) == (1, 2)


def test_the_cache_counts_bytes_and_not_grammars() -> None:
    grammars = Grammars(BYTES, BYTES.vocab_size)
    trial = grammars.new_trial()
    large = []
    for count in (1000, 1001):
        texts = {"type": "object", "properties": {f"text_{i}": {"type": "string"} for i in range(count)}}
        large.append(grammars.compile(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(texts)), trial).bytes)
    assert sum(large) > 10 * LEAST_BYTES
    small = grammars.compile(regex("a"), trial)
    assert small.bytes < min(large) / 10
    assert grammars._bytes == sum(large) + small.bytes <= CACHE_BYTES


@pytest.mark.parametrize("pattern", ["(ab", "(?:a?){4999}a{5000}"])
def test_a_refusal_is_remembered(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = counted(monkeypatch, Trial, "run")
    grammars = Grammars(BYTES, BYTES.vocab_size)
    trial = grammars.new_trial()
    messages = set()
    for _ in range(3):
        with pytest.raises(ConstraintError) as refused:
            grammars.compile(regex(pattern), trial)
        messages.add(str(refused.value))
        assert refused.value.kind is ConstraintKind.REGEX
    assert len(messages) == 1
    assert tried == {pattern: 1}


async def test_the_device_loop_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    original = Compiler.compile

    def noting(compiler: Compiler, constraint: Constraint) -> Any:
        threads.append(threading.current_thread().name)
        return original(compiler, constraint)

    monkeypatch.setattr(Compiler, "compile", noting)
    monkeypatch.setattr("nanochat_core.engine.constraints.CACHE_BYTES", 0)  # keeps the last grammar only
    engine = AsyncEngine(make_engine())
    engine.start()
    try:
        both = [Request(name, (1,), params(regex(f"[0-9]{{3}}{name}"))) for name in "rs"]
        for stream in await asyncio.gather(*map(engine.submit, both)):
            tokens = [token.id async for output in stream for token in output.tokens]
            assert re.fullmatch(rb"[0-9]{3}[rs]", bytes(tokens[:-1]))
        with pytest.raises(ConstraintError, match="unclosed"):
            await engine.submit(Request("t", (1,), params(regex("("))))
        async with asyncio.timeout(30):
            engine.close_stream("r")
            engine.close_stream("s")
            await engine.drained()
    finally:
        await engine.stop()
    assert len(threads) == 2
    assert "engine" not in threads


def test_a_request_without_a_constraint_never_loads_the_library() -> None:
    code = """
import sys
sys.path.insert(0, "tests/unit")
from tests.support.engine_models import BYTES, tiny_model
from nanochat_core.engine import Constraint, ConstraintKind, Engine, SamplingParams
engine = Engine(tiny_model(), BYTES)
engine.generate([(1, 2)], SamplingParams(max_tokens=3))
before = "llguidance" in sys.modules
engine.generate([(1, 2)], SamplingParams(max_tokens=3, constraint=Constraint(ConstraintKind.REGEX, "abc")))
print(before, "llguidance" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_only_text_that_begins_with_a_brace_must_follow_the_schema() -> None:
    rules = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = Constraint(ConstraintKind.TEXT_OR_JSON_SCHEMA, json.dumps(rules))
    bound = one(params(constraint, logit_bias={ord("{"): 100.0}, max_tokens=40))
    assert bound.finish_reason is FinishReason.STOP
    assert conforms(json.loads(text(bound)), rules)
    free = one(params(constraint, logit_bias={ord("x"): 100.0}, max_tokens=40))
    assert (text(free), free.finish_reason) == ("x" * 40, FinishReason.LENGTH)
    grammars = Grammars(BYTES, BYTES.vocab_size)
    matcher = grammars.matcher(grammars.compile(constraint), ENDS)
    for token in b'x {"a": no\n':  # a brace after the first character begins nothing
        assert not matcher.advance(token)
        assert matcher.complete


def test_an_empty_answer_is_text() -> None:
    constraint = Constraint(ConstraintKind.TEXT_OR_JSON_SCHEMA, "{}")
    assert text(one(params(constraint, logit_bias={SPECIAL[ASSISTANT_END]: 100.0}))) == ""


def test_a_schema_beside_text_is_checked_like_any_other() -> None:
    for source in ("{", "[]", '{"type": "number", "minimum": 5, "maximum": 1}'):
        with pytest.raises(ConstraintError) as error:
            make_engine().grammars.compile(Constraint(ConstraintKind.TEXT_OR_JSON_SCHEMA, source))
        assert error.value.kind is ConstraintKind.TEXT_OR_JSON_SCHEMA


def test_min_tokens_and_a_constraint_exclude_each_other() -> None:
    with pytest.raises(UserError, match="min_tokens is 3"):
        params(regex("a+"), min_tokens=3)
