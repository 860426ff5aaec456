"""The chat evaluation correctly counts real answers from the batched engine and the sandbox."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.demo_world import EvalItem, evaluation_set, pretraining_documents
from jobs.eval import chat
from jobs.eval.chat import ChatEvalSettings
from jobs.eval.chat_eval import conversations
from jobs.eval.chat_eval.conversations import Answer, ChatResult, evaluate
from jobs.eval.checkpoints import pick_checkpoint
from jobs.eval.report_card.held_out import SAMPLING, continue_text
from jobs.generation.completions import read_completion
from jobs.generation.python_tool import SandboxTool
from jobs.recipes import find_recipe
from jobs.train.tokenizer import train_tokenizer
from nanochat_core import tokenizer as tok
from nanochat_core.chat import parse_messages, render_conversation, render_prompt
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.engine import Completion, Token, ToolCall, ToolOutput, ToolResult
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint

MODEL = "untrained"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an untrained model, for which special tokens are as likely as others."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer(pretraining_documents(seed=1, n=200), 400)
    model = GPT(ModelConfig.from_depth(1, vocab_size=400, head_dim=32, context_length=512))
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    with torch.no_grad():
        model.head.weight.normal_(generator=generator)
    save_checkpoint(open_store(str(home)), CheckpointRef(MODEL, "sft", 7), model=model, tokenizer=tokenizer, meta={})
    return home


@pytest.fixture
def checkpoint(home: Path) -> Checkpoint:
    return load_checkpoint(open_store(str(home)), CheckpointRef(MODEL, "sft", 7))


def test_every_item_is_answered_and_the_answers_are_those_of_the_model(checkpoint: Checkpoint) -> None:
    items = evaluation_set(20)
    result = evaluate(checkpoint, items)
    assert [answer.item for answer in result.answers] == items
    assert result.revision == "sft/step_000007"
    # Greedy answers do not depend on the other questions in the batch.
    alone = evaluate(checkpoint, items[:1])
    assert alone.answers[0].text == result.answers[0].text


def chain(tokenizer: Tokenizer, tokens: Sequence[str]) -> GPT:
    """A model that continues each token of a chain with the next token. All tokens of the chain differ."""
    special = tokenizer.special_ids
    ids = [special[token] if token in special else token.encode()[0] for token in tokens]
    model = GPT(ModelConfig.from_depth(1, vocab_size=tokenizer.vocab_size, head_dim=32, context_length=128))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.residual_scales.fill_(1.0)
        for channel, (before, after) in enumerate(itertools.pairwise(ids)):
            model.embedding.weight[before, channel] = 1.0
            model.head.weight[after, channel] = 10.0
    return model


def test_the_model_computes_in_the_sandbox_and_goes_on_with_what_came_of_it(home: Path) -> None:
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    model = chain(
        tokenizer,
        [tok.ASSISTANT_START, tok.PYTHON_START, *"3+4", tok.PYTHON_END, tok.OUTPUT_END, *"Is: 7", tok.ASSISTANT_END],
    )
    store, ref = open_store(str(home)), CheckpointRef("chain", "sft", 1)
    save_checkpoint(store, ref, model=model, tokenizer=tokenizer, meta={})
    question = ({"role": "user", "content": "What is 3 + 4?"},)
    items = [
        EvalItem("arithmetic", question, expected, (), requires_tool=True, reference="")
        for expected in (("7",), ("8",), ("7", "seven"))
    ]
    result = evaluate(load_checkpoint(store, ref), items)
    for answer in result.answers:
        assert (answer.text, answer.tool_calls) == ("Is: 7", (("3+4", "7"),))
    assert [answer.correct for answer in result.answers] == [True, False, True]


def test_the_command_shows_accuracies_and_the_wrong_answers(home: Path) -> None:
    lines: list[str] = []
    result = chat.run(ChatEvalSettings(model=MODEL, home=str(home), items=14, threads=1), lines.append)
    assert result is not None
    demo = result["tasks"]["demo"]
    assert demo["questions"] == 14
    assert demo["accuracy"] < 0.5
    assert lines[0] == f"{MODEL} sft/step_000007"
    assert lines[2].split()[:4] == ["demo", str(demo["right"]), "14", f"{demo['accuracy']:.1%}"]
    wrong = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(wrong) == 14 - demo["right"]
    assert {answer["question"] for answer in wrong} <= {item.messages[-1]["content"] for item in evaluation_set(14)}
    # A second run shows the finished result without evaluating again.
    again: list[str] = []
    assert chat.run(ChatEvalSettings(model=MODEL, home=str(home), items=14, threads=1), again.append) == result
    assert again == lines


def test_recipes_are_asked_what_they_teach() -> None:
    everything = find_recipe("demo").evaluation_items(40)
    small = find_recipe("small").evaluation_items(40)
    assert small == [item for item in everything if item.kind in {"greeting", "identity", "arithmetic", "counting"}]
    assert len(everything) == 40
    assert find_recipe("demo").evaluation_items(40, seed=1) != everything
    with pytest.raises(UserError, match="there is no recipe 'other'"):
        find_recipe("other")


def test_the_newest_checkpoint_is_taken_or_the_one_that_is_named(home: Path, checkpoint: Checkpoint) -> None:
    store = open_store(str(home))
    assert pick_checkpoint(store, MODEL, "").ref.step == 7
    assert pick_checkpoint(store, MODEL, "sft/step_000007").ref.step == 7
    with pytest.raises(UserError, match="has no base checkpoint"):
        pick_checkpoint(store, MODEL, "", "base")


def reference_answer(tokenizer: Tokenizer, item: EvalItem) -> Completion:
    """The completion of a model that answers exactly with the question's reference answer."""
    prompt = render_prompt(tokenizer, parse_messages(item.messages))
    whole = [*item.messages, {"role": "assistant", "content": item.reference}]
    ids, mask = render_conversation(tokenizer, parse_messages(whole))
    tokens = [Token(i, forced=not counted) for i, counted in zip(ids, mask, strict=True)][len(prompt) :]
    parts = item.reference if isinstance(item.reference, list) else []
    events: list[ToolCall | ToolResult] = []
    for part in parts:
        if part["type"] == "python":
            events.append(ToolCall(len(events) // 2, part["text"]))
        elif part["type"] == "python_output":
            events.append(ToolResult(len(events) // 2, "ok", part["text"], 0.01))
    return Completion(tokens, events)


def scripted_result(monkeypatch: pytest.MonkeyPatch, checkpoint: Any, items: Any, answers: Any) -> ChatResult:
    """The evaluation of a model with these scripted answers."""

    def generate(engine: Any, tokenizer: Any, task: Any, numbers: Any) -> Any:
        assert len(numbers) == len(answers) == len(task.questions)
        return ((number, (read_completion(tokenizer, answers[number]),)) for number in numbers)

    monkeypatch.setattr(conversations, "generate", generate)
    return evaluate(checkpoint, items)


def test_perfect_answers_are_all_right_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    items = evaluation_set(100, seed=5)
    perfect = [reference_answer(checkpoint.tokenizer, item) for item in items]
    result = scripted_result(monkeypatch, checkpoint, items, perfect)
    assert [answer.item for answer in result.answers if not answer.correct] == []
    assert result.accuracy() == 1.0
    assert all(right == asked for right, asked in result.by_kind().values())

    silent = scripted_result(monkeypatch, checkpoint, items, [Completion([], []) for _ in items])
    assert silent.accuracy() == 0.0

    # Right answers without a tool call count as guesses.
    untooled = [dataclasses.replace(answer, tool_events=[]) for answer in perfect]
    result = scripted_result(monkeypatch, checkpoint, items, untooled)
    assert {answer.item.requires_tool for answer in result.answers if not answer.correct} == {True}
    assert result.accuracy() == sum(not item.requires_tool for item in items) / 100


def test_code_and_its_output_are_no_part_of_the_text(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    items = [item for item in evaluation_set(40) if item.requires_tool]
    perfect = [reference_answer(checkpoint.tokenizer, item) for item in items]
    for answer in scripted_result(monkeypatch, checkpoint, items, perfect).answers:
        written = [part["text"] for part in answer.item.reference if part["type"] == "text"]
        assert answer.text == "".join(written).strip()
        ((code, output),) = answer.tool_calls
        parts = [part["text"] for part in answer.item.reference if part["type"] != "text"]
        assert [code, output] == parts


def test_a_call_that_the_end_of_the_answer_cut_off_has_no_output(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    (item, *_) = [item for item in evaluation_set(40) if item.requires_tool]
    whole = reference_answer(checkpoint.tokenizer, item)
    end = [token.id for token in whole.tokens].index(checkpoint.tokenizer.special_ids[tok.PYTHON_END])
    cut = Completion(whole.tokens[: end + 1], whole.tool_events[:1])
    (answer,) = scripted_result(monkeypatch, checkpoint, [item], [cut]).answers
    assert answer.tool_calls == ()
    assert not answer.correct


def test_accuracies_count_the_right_answers_of_each_kind() -> None:
    items = evaluation_set(40)
    answers = tuple(Answer(item, "", (), correct=i % 4 == 0) for i, item in enumerate(items))
    result = ChatResult("sft/step_000001", answers)
    assert result.accuracy() == 0.25
    for kind, (right, asked) in result.by_kind().items():
        of_kind = [answer.correct for answer in answers if answer.item.kind == kind]
        assert (right, asked) == (sum(of_kind), len(of_kind))
        assert result.accuracy([kind]) == right / asked
    assert result.summary()["accuracy"] == 0.25


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1234 * 5678", ToolOutput("ok", "7006652")),
        ("'strawberry'.count('r')", ToolOutput("ok", "3")),
        ("print('hello')", ToolOutput("ok", "hello")),
        ("'text'", ToolOutput("ok", "text")),
        ("1 / 0", ToolOutput("error", "ZeroDivisionError: division by zero")),
    ],
)
async def test_code_runs_in_the_sandbox_and_the_model_reads_what_came_of_it(code: str, expected: Any) -> None:
    with SandboxExecutor() as executor:
        assert await SandboxTool(executor)(code, request_id="1", timeout_seconds=10) == expected


async def test_code_that_takes_too_long_is_ended() -> None:
    with SandboxExecutor() as executor:
        output = await SandboxTool(executor)("while True: pass", request_id="1", timeout_seconds=0.5)
    assert output.status == "timeout"
    assert output.output


def test_samples_continue_their_prompts_reproducibly(checkpoint: Checkpoint) -> None:
    prompts = ["The sea", "A boat is"]
    samples = continue_text(checkpoint, prompts, dataclasses.replace(SAMPLING, max_tokens=20))
    assert [prompt for prompt, _ in samples] == prompts
    assert all(continuation for _, continuation in samples)
    assert not any(tok.BOS in continuation for _, continuation in samples)
    assert continue_text(checkpoint, prompts, dataclasses.replace(SAMPLING, max_tokens=20)) == samples
