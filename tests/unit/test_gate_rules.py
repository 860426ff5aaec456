"""A model is refused exactly when a rule fails, and every refusal says why."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.promotion.rules import DEFAULT_NO_WORSE, Gate, NoWorse, Require
from jobs.results.metrics import Metric, metrics_of_result
from nanochat_core.errors import UserError

NAMES = ("chat.accuracy", "core.core", "bpb.bits_per_byte")
VALUES = st.one_of(st.floats(0, 1), st.just(math.nan))
MEASURED = st.dictionaries(st.sampled_from(NAMES), st.builds(Metric, VALUES, st.sampled_from("xy")))
REQUIRED = st.builds(Require, st.sampled_from(NAMES), st.sampled_from((">=", "<=", ">", "<")), st.floats(0, 1))
COMPARED = st.builds(NoWorse, st.sampled_from(NAMES), st.floats(0, 0.2), st.booleans())


def holds(rule: Require | NoWorse, own: dict[str, Metric], other: dict[str, Metric] | None) -> bool:
    """The reference: a slow and obvious evaluation of a rule."""
    if isinstance(rule, Require):
        if rule.metric not in own:
            return False
        value, bound = own[rule.metric].value, rule.bound
        return {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}[rule.comparison]
    if other is None:
        return True
    if rule.metric not in own or rule.metric not in other or own[rule.metric].how != other[rule.metric].how:
        return rule.optional
    mine, theirs = own[rule.metric].value, other[rule.metric].value
    if rule.metric.endswith("bits_per_byte"):
        mine, theirs = -mine, -theirs
    return mine >= theirs - rule.margin - 1e-9


@given(st.lists(st.one_of(REQUIRED, COMPARED)), MEASURED, st.one_of(st.none(), MEASURED))
def test_a_model_is_refused_exactly_when_a_rule_fails(rules: Any, own: Any, other: Any) -> None:
    outcomes = [rule.judge(own, other) for rule in rules]
    assert [outcome.passed is not False for outcome in outcomes] == [holds(rule, own, other) for rule in rules]
    assert all(outcome.reason and outcome.rule for outcome in outcomes)


def test_a_metric_that_was_not_measured_refuses_where_it_is_required() -> None:
    outcome = Require.parse("core.core>=0.2").judge({}, None)
    assert (outcome.passed, outcome.reason) == (False, "core.core was not measured; at least 0.2 is required")


def test_a_worse_model_is_refused_with_both_figures() -> None:
    own, other = {"chat.accuracy": Metric(0.9, "x")}, {"chat.accuracy": Metric(0.95, "x")}
    outcome = NoWorse.parse("chat.accuracy:0.01").judge(own, other)
    assert outcome.passed is False
    assert outcome.reason == "chat.accuracy is 0.9, the promoted model has 0.95; it may be worse by at most 0.01"


def test_exactly_the_margin_is_allowed() -> None:
    own, other = {"chat.accuracy": Metric(0.89, "x")}, {"chat.accuracy": Metric(0.9, "x")}
    assert NoWorse.parse("chat.accuracy:0.01").judge(own, other).passed


def test_what_was_measured_in_another_way_is_not_compared() -> None:
    own, other = {"chat.accuracy": Metric(0.5, "x")}, {"chat.accuracy": Metric(0.9, "y")}
    assert Gate().rules()[0].judge(own, other).passed is None
    assert Gate(no_worse=("chat.accuracy",)).rules()[0].judge(own, other).passed is False


def test_the_default_rules_hold_where_nothing_was_measured() -> None:
    assert [rule.judge({}, {}).passed for rule in Gate().rules()] == [None] * len(DEFAULT_NO_WORSE)


@pytest.mark.parametrize(
    "text", ["chat.accuracy", "chat.accuracy=0.9", ">=0.9", "a>=b", "a>=nan", "a>=inf", "a b>=1", ""]
)
def test_a_requirement_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="cannot be read; write NAME>=NUMBER"):
        Gate(require=(text,)).rules()


@pytest.mark.parametrize("text", ["chat.accuracy:x", ":0.1", "", "a:-1", "a:inf"])
def test_a_comparison_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="cannot be read; write NAME:MARGIN"):
        Gate(no_worse=(text,)).rules()


COMMON = {"settings": {"items": 2}, "model": "m", "revision": "sft/step_1", "digest": "d", "identity": "i"}
GSM8K = {
    "kind": "generative", "questions": 2, "answers": 4, "right": 2, "accuracy": 0.5, "baseline": 0.0, "centered": 0.5,
    "too_long": 0, "examples": [], "pass_at_k": {"1": 0.5, "2": 1.0},
    "groups": {"hard": {"right": 0, "answers": 2}, "easy": {"right": 2, "answers": 2}},
}  # fmt: skip
WINOGRAD = {"kind": "schema", "shots": 0, "answers": 4, "right": 3, "accuracy": 0.75, "baseline": 0.5, "centered": 0.5}


@pytest.mark.parametrize(
    ("result", "metrics"),
    [
        (
            {"evaluation": "chat", "chatcore": 0.25, "missing": ["mmlu"], "tasks": {"gsm8k": GSM8K}},
            {
                "chat.chatcore": 0.25,
                "chat.gsm8k.accuracy": 0.5,
                "chat.gsm8k.centered": 0.5,
                "chat.gsm8k.pass_at_k.1": 0.5,
                "chat.gsm8k.pass_at_k.2": 1.0,
                "chat.gsm8k.hard": 0.0,
                "chat.gsm8k.easy": 1.0,
            },
        ),
        ({"evaluation": "chat", "chatcore": None, "missing": [], "tasks": {}}, {}),
        (
            {"evaluation": "core", "core": 0.2, "missing": [], "gpt2_xl": 0.25, "tasks": {"winograd": WINOGRAD}},
            {"core.core": 0.2, "core.winograd.accuracy": 0.75, "core.winograd.centered": 0.5},
        ),
        (
            {
                "evaluation": "conversations",
                "accuracy": 0.75,
                "kinds": {"fact": {"right": 3, "items": 4}},
                "seconds": 4,
            },
            {"chat.accuracy": 0.75, "chat.kinds.fact": 0.75},
        ),
        (
            {"evaluation": "bpb", "bits_per_byte": 1.0, "xz_9_bits_per_byte": 2.0, "bytes_per_token": 4.0, "bytes": 9},
            {"bpb.bits_per_byte": 1.0, "bpb.xz_9_bits_per_byte": 2.0, "bpb.bytes_per_token": 4.0},
        ),
        ({"evaluation": "samples", "samples": [["a", "b"]], "temperature": 0.8}, {}),
    ],
)
def test_a_result_has_the_metrics_of_its_evaluation_and_no_others(
    result: dict[str, Any], metrics: dict[str, float]
) -> None:
    found = metrics_of_result(COMMON | result)
    assert {name: metric.value for name, metric in found.items()} == metrics
    other = metrics_of_result(COMMON | result | {"settings": {"items": 3}})
    assert all(found[name].how != other[name].how for name in metrics)
