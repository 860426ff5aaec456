"""The rules by which the promotion gate judges a model."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping

from jobs.results.metrics import Metric
from nanochat_core.errors import UserError

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_IN_WORDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_REQUIREMENT = re.compile(r"\s*([\w.+-]+?)\s*(>=|<=|>|<)\s*(\S+)\s*")
_LOWER_IS_BETTER = ("bits_per_byte", "loss")
# A metric may be worse by this much more than its margin, because most margins are decimal fractions without an exact
# binary form.
_ROUNDING = 1e-9

# The default rules permit a decrease of 0.02, because a smaller decrease does not show that a model is worse: two runs
# of the same recipe differ by about 0.02 in accuracy on 200 conversations, and by 0.0165 in CORE.
DEFAULT_NO_WORSE = ("chat.accuracy:0.02", "chat.chatcore:0.02", "core.core:0.02")


@dataclasses.dataclass(frozen=True)
class Gate:
    """The rules that a model must meet to be promoted.

    Attributes:
        require: thresholds such as ``chat.accuracy>=0.9``. The rule fails if the metric was not measured.
        no_worse: metrics, each with the margin by which it may be worse than for the promoted model, such as
            ``chat.accuracy:0.01``. The rule is skipped if no other model is promoted. It fails unless both models were
            measured in the same way. None means :data:`DEFAULT_NO_WORSE`; a default rule is skipped, instead of
            failing, if the models were not measured in the same way.
    """

    require: tuple[str, ...] = ()
    no_worse: tuple[str, ...] | None = None

    def rules(self) -> list[Require | NoWorse]:
        """The parsed rules. Raises a :class:`UserError` if a rule cannot be read."""
        optional = self.no_worse is None
        chosen = DEFAULT_NO_WORSE if self.no_worse is None else self.no_worse
        return [*map(Require.parse, self.require), *(NoWorse.parse(text, optional=optional) for text in chosen)]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one rule. ``passed`` is None if the rule does not apply."""

    rule: str
    passed: bool | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Require:
    """Requires a metric to be at least, at most, above or below a number."""

    metric: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Require:
        """Parse ``NAME>=NUMBER``, or a rule with ``>``, ``<=`` or ``<``."""
        match = _REQUIREMENT.fullmatch(text)
        bound = _number(match[3]) if match else None
        if match is None or bound is None:
            raise UserError(f"the requirement {text!r} cannot be read; write NAME>=NUMBER, such as chat.accuracy>=0.9")
        return cls(match[1], match[2], bound)

    def judge(self, metrics: Mapping[str, Metric], _promoted: Mapping[str, Metric] | None) -> Outcome:
        """The outcome of this rule for a model with the given metrics."""
        rule, wanted = f"{self.metric}{self.comparison}{self.bound:g}", f"{_IN_WORDS[self.comparison]} {self.bound:g}"
        if self.metric not in metrics:
            return Outcome(rule, False, f"{self.metric} was not measured; {wanted} is required")
        value = metrics[self.metric].value
        passed = bool(_COMPARISONS[self.comparison](value, self.bound))
        return Outcome(rule, passed, f"{self.metric} is {value:.4g}; {wanted} is required")


@dataclasses.dataclass(frozen=True)
class NoWorse:
    """Requires that a metric is not worse than for the promoted model by more than ``margin``.

    Attributes:
        optional: whether the rule is skipped, instead of failing, if the metric was not measured for both models in
            the same way. If no other model is promoted, the rule is always skipped.
    """

    metric: str
    margin: float
    optional: bool = False

    @classmethod
    def parse(cls, text: str, *, optional: bool = False) -> NoWorse:
        """Parse ``NAME:MARGIN``, or ``NAME`` for a margin of 0."""
        name, colon, margin_text = text.strip().partition(":")
        margin = _number(margin_text) if colon else 0.0
        if not name or margin is None or margin < 0:
            raise UserError(f"the rule {text!r} cannot be read; write NAME:MARGIN, such as chat.accuracy:0.01")
        return cls(name, margin, optional)

    def judge(self, metrics: Mapping[str, Metric], promoted: Mapping[str, Metric] | None) -> Outcome:
        """The outcome of this rule for a model with the given metrics.

        ``promoted`` has the metrics of the promoted model, and is None if no other model is promoted.
        """
        rule = f"{self.metric} worse by at most {self.margin:g}"
        if promoted is None:
            return Outcome(rule, None, "no other checkpoint is promoted")
        own, other = metrics.get(self.metric), promoted.get(self.metric)
        if own is None or other is None:
            which = "this model" if own is None else "the promoted model"
            return self._not_comparable(rule, f"{self.metric} was not measured for {which}")
        if own.how != other.how:
            return self._not_comparable(rule, f"{self.metric} was measured in another way for the promoted model")
        lower = self.metric.rpartition(".")[2].endswith(_LOWER_IS_BETTER)
        worse_by = own.value - other.value if lower else other.value - own.value
        passed = worse_by <= self.margin + _ROUNDING
        allowed = f"be worse by at most {self.margin:g}" if self.margin else "not be worse"
        values = f"{self.metric} is {own.value:.4g}, the promoted model has {other.value:.4g}"
        return Outcome(rule, passed, f"{values}; it may {allowed}")

    def _not_comparable(self, rule: str, reason: str) -> Outcome:
        return Outcome(rule, None if self.optional else False, reason)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
