"""The outcomes of ``jobs.eval.gpu`` as a Markdown page and as a plot."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.markdown import block, code, duration, percent, table
from jobs.plots import panels, shades, short

Document = dict[str, Any]

# The goals: the MFU of training, and the share of the bandwidth that the decoding of one sequence uses.
LEAST_MFU, LEAST_BANDWIDTH = 0.5, 0.7
_SMALL = "**Tiny models show here that every part works. The speeds say nothing about a GPU or about real models.**"


def page(document: Document, names: Sequence[str], plot: str) -> str:
    """The page with the outcomes of all parts.

    Args:
        document: the content of the JSON file; its parts may be incomplete.
        names: the names of all parts.
        plot: file name of the plot; empty if there is none.
    """
    parts, machine = document["parts"], document["machine"]
    lines = [
        f"# {document['card']}",
        "",
        "`python -m jobs.eval.gpu` wrote this page. Shares are relative to the rates under Limits. MFU is relative",
        "to the card's peak in bf16, or to the measured speed of matrix products if the table of peaks lacks the card.",
        "",
        f"torch {machine['torch']}, {machine['cores']} CPU cores, models of the scale `{document['scale']}`, source "
        f"`{document['source']}`.",
        *([] if document["scale"] == "full" else ["", _SMALL]),
        "",
        *table(("Part", "Outcome", "Time"), [_outcome(name, parts.get(name)) for name in names]),
        "",
    ]
    for name in names:
        outcome = parts.get(name, {})
        if outcome.get("status") == "failed":
            lines += [f"## {name}: failed", "", *block(outcome["reason"]), ""]
        elif outcome.get("status") == "skipped":
            lines += [f"## {name}: skipped", "", outcome["reason"], ""]
    training = {name: _result(parts, name) for name in names if name.startswith("training d")}
    inference = {name: _result(parts, name) for name in names if name.startswith("inference d")}
    for title, found, text in (
        ("Training", training, _training),
        ("Decoding", inference, _decoding),
        ("Prefill", inference, _prefill),
        ("Under load", inference, _under_load),
    ):
        if known := {name: result for name, result in found.items() if result}:
            lines += [f"## {title}", "", *text(known), ""]
    for name, section in _SECTIONS.items():
        if result := _result(parts, name):
            lines += [f"## {name[0].upper()}{name[1:]}", "", *section(result), ""]
    if plot:
        lines += [f"![Speed by batch size]({plot})", ""]
    return "\n".join(lines)


def plot_verdict(path: Path, document: Document) -> None:
    """Draw the speed of decoding by batch size. Without measurements or without matplotlib, nothing is written."""
    rows = {
        name: outcome["result"]["decode"]
        for name, outcome in document["parts"].items()
        if name.startswith("inference d") and outcome["status"] == "passed"
    }
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return
    with panels(path, 2) as (speed, share):
        for color, (name, decode) in zip(shades(len(rows)), rows.items(), strict=True):
            sizes = [row["batch"] for row in decode]
            speed.plot(sizes, [row["tokens_per_second"] for row in decode], "o-", color=color, label=name)
            if all(row["bandwidth_share"] is not None for row in decode):
                share.plot(sizes, [row["bandwidth_share"] for row in decode], "o-", color=color)
                share.plot(sizes, [row["flops_share"] for row in decode], "o--", color=color)
        speed.legend()
        speed.set(title="Decoding", xlabel="sequences at a time", ylabel="tokens per second")
        share.set(title="Share of bandwidth (solid) and FLOP/s (dashed)", xlabel="sequences at a time")
        for axis in (speed, share):
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)


def _result(parts: Document, name: str) -> Any:
    outcome = parts.get(name, {})
    return outcome.get("result") if outcome.get("status") == "passed" else None


def _outcome(name: str, outcome: Document | None) -> tuple[str, str, str]:
    if outcome is None:
        return name, "not run yet", "—"
    return name, outcome["status"], duration(outcome["seconds"])


def _goal(share: float | None, least: float) -> str:
    """A share as a text in percent, in bold if the share is at least ``least``."""
    return percent(share) if share is None or share < least else f"**{percent(share)}**"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.3g}"


def _training(results: Document) -> list[str]:
    rows = [
        (
            name.removeprefix("training "),
            str(result["rows"]),
            f"{result['tokens_per_second_global_batch']:,.0f}",
            _goal(result["mfu"], LEAST_MFU),
            _ms(result["pass_seconds"]),
            _ms(result["optimizer_seconds"]),
            "—" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f}",
            f"{result['first_step_seconds']:.1f}",
        )
        for name, result in results.items()
    ]
    header = ("Model", "Rows", "tokens/s", "MFU", "pass, ms", "optimizer, ms", "peak GiB", "first step, s")
    return [
        f"Speed with 2^19 tokens per step. An MFU is bold if it reaches the goal of {percent(LEAST_MFU)}.",
        "",
        *table(header, rows),
    ]


def _decoding(results: Document) -> list[str]:
    rows = []
    for name, result in results.items():
        for graphs, key in (("on", "decode"), ("off", "decode_without_graphs")):
            rows += [
                (
                    name.removeprefix("inference "),
                    graphs,
                    str(row["batch"]),
                    f"{row['tokens_per_second']:,.0f}",
                    _ms(row["step_seconds"]),
                    _goal(row["bandwidth_share"], LEAST_BANDWIDTH),
                    percent(row["flops_share"]),
                )
                for row in result[key]
            ]
    header = ("Model", "CUDA graphs", "Batch", "tokens/s", "step, ms", "bandwidth", "FLOP/s")
    return [
        f"A share of the bandwidth is bold if it reaches the goal for batch 1, {percent(LEAST_BANDWIDTH)}.",
        "",
        *table(header, rows),
    ]


def _prefill(results: Document) -> list[str]:
    rows = [
        (
            name.removeprefix("inference "),
            str(row["token_budget"]),
            f"{row['tokens_per_second']:,.0f}",
            percent(row["flops_share"]),
        )
        for name, result in results.items()
        for row in result["prefill"]
    ]
    return table(("Model", "Tokens per step", "tokens/s", "FLOP/s"), rows)


def _under_load(results: Document) -> list[str]:
    rows = [
        (
            name.removeprefix("inference "),
            f"{row['requests_per_second']:g}",
            *(
                "—" if row[key] is None else _ms(row[key][place])
                for key in ("time_to_first_token", "inter_token_latency")
                for place in (0, 1)
            ),
        )
        for name, result in results.items()
        for row in result["under_load"]
    ]
    header = ("Model", "requests/s", "first token p50, ms", "p95", "between tokens p50, ms", "p95")
    return table(header, rows)


def _limits(result: Document) -> list[str]:
    return [f"{result['bytes_per_second'] / 1e9:,.0f} GB/s, {result['flops_per_second'] / 1e12:,.3g} TFLOP/s."]


def _tests(result: Document) -> list[str]:
    return [", ".join(f"{count} {kind}" for kind, count in result.items()) + "."]


def _numerics(result: Document) -> list[str]:
    errors = [
        (name, _short(error["largest"]), _short(error["mean_square"]), _short(error["mean_square_plain"]))
        for name, error in result["log_probabilities"].items()
    ]
    header = ("Log probabilities", "largest error", "mean square", "mean square of a plain forward pass")
    gradients = [(name, _short(error)) for name, error in result["gradients"].items()]
    return [*table(header, errors), "", *table(("Gradients", "relative error"), gradients)]


def _attention(result: Document) -> list[str]:
    rows = [(name, _ms(seconds)) for name, seconds in result["seconds"].items()]
    shape = " x ".join(map(str, result["shape"]))
    return [
        f"Forward and backward pass of {shape} (rows, tokens, heads, channels).",
        "",
        *table(("Backend", "ms"), rows),
    ]


def _muon(result: Document) -> list[str]:
    rows = [
        (
            row["dtype"],
            " x ".join(map(str, row["matrices"])),
            _ms(row["seconds"]),
            f"{row['flops_per_second'] / 1e12:,.3g}",
        )
        for row in result["products"]
    ]
    return table(("dtype", "Matrices", "ms", "TFLOP/s"), rows)


def _profiles(result: Document) -> list[str]:
    lines = []
    for name, profile in result.items():
        lines += [
            f"### {name[0].upper()}{name[1:]}",
            "",
            f"{_ms(profile['seconds'])} ms per step; kernels run for {percent(profile['busy_share'])} of the time.",
            "",
            *table(("Kernel", "share"), [(code(row["name"]), percent(row["share"])) for row in profile["kernels"]]),
            "",
        ]
    return lines[:-1]


def _memory(result: Document) -> list[str]:
    names = {
        "weight_bytes": "weights",
        "gradient_bytes": "gradients",
        "optimizer_bytes": "optimizer",
        "saved_bytes": "saved for the backward pass, not compiled",
        "serving_weight_bytes": "weights for serving",
    }
    rows = [
        (
            f"d{plan['depth']}",
            *(f"{plan[key] / 2**30:.2f}" for key in names),
            f"{plan['cache_bytes_per_token'] / 1024:,.0f}",
        )
        for plan in result["plans"]
    ]
    return [
        f"Planned with fake tensors, for micro-batches of {result['plans'][0]['rows']} rows, in GiB (cache: KiB).",
        "",
        *table(("Model", *names.values(), "cache per token"), rows),
    ]


def _lines(result: Document) -> list[str]:
    lines: list[str] = result["lines"]
    return lines if lines[0].startswith("|") else block("\n".join(lines))


def _short(value: float) -> str:
    return short(value) if value >= 1e-2 or not value else f"{value:.1e}"


_SECTIONS = {
    "limits": _limits,
    "tests": _tests,
    "numerics": _numerics,
    "attention": _attention,
    "muon": _muon,
    "profile": _profiles,
    "memory": _memory,
    "engine beside karpathy/nanochat": _lines,
    "engine beside transformers": _lines,
    "training beside karpathy/nanochat": _lines,
}
