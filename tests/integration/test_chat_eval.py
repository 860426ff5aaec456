"""The chat evaluation correctly counts real answers from the batched engine and the sandbox."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.demo_world.documents import pretraining_documents
from jobs.demo_world.evaluation import EvalItem, evaluation_set
from jobs.eval import chat
from jobs.eval.chat import ChatEvalSettings
from jobs.eval.chat_eval import evaluate_tasks
from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.eval.chat_eval.scores import GradedAnswers, right_by_group
from jobs.eval.report_card import held_out
from jobs.eval.report_card.held_out import Computing, evaluate_conversations
from jobs.generation import SAMPLING, SandboxTool, continue_text, read_completion
from jobs.recipes import find_recipe
from jobs.tasks import demo
from jobs.tasks.task import Response
from jobs.train.tokenizer import train_tokenizer
from nanochat_core import tokenizer as tok
from nanochat_core.chat import parse_messages, render_conversation, render_prompt
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint, pick_checkpoint, promote, withdraw
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
    """A store with an untrained model. For this model, special tokens are as likely as other tokens."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer(pretraining_documents(seed=1, n=200), 400)
    model = GPT(ModelConfig.from_depth(1, vocab_size=400, head_dim=32, context_length=2048))
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    with torch.no_grad():
        model.head.weight.normal_(generator=generator)
    save_checkpoint(open_store(str(home)), CheckpointRef(MODEL, "sft", 7), model=model, tokenizer=tokenizer, meta={})
    return home


@pytest.fixture
def checkpoint(home: Path) -> Checkpoint:
    return load_checkpoint(open_store(str(home)), CheckpointRef(MODEL, "sft", 7))


def graded(checkpoint: Checkpoint, items: Sequence[EvalItem]) -> list[tuple[EvalItem, Response, bool]]:
    """Each item with the model's answer, and whether the answer is right."""
    found = answer_greedily(checkpoint, demo.task(items))
    assert {(len(each.answers), len(each.right)) for each in found} == {(1, 1)}
    return [(item, each.answers[0], each.right[0]) for item, each in zip(items, found, strict=True)]


def test_every_item_is_answered_and_the_answers_are_those_of_the_model(checkpoint: Checkpoint) -> None:
    items = evaluation_set(20)
    answers = graded(checkpoint, items)
    # Greedy answers do not depend on the other questions in the batch.
    for number in (0, 19):
        assert graded(checkpoint, [items[number]]) == [answers[number]]


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
    answers = graded(load_checkpoint(store, ref), items)
    for _, answer, _ in answers:
        assert answer == Response("Is: 7", (("3+4", "7"),))
    assert [right for _, _, right in answers] == [True, False, True]


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
    assert small == [
        item for item in everything if item.kind in {"greeting", "identity", "arithmetic", "counting", "smalltalk"}
    ]
    assert len(everything) == 40
    assert find_recipe("demo").evaluation_items(40, seed=1) != everything
    with pytest.raises(UserError, match="there is no recipe 'other'"):
        find_recipe("other")


def test_the_newest_checkpoint_is_taken_or_the_one_that_is_named(home: Path, checkpoint: Checkpoint) -> None:
    store = open_store(str(home))
    assert pick_checkpoint(store, MODEL, "", "sft").ref.step == 7
    assert pick_checkpoint(store, MODEL, "", "sft", "rl").ref.step == 7
    assert pick_checkpoint(store, MODEL, "sft/step_000007").ref.step == 7
    with pytest.raises(UserError, match="no revision of model"):
        pick_checkpoint(store, MODEL, "promoted", "sft")
    promote(store, CheckpointRef.parse(MODEL, "sft/step_000007"))
    assert pick_checkpoint(store, MODEL, "promoted", "base").ref.revision == "sft/step_000007"
    withdraw(store, MODEL)
    with pytest.raises(UserError, match="has no base checkpoint"):
        pick_checkpoint(store, MODEL, "", "base")


def reference_answer(tokenizer: Tokenizer, item: EvalItem) -> Completion:
    """A completion that is exactly the question's reference answer."""
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


