"""Makes ``docs/roofline.md``, which shows what limits the speed on GPUs, from the formulas and the measured cards.

``make docs`` (``python -m tests.support.roofline_page``) writes the page. ``tests/unit/test_kernel_costs.py`` checks
that the page is current.
"""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.eval.bench.kernel_costs import CARDS, Card, Kernel, communication, decode_kernels, seconds, training_kernels
from jobs.eval.gpu_parts.context import FULL
from jobs.eval.gpu_parts.training import GLOBAL_BATCH
from jobs.markdown import one_line, percent, table
from nanochat_core.config import ModelConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "roofline.md"
RESULTS = ROOT / "docs" / "gpu"
DEPTHS = (12, 20, 26)
RANKS = 8
COLUMNS = 130  # of the text
# The decoding that make gpu measures begins after the prompt; this is the context in the middle of the outputs.
CONTEXT = FULL.prompt_tokens + FULL.output_tokens // 2

INTRODUCTION = """
`make docs` writes this page: the tables come from the formulas in `jobs/eval/bench/kernel_costs.py`, and the measured
columns from the results of [`make gpu`](gpu.md) in `docs/gpu/`. A dash in such a column means that the card has not
been measured. A kernel takes at least as long as its bytes need at the card's bandwidth, and as long as its FLOPs
need at the card's peak in bf16: `seconds = max(bytes / bandwidth, FLOPs / peak)`. The kernels of a step run one after
another, so the sum of their least times is a lower limit of the step's time. The rates of the cards are from NVIDIA's
data sheets: 989.4 TFLOP/s for both cards, and 3.35 TB/s (H100) and 4.8 TB/s (H200). The models d12, d20 and d26 have
12, 20 and 26 layers, a vocabulary of 32,768 and a context of 2,048.
"""
CONCLUSIONS = (
    """
- **Decoding one stream** of d20: on an H100, a step needs {alone:,.0f} µs to read its data, and the pauses between its
{launches} launches add about {launches} µs. Weights in FP8 would halve the first number, and fewer kernels would
lower the second.
""",
    """
- **Decoding 64 streams** with contexts of {context:,} tokens: attention takes {attention} of the lower limit, because
every head has its own keys and values. A cache in FP8, or heads that share keys (`n_kv_head`), would gain most.
""",
    """
- **Training** d20: the products of the blocks take {products} of the lower limit, and `--dtype fp8` at most doubles
their speed. Muon takes {muon}.
""",
    """
- **Several ranks**: with one micro-batch per rank, only the gathering of weights is exposed. It takes less than three
hundredths of the step.
""",
)


def page() -> str:
    """The whole page as Markdown."""
    sections = [decoding(), kernels(1), kernels(64), training(), ranks(), costs(), conclusions()]
    return "\n".join(["# What limits the speed on a GPU", "", _wrapped(INTRODUCTION), "", *sections])


def model(depth: int) -> ModelConfig:
    return FULL.model(depth)


def measured(card: Card, part: str, value: Callable[[Any], float | None]) -> str:
    """A number from the results of a card with this name; a dash if there are none."""
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text())
        outcome = document["parts"].get(part, {})
        if card.name in document["card"].split() and outcome.get("status") == "passed":
            found = value(outcome["result"])
            return "—" if found is None else _ms(found)
    return "—"


def decoding() -> str:
    rows = []
    for depth in DEPTHS:
        for batch in FULL.batch_sizes:
            step = decode_kernels(model(depth), batch, CONTEXT)

            def found(result: Any, batch: int = batch) -> float | None:
                return next((row["step_seconds"] for row in result["decode"] if row["batch"] == batch), None)

            rows.append(
                (
                    f"d{depth}",
                    str(batch),
                    f"{sum(kernel.bytes for kernel in step) / 1e9:.2f}",
                    f"{sum(kernel.flops for kernel in step) / 1e9:,.1f}",
                    str(sum(kernel.launches for kernel in step)),
                    *(
                        text
                        for card in CARDS
                        for text in (_ms(seconds(step, card)), measured(card, f"inference d{depth}", found))
                    ),
                )
            )
    limits = [name for card in CARDS for name in (f"{card.name} limit, ms", "measured")]
    lines = table(("Model", "Batch", "GB", "GFLOP", "launches", *limits), rows)
    return _section(
        "Decoding",
        f"The table is for one step of the engine in bf16, with contexts of {CONTEXT} tokens. We expect that a step "
        "takes longer than its limit mostly because the card is idle between two kernels.",
        lines,
    )


