"""A mixture repeats each conversation as often as its source's weight says. Errors name the entry that is wrong."""

import dataclasses
import json
import logging
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.mixture_entries import Entry, parse_mixture
from jobs.tasks.conversations import write_conversations
from jobs.tasks.registry import CONVERSATION_GENERATORS, open_conversations
from jobs.train.batches import mixtures
from jobs.train.batches.loader import PackedLoader
from jobs.train.batches.mixtures import Lost, Mixture, repeated
from jobs.train.batches.sources import ConversationSource, LengthSource
from nanochat_core.chat import Message, render_conversation
from nanochat_core.errors import UserError
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.store import Store, open_store
from nanochat_core.tokenizer import Tokenizer
from tests.support.odd_files import gzipped, write, zstd

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def conversation(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def questions(selection: Any) -> Counter[str]:
    return Counter(selection[i][0].text for i in range(len(selection)))


def numbered(start: int, count: int) -> list[dict[str, Any]]:
    return [conversation(f"question {number}") for number in range(start, start + count)]


def test_names_and_weights_are_read() -> None:
    assert parse_mixture("smoltalk, mmlu:3,my/file.jsonl:0.5") == [
        Entry("smoltalk", 1.0),
        Entry("mmlu", 3.0),
        Entry("my/file.jsonl", 0.5),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "an entry without a name"),
        ("a,,b", "an entry without a name"),
        (":2", "an entry without a name"),
        ("a:many", "gives a the weight 'many', which is not a number"),
        ("a:0", "gives a the weight 0; it must be above 0"),
        ("a:-1", "gives a the weight -1; it must be above 0"),
        ("a:inf", "gives a the weight inf; it must be at most 1,000,000"),
        ("a:1e15", "gives a the weight 1e15; it must be at most 1,000,000"),
        ("a:nan", "gives a the weight nan; it must be above 0"),
        ("a,b,a:2", "names a twice; give it a weight instead: a:2"),
    ],
)
def test_a_mixture_that_cannot_be_read_says_why(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_mixture(text)


@given(rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=200, unique=True), weight=st.floats(1e-3, 20))
def test_a_weight_is_how_often_every_row_is_shown(rows: Any, weight: Any) -> None:
    shown = repeated(rows, weight)
    assert len(shown) == max(1, round(weight * len(rows)))
    assert set(shown) <= set(rows)
    times = [Counter(shown)[row] for row in rows]
    assert max(times) - min(times) <= 1
    assert repeated(rows, weight) == shown


def test_sources_are_mixed_by_their_weights(store: Store) -> None:
    write_conversations(store, "a", "train", numbered(0, 40))
    write_conversations(store, "a", "val", numbered(1000, 3))
    write_conversations(store, "b", "train", numbered(100, 40))
    mixture = Mixture(store, "a:2,b:0.5")
    shown = questions(mixture.training)
    assert all(shown[f"question {number}"] == 2 for number in range(40))
    of_b = [number for number in range(100, 140) if shown[f"question {number}"]]
    assert len(of_b) == 19  # half of the 38 conversations that are not held out
    assert len(mixture.training) == 80 + 19
    held_out = sorted(int(question.split()[1]) for question in questions(mixture.validation))
    assert held_out[2:] == [1000, 1001, 1002]
    assert 100 <= held_out[0] < 120 <= held_out[1] < 140
    assert not any(shown[f"question {number}"] for number in held_out)


def test_what_is_held_out_is_never_trained_on_and_spread_over_the_file(store: Store) -> None:
    write_conversations(store, "a", "train", numbered(0, 10_000))
    mixture = Mixture(store, "a")
    held_out = sorted(int(question.split()[1]) for question in questions(mixture.validation))
    assert len(held_out) == 256
    assert all(i * 10_000 // 256 <= number < (i + 1) * 10_000 // 256 for i, number in enumerate(held_out))
    assert len({number % 10 for number in held_out}) == 10, "none of a file's repeating kinds is left out"
    assert questions(mixture.training) + questions(mixture.validation) == Counter(
        f"question {number}" for number in range(10_000)
    )


def test_the_digest_depends_on_the_conversations_and_the_weights(store: Store) -> None:
    write_conversations(store, "a", "train", numbered(0, 40))
    digests = [Mixture(store, text).digest for text in ("a", "a", "a:1", "a:2")]
    write_conversations(store, "a", "train", numbered(0, 41))
    digests.append(Mixture(store, "a").digest)
    assert len(set(digests)) == 3
    assert len(set(digests[:3])) == 1


def test_a_file_of_this_machine_is_a_source(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in numbered(0, 5)))
    assert len(Mixture(store, f"{file}:3").training) == 3 * 4


