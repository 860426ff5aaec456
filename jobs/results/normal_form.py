"""Results of CORE and of the chat tasks in one shape, whatever else the evaluations keep with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def normal_form(result: Mapping[str, Any]) -> Json:
    """A result with the fields that reports, comparisons and the promotion gate read.

    ``partial`` names the tasks that are missing; of a chat evaluation ``chatcore`` is ChatCORE or None; every task has
    ``centered``, and ``of`` questions or answers where it counts them; ``pass_at_k`` is a share for each ``"k"``;
    ``examples`` have ``question``, ``calls`` (code and output of each), ``answer`` and ``right``.
    """
    form = {name: value for name, value in result.items() if name not in ("chat_core", "missing")}
    core = result.get("chat_core")
    if core is not None:
        form["chatcore"] = core["value"]
    missing = result.get("missing") or (core or {}).get("missing") or result.get("partial") or []
    form["partial"] = list(missing) if isinstance(missing, list | tuple) else ["some tasks"]
    if "tasks" in result:
        form["tasks"] = {name: _task(task) for name, task in result["tasks"].items()}
    return form


def pass_at_k(stored: Mapping[Any, float] | list[float] | None) -> dict[str, float]:
    """By ``k`` as a word; a list begins with pass@1."""
    if isinstance(stored, list):
        return {str(k): share for k, share in enumerate(stored, 1)}
    return {str(k): share for k, share in (stored or {}).items()}


def _task(task: Mapping[str, Any]) -> Json:
    form = {name: value for name, value in task.items() if name not in ("centred", "answers")}
    if "centred" in task:
        form.setdefault("centered", task["centred"])
    if "answers" in task:
        form.setdefault("of", task["answers"])
    if task.get("pass_at_k"):
        form["pass_at_k"] = pass_at_k(task["pass_at_k"])
    if "examples" in task and isinstance(task["examples"], list):
        form["examples"] = [_example(example) for example in task["examples"]]
    return form


def _example(example: Mapping[str, Any]) -> Json:
    return {
        "question": example.get("question", example.get("asked", "")),
        "calls": example.get("calls", []),
        "answer": example.get("answer", example.get("said", "")),
        "right": example.get("right", False),
    }
