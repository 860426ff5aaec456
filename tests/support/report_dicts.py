"""Builds reports with any set of parts, for tests of the report page."""

import itertools
from typing import Any

from jobs.promotion.rules import Outcome

MACHINE = {"processor": "A processor", "cores": 2, "torch": "2.9.0"}
OPTIONAL = (
    "base",
    "sft",
    "rl",
    "chat",
    "samples",
    "core",
    "chat_tasks",
    "benchmark",
    "promotion",
    "warnings",
    "price",
)
# Samples of pretraining at six steps. Both prompts are the same text.
TRAINING_SAMPLES = [
    {"step": step, "samples": [["The", f" *sea* {step}."], ["The", "\n  end" if step > 30 else ""]]}
    for step in range(10, 70, 10)
]


# Answers of twelve snapshots to one question.
ANSWERS = [
    {"step": step, "answers": [["Who *keeps* it?", f"Mara | {step}" if step else ""]]} for step in range(0, 120, 10)
]


def stage(name: str, step: int, **changes: Any) -> dict[str, Any]:
    whole = {
        "revision": f"{name}/step_{step:06d}",
        "digest": name[0] * 64,
        "finished": True,
        "steps": step,
        "tokens": 4096 * step,
        "train_seconds": 61.5,
        "tokens_per_second": 19_980.0,
        "mfu": 0.46,
        "flops": 1.5e14,
        "parameters": 5_000_000,
        "dtype": "float32",
        "hardware": MACHINE | {"ranks": 2, "peak_flops": 1e12},
        "settings": {"steps": step, "mixture": "a,b:2", "seed": 1, "dtype": None, "note": "it's"},
        "final_loss": 1.25,
        "held_out": {"val_loss": 0.5},
        "skipped_steps": [],
        "learning_rates": {"head": 0.004, "matrix_64x64": 0.02},
        "gradient_norm": {"median": 0.25, "largest": 3.5},
        "data": {"epochs": 1.25, "unseen_share": 0.0, "cropped_share": 0.015, "cut": 1200, "left_out": 3},
        "samples": [],
        "answers": [],
        "made_from": "",
        "rl": None,
    }
    return whole | changes


def task(right: int, of: int, **changes: Any) -> dict[str, Any]:
    accuracy = right / of
    figures = {"right": right, "answers": of, "accuracy": accuracy, "baseline": 0.0, "centered": accuracy}
    return {**figures, "examples": [], **changes}