def write_parquet(store: Store, key: str, rows: list[dict[str, Any]]) -> None:
    path = Path(str(store), key)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_the_public_datasets_are_read_as_they_are_published(store: Store) -> None:
    write_parquet(store, "data/smoltalk/data/train-00000-of-00002.parquet", numbered(0, 3))
    write_parquet(store, "data/smoltalk/data/train-00001-of-00002.parquet", numbered(3, 3))
    write_parquet(store, "data/smoltalk/data/test-00000-of-00001.parquet", numbered(9, 1))
    mmlu = {"question": "mmlu?", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 3}
    write_parquet(store, "data/mmlu/auxiliary_train/train-00000-of-00001.parquet", [{"train": mmlu}] * 2)
    write_parquet(store, "data/mmlu/all/test-00000-of-00001.parquet", [mmlu])
    arc = {"id": "1", "question": "arc?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    for part in ("Easy", "Challenge"):
        write_parquet(store, f"data/arc/ARC-{part}/train-00000-of-00001.parquet", [arc] * 2)
    store.write("data/gsm8k/train.jsonl", b'{"question": "gsm?", "answer": "#### 1"}\n' * 2)
    mixture = Mixture(store, "smoltalk,mmlu:3,gsm8k:4,arc")
    shown = Counter(question.split("\n")[0] for question in questions(mixture.training).elements())
    (held_out,) = {f"question {number}" for number in range(6)} & questions(mixture.validation).keys()
    numbers = {f"question {number}" for number in range(6)} - {held_out}
    assert shown == Counter(dict.fromkeys(numbers, 1) | {"mmlu?": 3, "gsm?": 4, "arc?": 3})
    mixture.fit(TOKENIZER, 100)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "gsm8k",
            "there is no main/train-00000-of-00001.parquet in {store}/data/gsm8k: hf download "
            "openai/gsm8k --repo-type dataset --include 'main/train*' --local-dir {store}/data/gsm8k",
        ),
        ("smoltalk", "hf download HuggingFaceTB/smol-smoltalk"),
        ("mmlu", "hf download cais/mmlu"),
        ("identity", 'train.jsonl in {store}/data/identity: write it, one {{"messages": '),
        ("gsm8", "'gsm8' is none of smoltalk, mmlu, arc, gsm8k, identity, spelling, counting"),
        ("missing.jsonl", "the file missing.jsonl does not exist"),
        ("x/../../y", "'data/x/../../y' is no key of the store"),
        ("../x", "the file ../x does not exist"),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(store: Store, name: str, complaint: str) -> None:
    with pytest.raises(UserError) as raised:
        Mixture(store, name)
    assert complaint.format(store=store) in str(raised.value)
    assert "\n" not in str(raised.value)