def scripted(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Any, items: Any, answers: Any
) -> list[tuple[EvalItem, Response, bool]]:
    """The graded answers of a model with these scripted answers."""

    def generate(engine: Any, tokenizer: Any, task: Any, numbers: Any) -> Any:
        assert len(numbers) == len(answers) == len(task.questions)
        return ((number, (read_completion(tokenizer, answers[number]),)) for number in numbers)

    monkeypatch.setattr(evaluate_tasks, "generate", generate)
    return graded(checkpoint, items)


def test_perfect_answers_are_all_right_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    items = evaluation_set(100, seed=5)
    perfect = [reference_answer(checkpoint.tokenizer, item) for item in items]
    assert [item for item, _, right in scripted(monkeypatch, checkpoint, items, perfect) if not right] == []

    silent = scripted(monkeypatch, checkpoint, items, [Completion([], []) for _ in items])
    assert not any(right for _, _, right in silent)

    # A question that requires the tool is answered wrongly without a tool call, even if the text is right.
    untooled = [dataclasses.replace(answer, tool_events=[]) for answer in perfect]
    answers = scripted(monkeypatch, checkpoint, items, untooled)
    assert [right for _, _, right in answers] == [not item.requires_tool for item in items]
    assert any(item.requires_tool for item in items)


def test_code_and_its_output_are_no_part_of_the_text(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    items = [item for item in evaluation_set(40) if item.requires_tool]
    perfect = [reference_answer(checkpoint.tokenizer, item) for item in items]
    for item, answer, _ in scripted(monkeypatch, checkpoint, items, perfect):
        written = [part["text"] for part in item.reference if part["type"] == "text"]
        assert answer.text.strip() == "".join(written).strip()
        ((code, output),) = answer.tool_calls
        parts = [part["text"] for part in item.reference if part["type"] != "text"]
        assert [code, output] == parts


def test_a_call_that_the_end_of_the_answer_cut_off_has_no_output(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    (item, *_) = [item for item in evaluation_set(40) if item.requires_tool]
    whole = reference_answer(checkpoint.tokenizer, item)
    end = [token.id for token in whole.tokens].index(checkpoint.tokenizer.special_ids[tok.PYTHON_END])
    cut = Completion(whole.tokens[: end + 1], whole.tool_events[:1])
    ((_, answer, right),) = scripted(monkeypatch, checkpoint, [item], [cut])
    assert answer.tool_calls == ()
    assert not right


def test_accuracies_count_the_right_answers_of_each_kind(
    monkeypatch: pytest.MonkeyPatch, home: Path, checkpoint: Checkpoint
) -> None:
    items = find_recipe("demo").evaluation_items(40)
    answers = [GradedAnswers((Response(" said "),), (i % 4 == 0,)) for i in range(40)]
    monkeypatch.setattr(held_out, "answer_greedily", lambda _checkpoint, _task, **_computing: answers)
    computing = Computing(torch.device("cpu"), torch.float32)
    result = evaluate_conversations(open_store(str(home)), checkpoint, "demo", 40, computing)
    assert result["accuracy"] == 0.25
    assert result["revision"] == "sft/step_000007"
    groups = right_by_group(demo.task(items).questions, answers)
    assert set(groups) == {item.kind for item in items} == set(result["kinds"])
    for kind, (right, asked) in groups.items():
        of_kind = [i % 4 == 0 for i, item in enumerate(items) if item.kind == kind]
        assert (right, asked) == (sum(of_kind), len(of_kind))
        assert result["kinds"][kind] == {"right": right, "items": asked}
    examples = [(i * 40 // 12, items[i * 40 // 12]) for i in range(12)]
    assert [(each["kind"], each["right"]) for each in result["examples"]] == [(e.kind, i % 4 == 0) for i, e in examples]
    assert {each["answer"] for each in result["examples"]} == {"said"}


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
    model, sampling = checkpoint.build_model(), dataclasses.replace(SAMPLING, max_tokens=20)
    samples = continue_text(model, checkpoint.tokenizer, prompts, sampling)
    assert [prompt for prompt, _ in samples] == prompts
    assert all(continuation for _, continuation in samples)
    assert not any(tok.BOS in continuation for _, continuation in samples)
    assert continue_text(model, checkpoint.tokenizer, prompts, sampling) == samples