def kernels(batch: int) -> str:
    step = decode_kernels(model(20), batch, FULL.context_length // 2)
    card = CARDS[0]
    whole = seconds(step, card)
    rows = [_kernel_row(kernel, card, whole) for kernel in step]
    return _section(
        f"Kernels of a decode step, d20, batch {batch}, context {FULL.context_length // 2:,}",
        "",
        table(("Kernel", "launches", "MB", "GFLOP", "H100 limit, µs", "share"), rows),
    )


def training() -> str:
    rows = []
    for depth in DEPTHS:
        config, tokens = model(depth), FULL.train_rows * FULL.context_length
        micro_batches = GLOBAL_BATCH // tokens
        step = training_kernels(config, tokens, micro_batches)
        card = CARDS[0]
        whole = seconds(step, card)

        def found(result: Any) -> float:
            speed: float = result["tokens_per_second_global_batch"]
            return GLOBAL_BATCH / speed

        rows += [(f"d{depth}", *_kernel_row(kernel, card, whole), "") for kernel in step]
        measurements = ", ".join(measured(each, f"training d{depth} bf16", found) for each in CARDS)
        rows.append((f"d{depth}", "**whole step**", "", "", "", f"{1e6 * whole:,.0f}", percent(1.0), measurements))
    return _section(
        "Training",
        f"The table is for one optimizer step of {GLOBAL_BATCH:,} tokens on one GPU in bf16, in micro-batches of "
        f"{FULL.train_rows} rows. It counts only the launches of matrix products and of attention. Elementwise "
        "operations are not counted, because the compiler fuses them; they explain a part of the difference between "
        "the limit and the measured time. The last column has the measured times on an H100 and on an H200, in ms.",
        table(("Model", "Kernel", "launches", "MB", "GFLOP", "H100 limit, µs", "share", "measured"), rows),
    )


def ranks() -> str:
    rows = []
    for depth in DEPTHS:
        config, tokens = model(depth), FULL.train_rows * FULL.context_length
        sent, card = communication(config, RANKS), CARDS[0]
        forward, loss, attention, *optimizer = training_kernels(config, tokens, 1)
        backward = 2 / 3 * seconds((forward, loss, attention), card)
        update = seconds(optimizer, card) / RANKS
        reducing, gathering = sent.gradients / card.link, sent.weights / card.link
        rows.append(
            (
                f"d{depth}",
                f"{sent.gradients / 1e9:.2f}",
                _ms(reducing),
                _ms(backward),
                _ms(max(reducing - backward, 0.0)),
                _ms(gathering),
                _ms(update),
                _ms(max(gathering - update, 0.0)),
            )
        )
    header = (
        "Model",
        "GB per rank",
        "summing, ms",
        "backward, ms",
        "exposed",
        "gathering, ms",
        "update, ms",
        "exposed",
    )
    return _section(
        f"Communication on {RANKS} ranks",
        f"Each rank sends {RANKS - 1}/{RANKS} of all gradients, and then of all updated weights, at 450 GB/s. "
        "Gradients are summed during the last backward pass, and updated weights are gathered while the next weights "
        "are updated. If the communication takes longer than the computation beside it, the ranks wait for the rest, "
        "and this waiting time is *exposed*. The times are in ms, for a step with one micro-batch per rank.",
        table(header, rows),
    )


def costs() -> str:
    """What kernels cost that could be parts of others."""
    config, card = model(20), CARDS[0]
    rows = []
    for batch in (1, 64, 256):
        step = {kernel.name.partition(":")[0]: kernel for kernel in decode_kernels(config, batch, CONTEXT)}
        whole = seconds(list(step.values()), card)
        for names, idea in (
            (("relu_square",), "square in the product's epilogue"),
            (("prepare",), "rotate and write to the cache in the product's epilogue"),
            (("combine",), "leave it out while the keys of a context are not split"),
            (("softcap", "sampling"), "sample from the raw logits in one kernel"),
        ):
            saved = sum(step[name].seconds(card) for name in names)
            launches = sum(step[name].launches for name in names)
            rows.append(
                (str(batch), ", ".join(names), idea, f"{1e6 * saved:,.1f}", percent(saved / whole), str(launches))
            )
    return _section(
        "What separate kernels cost",
        "The table shows how much time a step of d20 would save on an H100 if a separate kernel became a part of "
        "another kernel, because fewer bytes are read and written. At batch 1, the saved launches save more time than "
        "the bytes: we assume that a card does nothing for about a microsecond between two kernels of a CUDA graph. "
        "The part `profile` of `make gpu` measures this pause.",
        table(("Batch", "Kernels", "Instead", "µs", "share of the limit", "launches saved"), rows),
    )


def conclusions() -> str:
    config, card = model(20), CARDS[0]
    alone, many = decode_kernels(config, 1, CONTEXT), decode_kernels(config, 64, FULL.context_length // 2)
    tokens = FULL.train_rows * FULL.context_length
    step = training_kernels(config, tokens, GLOBAL_BATCH // tokens)
    attention = next(kernel for kernel in many if kernel.name.startswith("attend_tokens:"))
    numbers = {
        "alone": 1e6 * seconds(alone, card),
        "launches": sum(kernel.launches for kernel in alone),
        "context": FULL.context_length // 2,
        "attention": percent(attention.seconds(card) / seconds(many, card)),
        "products": percent(step[0].seconds(card) / seconds(step, card)),
        "muon": percent(step[3].seconds(card) / seconds(step, card)),
    }
    return _section("What follows", "", [_wrapped(text.format(**numbers), indent="  ") for text in CONCLUSIONS])


def _kernel_row(kernel: Kernel, card: Card, whole: float) -> tuple[str, ...]:
    least = kernel.seconds(card)
    return (
        kernel.name,
        f"{kernel.launches:,}",
        f"{kernel.bytes / 1e6:,.1f}",
        f"{kernel.flops / 1e9:,.1f}",
        f"{1e6 * least:,.1f}",
        percent(least / whole),
    )


def _section(title: str, text: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", "", *([_wrapped(text), ""] if text else []), *lines, ""])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(one_line(text), COLUMNS, subsequent_indent=indent)


def _ms(duration: float) -> str:
    return f"{1000 * duration:,.3f}"


if __name__ == "__main__":
    PAGE.write_text(page())