BOT = {"role": "assistant", "content": "b"}
SHAREGPT: dict[str, Any] = {
    "id": "1",
    "conversations": [
        {"from": "gpt", "value": "Hello, how can I help?"},
        {"from": "human", "value": "Twice 4?"},
        {"from": "gpt", "value": "Eight."},
        {"from": "gpt", "value": "That is 8."},
        {"from": "human", "value": "Thanks"},
    ],
}
SHAREGPT_READ = [("user", "Twice 4?"), ("assistant", "Eight.\n\nThat is 8."), ("user", "Thanks")]
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.mark.parametrize(
    ("row", "read"),
    [
        (SHAREGPT, SHAREGPT_READ),
        ({**SHAREGPT, "system": "Be brief."}, [("system", "Be brief."), *SHAREGPT_READ]),
        (
            {"conversations": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, BOT]},
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        (ALPACA, [("user", "Add.\n\n1 and 2"), ("assistant", "3")]),
        ({**ALPACA, "input": "", "text": "…"}, [("user", "Add."), ("assistant", "3")]),
        ({"instruction": "a", "context": None, "response": "b", "category": "c"}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    ],
)
def test_conversations_are_read_in_the_forms_that_people_have(
    store: Store, tmp_path: Path, row: Any, read: Any
) -> None:
    rows = json.dumps([row] * 3)
    lines = "".join(f"{json.dumps(row)}\n" for _ in range(3))
    (tmp_path / "a.json").write_text(rows)
    (tmp_path / "b.JSONL").write_text(f"\ufeff{lines}")
    (tmp_path / "c.jsonl.gz").write_bytes(gzipped(lines.encode()))
    (tmp_path / "d.json.zst").write_bytes(zstd(rows.encode()))
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "e.parquet")
    for file in sorted(tmp_path.glob("?.*")):
        mixture = Mixture(store, str(file))
        assert len(mixture.training) == 2
        assert [(message.role, message.text) for message in mixture.training[0]] == read


def test_conversations_may_be_in_a_csv_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('instruction,input,output\n"Say, a",,"a\nb"\nSay c,d,e\n')
    training, _ = open_conversations(store, str(tmp_path / "a.csv"))
    texts = [[message.text for message in training[index]] for index in range(len(training))]
    assert texts == [["Say, a", "a\nb"], ["Say c\n\nd", "e"]]


def test_a_downloaded_folder_is_a_source_with_its_splits(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name, first, count in [("train-0", 0, 3), ("train-1", 3, 2), ("test-0", 90, 2)]:
        path = tmp_path / "hub" / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(numbered(first, count)), path)
    (tmp_path / "hub" / "README.md").write_text("# Conversations")
    mixture = Mixture(store, str(tmp_path / "hub"))
    assert questions(mixture.training) == Counter(f"question {number}" for number in range(5))
    assert questions(mixture.validation) == Counter(f"question {number}" for number in (90, 91))
    said = next(record for record in caplog.records if record.message == "files of the conversations")
    assert (said.training, said.validation) == (
        ["data/train-0.parquet", "data/train-1.parquet"],
        ["data/test-0.parquet"],
    )


