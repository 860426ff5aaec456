"""Measure how well a tokenizer compresses text: ``python -m jobs.eval.tokenizer --tokenizer demo``."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from jobs.data.tokenizers import dataset_of, load_tokenizer
from jobs.measures.compression import TEXT_BYTES, evaluate, render
from jobs.program import JobSettings, run_program
from nanochat_core.settings import setting
from nanochat_core.store import Lease, open_store


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerEvalSettings(JobSettings):
    """Compare the bytes per token of a tokenizer of the store with GPT-2's and GPT-4's tokenizers."""

    tokenizer: str = setting(help="name of the tokenizer in the store")
    dataset: str = setting("", "text dataset to measure on as well; empty for the tokenizer's training dataset")
    text_bytes: int = setting(TEXT_BYTES, "bytes of text to measure on from each split of the dataset", minimum=1)
    gpt2_file: str = setting("", "file of GPT-2's tokens (r50k_base.tiktoken or vocab.bpe); empty for tiktoken's cache")
    gpt4_file: str = setting("", "file of GPT-4's tokens (cl100k_base.tiktoken); empty for tiktoken's cache")
    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "least severe level that is logged")


def run(settings: TokenizerEvalSettings, show: Callable[[str], None]) -> None:
    """Measure the tokenizer, show a table, and store the results next to the tokenizer, as JSON and Markdown."""
    store = open_store(settings.home)
    tokenizer = load_tokenizer(store, settings.tokenizer)
    name, size = settings.tokenizer, settings.text_bytes
    dataset = settings.dataset or dataset_of(store, name)
    with Lease(store, f"tokenizers/{name}", "jobs.eval.tokenizer"):
        evaluation = evaluate(store, name, tokenizer, dataset, size, settings.gpt2_file, settings.gpt4_file)
    show(render(name, evaluation))


if __name__ == "__main__":
    run_program(
        "jobs.eval.tokenizer",
        "tokenizer-eval",
        TokenizerEvalSettings,
        lambda settings: run(settings, lambda line: print(line, end="")),
    )