def report(*parts: str) -> dict[str, Any]:
    """A report that has the named parts of :data:`OPTIONAL`. Without a training stage, it describes an imported chat
    model.
    """
    stages = {
        "base": stage(
            "base",
            300,
            held_out={"val_bpb": 0.9},
            held_out_bits_per_byte=1.2345,
            xz_9_bits_per_byte=2.3456,
            samples=TRAINING_SAMPLES if "samples" in parts else [],
        ),
        "sft": stage("sft", 400, made_from="demo base/step_000300", answers=ANSWERS if "samples" in parts else []),
        "rl": stage(
            "rl",
            50,
            tokens=None,
            mfu=None,
            # Reports of earlier versions have no values for these fields.
            learning_rates={},
            gradient_norm=None,
            data={},
            rl={
                "reward": [0.3, 0.9],
                "heldout_reward": [0.31, 0.92, 0.91],
                "pass_at_k": [{"1": 0.3, "8": 0.6}, {"1": 0.9, "8": 1.0}],
            },
        ),
    }
    core = {
        "core": 0.2612,
        "missing": ["squad"],
        "tasks": {
            "hellaswag_zeroshot": {
                "accuracy": 0.45, "baseline": 0.25, "centered": 0.2667, "answers": 10_042, "shots": 0,
                "kind": "multiple_choice",
            }
        },
    }  # fmt: skip
    chat_tasks = {
        "chatcore": 0.35,
        "missing": [],
        "tasks": {
            "gsm8k": task(
                123,
                1319,
                pass_at_k={"1": 0.09, "4": 0.2},
                examples=[
                    {"question": "Six sevens?", "calls": [["6*7", "42"]], "answer": "#### 42", "right": True},
                    {"question": "Long? " * 200, "calls": [], "answer": "#### 9", "right": False},
                    {"question": "Another?", "calls": [], "answer": "#### 7", "right": False},
                ],
            ),
            "mmlu": task(30, 100, baseline=0.25, centered=0.0667),
        },
    }
    outcomes = [
        Outcome("chat.accuracy>=0.9", True, "chat.accuracy is 0.95; at least 0.9 is required"),
        Outcome("core.core>=0.3", False, "core.core is 0.2612; at least 0.3 is required"),
        Outcome("core.core worse by at most 0.02", None, "no other checkpoint is promoted"),
    ]
    chosen = {name: stages[name] for name in stages if name in parts}
    last = list(chosen)[-1] if chosen else "sft"
    return {
        "model": "demo",
        "revision": chosen[last]["revision"] if chosen else "sft/step_000001",
        "recipe": "demo" if "chat" in parts else "",
        "machine": MACHINE,
        "shape": {
            "layers": 3, "width": 192, "heads": 3, "kv_heads": 3, "vocab_size": 1024, "context_length": 256,
            "parameters": 5_000_000,
        },
        "price_per_hour": 24.0 if "price" in parts else None,
        **chosen,
        "tokenizer": {
            "vocab_size": 1024,
            "domains": {
                "references": {"GPT-2": 50_256},
                "texts": {"English prose": {"bytes": 827, "tokens": 400, "reference_tokens": {"GPT-2": 200}}},
            },
        },
        **({"chat": conversations()} if "chat" in parts else {}),
        **({"samples": [["def f(x):", "\n    return x\n\n```\n# a sea"], ["The", "n it rained."]]}
           if "samples" in parts else {}),
        "core_results": {last: core} if "core" in parts else {},
        "chat_results": {last: [chat_tasks]} if "chat_tasks" in parts else {},
        "benchmark": {
            "folder": "engine",
            "machine": MACHINE,
            "rows": [
                {"mix": "decode", "slots": 8, "rate": None, "tokens_per_second": 1234.5,
                 "time_to_first_token": [0.01, 0.02], "inter_token_latency": None},
            ],
        } if "benchmark" in parts else None,
        "warnings": ["3 steps had no finite loss."] if "warnings" in parts else [],
        "promotion": {
            "accepted": False,
            "promoted": False,
            "against": "demo sft/step_000200",
            "rules": [outcome.__dict__ for outcome in outcomes],
        } if "promotion" in parts else None,
    }  # fmt: skip


def conversations(count: int = 12) -> dict[str, Any]:
    return {
        "revision": "sft/step_000400",
        "accuracy": 0.95,
        "kinds": {"fact": {"right": 19, "items": 20}, "arithmetic": {"right": 38, "items": 40}},
        "examples": [
            {
                "kind": "fact",
                "before": [["user", "Who | is it?"], ["assistant", "Ann.\n# Or Bob."]] if i % 4 == 3 else [],
                "question": f"# Question {i}? Or | two",
                "expected": f"answer_{i}",
                "calls": [["print(1)\n\n'a|b'.count('|')", "1\n1"]] if i % 2 else [["1+1", "2"]],
                "answer": f"An answer\nwith | <b>two</b> lines, {i}" if i % 2 else f"# One | <b>line</b>, {i}",
                "right": i % 3 > 0,
            }
            for i in range(count)
        ],
        "wrong": [
            {"kind": "fact", "question": "A wrong one?", "calls": [], "answer": "", "right": False, "expected": "`x`"}
        ],
    }


def every_combination() -> list[tuple[str, ...]]:
    """Every possible set of training stages, combined with several choices of the other optional parts.

    The choices are: no other part, every other part, and every other part without one of them.
    """
    stages = [("base",), ("base", "sft"), ("base", "sft", "rl"), ("sft",), ("sft", "rl")]
    rest = [part for part in OPTIONAL if part not in ("base", "sft", "rl")]
    extras = [(), tuple(rest), *itertools.combinations(rest, len(rest) - 1)]
    return [(*chosen, *more) for chosen in stages for more in extras]