def test_sharegpt_rows_without_an_answer_are_left_out_with_a_warning(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"conversations": SHAREGPT["conversations"][1:2]}
    rows = [SHAREGPT, {"conversations": []}, asked, {"conversations": SHAREGPT["conversations"][:1]}, SHAREGPT]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert len(Mixture(store, str(tmp_path / "a.json")).training) == 1
    (warning,) = [record for record in caplog.records if "without an answer" in record.message]
    assert (warning.left_out, warning.used) == (3, 2)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", json.dumps([SHAREGPT, {"conversations": ["hello"]}]), " item 2: conversations[0] is no object"),
        (
            "a.json",
            json.dumps([SHAREGPT, {"conversations": [{"from": "tool", "value": "x"}]}]),
            " item 2: conversations[0] is from 'tool', who is none of system, human",
        ),
        (
            "a.json",
            json.dumps([SHAREGPT, {"conversations": [{"from": "gpt"}]}]),
            " item 2: conversations[0] has a value",
        ),
        ("a.json", json.dumps([ALPACA, {**ALPACA, "output": None}]), " item 2: 'output' is not a text"),
        ("a.json", json.dumps([ALPACA, {"instruction": "a"}]), " item 2 has no field 'messages'"),
        ("a.json", json.dumps([{"dialog": ["a", "b"]}] * 2), " item 1 has no field 'messages'"),
        ("a.json", json.dumps([ALPACA])[:-1], " is cut off: the file ends before its JSON array does"),
        ("a.csv", "instruction,output\na,b\nc\n", ":3 has 1 fields, but the first line names 2"),
        (
            "a.json",
            json.dumps([ALPACA, {**ALPACA, "output": "\ud83d"}]),
            " item 2 has a text that is not valid Unicode",
        ),
        (
            "a.jsonl.gz",
            gzipped(json.dumps(ALPACA).encode().replace(b"Add", b"caf\xe9") + b"\n") * 2,
            ":1 has a text that is not valid Unicode or not UTF-8",
        ),
        ("a.json", json.dumps([ALPACA, {**ALPACA, "input": 5}]), " item 2: 'input' is not a text"),
        ("a.json", json.dumps([ALPACA, {"conversations": None}]), " item 2 has no field 'messages'"),
        ("a.json", json.dumps([ALPACA, {"question": "a", "answer": "b"}]), " item 2 has no field 'messages'"),
        ("a.json", json.dumps([ALPACA, {"messages": [BOT, BOT]}]), " item 2: messages[0].role is 'assistant' where"),
        (
            "a.json",
            json.dumps(
                [ALPACA, {"messages": [{"role": "user", "content": "a"}, BOT, {"role": "tool", "content": "5"}]}]
            ),
            " item 2: messages[2].role is 'tool'; use system, user or assistant",
        ),
        (
            "a.json",
            json.dumps(
                [ALPACA, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}]
            ),
            " item 2: messages[0].content has a part that is not text",
        ),
        ("a.jsonl.gz", gzipped(b'{"messages": 1}\n' * 999)[:-9], " is damaged or cut off"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1", " is a pointer of Git LFS"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1", " is a pointer of Git LFS"),
        ("a.txt", "hello", " holds text; conversations are rows of a parquet, JSON or CSV file"),
        ("a.json", "[]", " holds no conversation"),
    ],
)
def test_a_file_that_holds_no_conversations_is_named(
    store: Store, tmp_path: Path, name: str, content: Any, complaint: str
) -> None:
    file = write(tmp_path / name, content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        Mixture(store, f"{file}").fit(TOKENIZER, 100)
    assert str(raised.value).startswith(f"{file}{complaint}")


def test_other_columns_of_a_parquet_file_do_not_matter(store: Store, tmp_path: Path) -> None:
    """Python cannot represent the values of some columns. The folder's name looks like a column, as in Hive."""
    far = 2**60
    columns = {
        "messages": pa.array([row["messages"] for row in numbered(0, 3)]),
        "nanoseconds": pa.array([2**62 + 1] * 3, pa.timestamp("ns")),
        "duration": pa.array([1] * 3, pa.duration("ns")),
        "beyond the year 9999": pa.array([far] * 3, pa.timestamp("us")),
        "zone": pa.array([0] * 3, pa.timestamp("us", "Mars/Olympus")),
        "twice": pa.array([1] * 3),
    }
    table = pa.Table.from_arrays([*columns.values(), pa.array([2] * 3)], [*columns, "twice"])
    file = tmp_path / "messages=5" / "a.parquet"
    file.parent.mkdir()
    pq.write_table(table, file)
    mixture = Mixture(store, str(file))
    mixture.fit(TOKENIZER, 100)
    assert questions(mixture.training) + questions(mixture.validation) == Counter(f"question {n}" for n in range(3))
    pq.write_table(pa.Table.from_arrays([columns["messages"]] * 2, ["messages"] * 2), file)
    with pytest.raises(UserError, match=r"a\.parquet row \d: two columns are called 'messages'"):
        Mixture(store, str(file)).fit(TOKENIZER, 100)


def test_half_of_arc_is_not_arc(store: Store) -> None:
    write_parquet(store, "data/arc/ARC-Easy/train-00000-of-00001.parquet", [{"id": "1"}])
    with pytest.raises(UserError, match="hf download allenai/ai2_arc"):
        Mixture(store, "arc")


GOOD = json.dumps(conversation("a"))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (f"{GOOD}\n{{", ":2 is not JSON"),
        (f"{GOOD}\n\n[]", ":3 is not a JSON object"),
        (f"{GOOD}\n{{}}", ":2 has no field 'messages'"),
        (f'{GOOD}\n{{"messages": "hello"}}', ":2: 'messages' is not a list"),
        (f'{GOOD}\n{{"messages": ["hello"]}}', ":2: messages[0] is no object"),
        (f'{GOOD}\n{{"messages": 5}}', ":2: 'messages' is not a list"),
        (f'{GOOD}\n{{"messages": []}}', ":2: a conversation needs at least one message"),
        (f'{GOOD}\n{{"messages": [{{"role": "assistant", "content": "b"}}]}}', ":2: messages[0].role is 'assistant'"),
        (f'{GOOD}\n{{"messages": [{{"role": "user", "content": 5}}]}}', ":2: messages[0].content must be"),
        (f'{GOOD}\n{{"messages": [{{"role": "user", "content": "a"}}]}}', ":2 has no assistant message to learn from"),
        (f"{GOOD}\n\udcff", ":2 is not JSON"),
        ("\n\n", " holds no conversation"),
        ("", " holds no conversation"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(store: Store, split: str, lines: str, complaint: str) -> None:
    write_conversations(store, "chat", "train", numbered(0, 3))
    write_conversations(store, "chat", "val", numbered(0, 1))
    key = f"data/chat/{split}.jsonl"
    store.write(key, lines.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as raised:
        Mixture(store, "chat").fit(TOKENIZER, 100)
    assert str(raised.value).startswith(f"{key}{complaint}")
    assert "\n" not in str(raised.value)


def test_a_row_of_a_parquet_file_is_named_by_its_number(store: Store) -> None:
    rows = [{"question": "?", "answer": "1"}, {"question": "?", "answer": "<<2>>"}]
    write_parquet(store, "data/gsm8k/main/train-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match=r"^data/gsm8k/main/train-00000-of-00001\.parquet row 2: 'answer' has"):
        Mixture(store, "gsm8k").fit(TOKENIZER, 100)


def test_a_file_that_is_not_parquet_is_named(store: Store) -> None:
    store.write("data/gsm8k/main/train.parquet", b"hello")
    with pytest.raises(UserError, match=r"^data/gsm8k/main/train\.parquet is not a whole parquet file"):
        Mixture(store, "gsm8k")


def test_a_single_conversation_cannot_be_split(store: Store) -> None:
    write_conversations(store, "a", "train", numbered(0, 1))
    with pytest.raises(UserError, match="a holds one conversation; at least two are needed"):
        Mixture(store, "a")


def test_whatever_characters_a_message_has_it_is_read_back(store: Store) -> None:
    texts = ["a\u2028b", "a\x85b\x0b\x0c\x1c\r\nc", "😀", "<|assistant_end|>", '{"messages": []}']
    for split in ("train", "val"):
        write_conversations(store, "chat", split, [conversation(text, text) for text in texts])
    training = Mixture(store, "chat").training
    assert [[message.text for message in messages] for messages in (training[i] for i in range(5))] == [
        [text, text] for text in texts
    ]


def rendered_lengths(conversations: list[list[Message]]) -> list[int]:
    return [len(render_conversation(TOKENIZER, messages)[0]) for messages in conversations]


@pytest.fixture(autouse=True)
def few_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = dataclasses.replace(CONVERSATION_GENERATORS["counting"], size=200)
    monkeypatch.setitem(CONVERSATION_GENERATORS, "counting", counting)


def varied(store: Store) -> Mixture:
    write_conversations(store, "a", "train", [conversation("x" * (7 * i % 90), "y" * (i % 13)) for i in range(600)])
    return Mixture(store, "a:1.5,counting:0.5")


def test_lengths_are_those_of_the_rendered_conversations_and_measured_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = varied(store).fit(TOKENIZER, 1000, threads=2)
    assert fitted.lengths.tolist() == rendered_lengths(list(varied(store).training))
    assert fitted.lost == Lost(len(fitted.training), 0, 0, 0.0)
    monkeypatch.setattr(mixtures, "render_conversation", None)
    assert varied(store).fit(TOKENIZER, 1000).lengths.tolist() == fitted.lengths.tolist()
    other = Tokenizer([*TOKENIZER.token_bytes, b"xx"])
    with pytest.raises(TypeError):
        varied(store).fit(other, 1000)


def test_damaged_lengths_are_measured_again(store: Store) -> None:
    measured = varied(store).fit(TOKENIZER, 100).lengths.tolist()
    keys = store.keys("cache/sizes")
    assert len(keys) == 2
    for damage in (b"", b"\x93NUMPY", b"hello"):
        for key in keys:
            store.write(key, damage)
        assert varied(store).fit(TOKENIZER, 100).lengths.tolist() == measured


def test_lengths_pack_into_as_many_batches_as_the_conversations(store: Store) -> None:
    fitted = varied(store).fit(TOKENIZER, 65)

    def batches(source: Any, epochs: float) -> int:
        loader = PackedLoader(source, rows=4, context_length=64, pad_id=0, when_full="pad")
        count = 0
        while loader.epoch < epochs:
            loader.next_batch()
            count += 1
        return count

    for epochs in (0.5, 1, 2.3):
        real = batches(ConversationSource(fitted.training, TOKENIZER, 3), epochs)
        assert batches(LengthSource(fitted.lengths, 3), epochs) == real


@given(row_length=st.integers(8, 100))
def test_conversations_that_teach_nothing_in_a_row_are_left_out_and_longer_ones_are_cut(row_length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        rows = [conversation("q" * (3 * i % 80), "a" * (i % 30)) for i in range(100)]
        write_conversations(store, "a", "train", rows)
        write_conversations(store, "a", "val", [conversation("q")])
        mixture = Mixture(store, "a")
        fitted = mixture.fit(TOKENIZER, row_length)
    shown = [render_conversation(TOKENIZER, messages) for messages in mixture.training]
    kept = [len(ids) for ids, mask in shown if any(mask[:row_length])]
    assert fitted.lengths.tolist() == kept == rendered_lengths(list(fitted.training))
    tokens = sum(min(length, row_length) for length in kept)
    lost = fitted.lost
    assert (lost.conversations, lost.left_out) == (100, 100 - len(kept))
    assert lost.cut == sum(length > row_length for length in kept)
    assert lost.cropped_share == pytest.approx(1 - tokens / sum(len(ids) for ids, _ in shown))


def test_no_row_is_without_targets_however_long_the_prompts(store: Store) -> None:
    """Best fit takes the longest conversation first. Without care, whole batches would have prompts without answers."""
    rows = [conversation("q" * (300 if i % 10 == 0 else 9), "yes" * (i % 60)) for i in range(1000)]
    write_conversations(store, "a", "train", rows)
    fitted = Mixture(store, "a").fit(TOKENIZER, 65)
    assert 90 <= fitted.lost.left_out <= 100  # one hundred, minus those that are held out for validation
    loader = PackedLoader(
        ConversationSource(fitted.training, TOKENIZER, 1), rows=8, context_length=64, pad_id=0, when_full="pad"
    )
    while loader.epoch < 1.5:
        assert (loader.next_batch().targets != IGNORE_INDEX).any(dim=1).all()


@pytest.mark.parametrize(("split", "what"), [("train", "training"), ("val", "validation")])
def test_a_mixture_without_anything_to_learn_says_how_long_a_row_must_be(store: Store, split: str, what: str) -> None:
    for name in ("train", "val"):
        long = "q" * (90 if name == split else 2)
        write_conversations(store, "a", name, [conversation(long), conversation(long + "q")])
    complaint = f"the {what} conversations hold no assistant text that fits a row: a row has 50 tokens, .* after 94"
    with pytest.raises(UserError, match=complaint):
        Mixture(store, "a").fit(TOKENIZER, 50)


def test_gsm8k_can_be_learned_as_it_was_published(store: Store) -> None:
    if "NANOCHAT_TEST_DATA" not in os.environ:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    store.write("data/gsm8k/train.jsonl", Path(os.environ["NANOCHAT_TEST_DATA"], "gsm8k/train.jsonl").read_bytes())
    mixture = Mixture(store, "gsm8k:4")
    assert len(mixture.training) == 4 * (7473 - 256)
    assert len(mixture.fit(TOKENIZER, 2049).training) == 4 * (7473 - 256)
