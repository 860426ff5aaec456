"""Exported folders in transformers and in lm-evaluation-harness.

Neither package is installed with the project. docs/export.md says how to run these tests.
"""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train.export import ExportSettings, export_checkpoint
from nanochat_core.chat import parse_messages, render_prompt
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.store import Store, open_store
from nanochat_core.tokenizer import ASSISTANT_END, SPECIAL_TOKENS
from tests.support.exported_models import save_random, tokenizer
from tests.support.lm_eval_task import TASK, assert_equal_to_ours, choice_items, write_task

# Both packages read these variables when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", str(Path(tempfile.gettempdir(), "nanochat-tests-huggingface")))
transformers = pytest.importorskip("transformers", reason="transformers is not installed (docs/export.md)")

REF = CheckpointRef("ours", "sft", 30)
SHAPES: list[dict[str, Any]] = [
    {},
    {"depth": 3, "window_pattern": "L", "n_kv_head": 4},
    {"depth": 1, "n_kv_head": 1},
    {"depth": 2, "window_pattern": "S", "context_length": 600},
    {"dtype": torch.bfloat16},
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "home"))


def exported(store: Store, folder: Path) -> Path:
    export_checkpoint(ExportSettings(home=str(store), model=REF.model, format="huggingface", folder=str(folder)))
    return folder


def loaded(folder: Path, **given: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **given).eval()


def drawn_ids(rows: int, time: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(tokenizer().vocab_size, (rows, time), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 2e-5 * expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_are_equal_to_the_rounding_of_fp32(store: Store, tmp_path: Path, shape: Any) -> None:
    ours = save_random(store, REF, **shape)
    model = loaded(exported(store, tmp_path / "out"))
    ids = drawn_ids(2, ours.config.context_length)
    expected = load_checkpoint(store, REF).build_model()(ids)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert close(model(ids).logits, expected)
    base = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert close(base(ids).last_hidden_state, load_checkpoint(store, REF).build_model().hidden(ids))


@torch.inference_mode()
def test_a_model_in_bf16_keeps_its_scales_in_fp32(store: Store, tmp_path: Path) -> None:
    save_random(store, REF, dtype=torch.bfloat16)
    model = loaded(exported(store, tmp_path / "out"), dtype=torch.bfloat16)
    in_fp32 = {name.rpartition(".")[2] for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert in_fp32 == {"smear_scale", "residual_scales", "skip_scales", "backout_scale"}
    ids = drawn_ids(2, 150)
    expected = load_checkpoint(store, REF).build_model(compute_dtype=torch.bfloat16)(ids)
    assert (model(ids).logits - expected).abs().mean() < 0.01 * expected.abs().mean()


def test_a_folder_needs_its_own_code_and_never_loads_as_another_network(store: Store, tmp_path: Path) -> None:
    save_random(store, REF)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(exported(store, tmp_path / "out"), trust_remote_code=False)


def test_a_model_that_transformers_saves_is_the_same_model(store: Store, tmp_path: Path) -> None:
    save_random(store, REF)
    model = loaded(exported(store, tmp_path / "out"))
    model.save_pretrained(tmp_path / "again")
    ids = drawn_ids(1, 40)
    with torch.inference_mode():
        assert torch.equal(loaded(tmp_path / "again")(ids).logits, model(ids).logits)


@torch.inference_mode()
def test_generation_continues_as_our_model_does(store: Store, tmp_path: Path) -> None:
    save_random(store, REF)
    model, ours = loaded(exported(store, tmp_path / "out")), load_checkpoint(store, REF).build_model()
    prompts = [drawn_ids(1, 130, seed=2)[0].tolist(), drawn_ids(1, 113, seed=3)[0].tolist()]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(20):
            ids.append(int(ours(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    pad, longest = tokenizer().bos_id, max(map(len, prompts))
    rows = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": pad}
    for use_cache in (True, False):
        together = model.generate(rows, attention_mask=mask, use_cache=use_cache, **settings)
        assert together[:, longest:].tolist() == expected
    beams = [
        model.generate(rows[:1], attention_mask=mask[:1], num_beams=3, use_cache=use_cache, **settings)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


def test_generation_ends_at_the_end_of_the_answer(store: Store, tmp_path: Path) -> None:
    save_random(store, REF)
    model = loaded(exported(store, tmp_path / "out"))
    end = tokenizer().special_ids[ASSISTANT_END]
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        hidden = model.model(torch.tensor([[1, 2, 3]])).last_hidden_state[0, -1]
        model.lm_head.weight[end] = hidden
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)[0, 3:].tolist() == [end]


def test_texts_and_conversations_have_the_same_ids(store: Store, tmp_path: Path) -> None:
    save_random(store, REF)
    folder, ours = exported(store, tmp_path / "out"), tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert len(theirs) == ours.vocab_size
    assert [theirs.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(ours.special_ids.values())
    draw = random.Random(0)
    letters = "aannth er.12\n\n  \t'sé你🙂€\u0301\u2028\u0085ſKßﬁ"
    any_character = [chr(code) for code in range(1, 0x3000)]
    texts = ["", " ", "banana ananas", *("".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(3000))]
    texts += ["".join(draw.choices(any_character, k=30)) for _ in range(1000)]
    # Each text has the same character in two places, next to characters that might form one piece with it.
    texts += [f"a{chr(code)}1 {chr(code)}b" for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert ids == ours.encode(text), repr(text)
    assert theirs("the end")["input_ids"] == [ours.bos_id, *ours.encode("the end")]
    text = "  the café\n\n costs 3 € "
    assert theirs.decode(ours.encode(text)) == text
    messages = [
        {"role": "system", "content": " Be short.\n"},
        {"role": "user", "content": "\n 1 + 1? "},
        {"role": "assistant", "content": [{"type": "python", "text": "1 + 1"}, {"type": "text", "text": " 2 "}]},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert rendered["input_ids"].tolist() == [render_prompt(ours, parse_messages(messages))]
    # ``generate`` accepts the inputs under the names that the tokenizer gives them.
    assert loaded(folder).generate(**rendered, max_new_tokens=2).size(1) <= rendered["input_ids"].size(1) + 2


def test_lm_eval_finds_the_same_likelihood_of_every_option(store: Store, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (docs/export.md)")
    from lm_eval.tasks import TaskManager

    save_random(store, REF)
    items = choice_items(24)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(exported(store, tmp_path / "out")),
            "trust_remote_code": True,
            "add_bos_token": True,
            "dtype": "float32",
        },
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(write_task(tmp_path, items)), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    theirs = {
        each["doc"]["query"]: [float(choice[0][0]) for choice in each["resps"]] for each in found["samples"][TASK]
    }
    assert_equal_to_ours(store, REF, tmp_path, items, theirs)
