"""Exports of checkpoints: the files for transformers, and the layout of karpathy/nanochat.

The network in the exported modeling file runs here with stand-ins for the few names that it imports from transformers.
``tests/integration/test_export_transformers.py`` runs it with transformers itself.
"""

import ast
import dataclasses
import importlib.util
import itertools
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
import regex
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jobs.train.export import ExportSettings, export_checkpoint
from jobs.train.huggingface.folder import CHAT_TEMPLATE_FILE, MODELING_FILE, exported_name
from jobs.train.huggingface.tokenizer import tokenizers_file
from jobs.train.import_nanochat import ImportSettings, import_checkpoint
from nanochat_core.chat import parse_messages, render_conversation, render_prompt
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import Store, open_store
from nanochat_core.tokenizer import BOS, SPECIAL_TOKENS, Tokenizer
from tests.support.exported_models import save_random, tokenizer
from tests.support.upstream_folders import model_config as upstream_config
from tests.support.upstream_folders import random_weights, save

REF = CheckpointRef("ours", "sft", 30)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_nanochat.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "home"))


def exported(store: Store, folder: Path, /, **changes: Any) -> Path:
    given = {"home": str(store), "model": "ours", "format": "huggingface", "folder": str(folder)}
    export_checkpoint(ExportSettings(**(given | changes)))
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


# The following tests check the files for transformers.


def test_a_folder_has_every_file_and_nothing_else(store: Store, tmp_path: Path) -> None:
    save_random(store, REF)
    folder = exported(store, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "modeling_nanochat.py").read_bytes() == MODELING_FILE.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_weights_keep_their_bits_and_lose_their_padding(store: Store, tmp_path: Path) -> None:
    model = save_random(store, REF, dtype=torch.bfloat16)
    stored = safetensors.torch.load_file(exported(store, tmp_path / "out") / "model.safetensors")
    ours = model.state_dict()
    assert stored.keys() == {exported_name(name) for name in ours}
    for name, tensor in ours.items():
        found = stored[exported_name(name)]
        rows = model.config.vocab_size if tensor.size(0) == model.config.padded_vocab_size else tensor.size(0)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor[:rows]), name
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_the_config_says_what_the_network_computes(store: Store, tmp_path: Path) -> None:
    model = save_random(store, REF)
    config = read(exported(store, tmp_path / "out") / "config.json")
    assert config["attention_windows"] == [128, 128, 128, 160] == list(model.config.windows)
    assert config["value_embedding_layers"] == [1, 3]
    assert config["vocab_size"] == tokenizer().vocab_size
    assert config["model_type"] != "nanochat"  # transformers has another network of that name
    module = ast.parse(MODELING_FILE.read_text())
    classes = {node.name for node in module.body if isinstance(node, ast.ClassDef)}
    for target in config["auto_map"].values():
        name, _, class_name = target.partition(".")
        assert name == MODELING_FILE.stem
        assert class_name in classes
    assert set(config["architectures"]) <= classes


def test_the_modeling_file_imports_torch_and_transformers_alone() -> None:
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(MODELING_FILE.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"dataclasses", "torch", "transformers", "typing"}


@pytest.mark.parametrize(("stage", "end"), [("base", BOS), ("sft", "<|assistant_end|>"), ("rl", "<|assistant_end|>")])
def test_texts_end_as_in_training(store: Store, tmp_path: Path, stage: Any, end: str) -> None:
    save_random(store, CheckpointRef("ours", stage, 1))
    folder = exported(store, tmp_path / "out")
    stated, ids = read(folder / "tokenizer_config.json"), tokenizer().special_ids
    assert (stated["bos_token"], stated["eos_token"], stated["pad_token"]) == (BOS, end, BOS)
    assert [stated["bos_token"], *stated["additional_special_tokens"]] == list(SPECIAL_TOKENS)
    assert stated["model_max_length"] == 160
    for file in ("config.json", "generation_config.json"):
        assert read(folder / file)["eos_token_id"] == [ids["<|assistant_end|>"], ids[BOS]]
        assert read(folder / file)["bos_token_id"] == ids[BOS]


# The following tests compare tokenizer.json with a slow reference.


def encoded(content: dict[str, Any], text: str) -> list[int]:
    """Token ids of a text, as the tokenizers library defines them for the exported kind of file."""
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    model = content["model"]
    assert (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
    assert (byte_level["type"], byte_level["use_regex"], byte_level["add_prefix_space"]) == ("ByteLevel", False, False)
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    characters = gpt2_characters()
    ids = []
    for match in regex.finditer(split["pattern"]["Regex"], text):
        symbols = [characters[byte] for byte in match[0].encode()]
        if model["ignore_merges"] and "".join(symbols) in model["vocab"]:
            symbols = ["".join(symbols)]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        ids += [model["vocab"][symbol] for symbol in symbols]
    return ids


def gpt2_characters() -> dict[int, str]:
    """The character for each byte, computed as in GPT-2's source."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, n = {byte: chr(byte) for byte in shown}, 0
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + n)
            n += 1
    return characters


CONTENT, TOKENIZER = tokenizers_file(tokenizer()), tokenizer()


@given(st.one_of(st.text(max_size=40), st.text("an the12.\n \té你's", max_size=60)))
def test_a_text_has_the_same_ids(text: str) -> None:
    assert encoded(CONTENT, text) == TOKENIZER.encode(text)


@given(st.lists(st.binary(min_size=2, max_size=5), max_size=12, unique=True), st.text("ab\n ", max_size=40))
def test_a_text_has_the_same_ids_with_any_vocabulary(words: list[bytes], text: str) -> None:
    ours = Tokenizer([*(bytes([byte]) for byte in range(256)), *words])
    assert encoded(tokenizers_file(ours), text) == ours.encode(text)


def test_special_tokens_have_their_ids_and_bos_comes_first() -> None:
    added = {entry["content"]: entry["id"] for entry in CONTENT["added_tokens"]}
    assert added == TOKENIZER.special_ids
    assert all(entry["special"] and not entry["normalized"] for entry in CONTENT["added_tokens"])
    first = CONTENT["post_processor"]["single"][0]["SpecialToken"]["id"]
    assert CONTENT["post_processor"]["special_tokens"][first]["ids"] == [TOKENIZER.bos_id]


# The following tests check the chat template.


def rendered(messages: Any, **given: Any) -> list[int]:
    """Render the template and encode the text. Special tokens are found in the text by their names."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(CHAT_TEMPLATE_FILE.read_text())
    text = template.render(messages=messages, bos_token=BOS, **given)
    ids = []
    for piece in re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text):
        ids += [TOKENIZER.special_ids[piece]] if piece in TOKENIZER.special_ids else TOKENIZER.encode(piece)
    return ids


CODE = [
    {"type": "python", "text": "1 + 1"},
    {"type": "python_output", "text": "2"},
    {"type": "text", "text": " It is\n 2. "},
]
ASKED = {"role": "user", "content": "\n  How much is 1 + 1? "}
CONVERSATIONS = [
    [ASKED],
    [{"role": "system", "content": " Be short.\n"}, ASKED],
    [ASKED, {"role": "assistant", "content": " 2 \n"}, ASKED],
    [ASKED, {"role": "assistant", "content": CODE}, {"role": "user", "content": [{"type": "text", "text": "And? "}]}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_conversation_has_the_same_ids(messages: Any) -> None:
    parsed = parse_messages(messages)
    assert rendered(messages, add_generation_prompt=True) == render_prompt(TOKENIZER, parsed)
    assert rendered(messages) == render_conversation(TOKENIZER, parsed)[0]
    answered = [*messages, {"role": "assistant", "content": CODE}]
    assert rendered(answered) == render_conversation(TOKENIZER, parse_messages(answered))[0]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "needs a user message"),
        ([{"role": "system", "content": "x"}], "needs a user message"),
        ([ASKED, ASKED], "alternate"),
        ([{"role": "assistant", "content": "x"}], "alternate"),
        ([ASKED, {"role": "system", "content": "x"}], "alternate"),
        ([{"role": "user", "content": CODE}], "a part of type python"),
        ([{"role": "user", "content": [{"type": "image", "text": ""}]}], "a part of type image"),
        ([ASKED, {"role": "assistant", "content": "x"}], "nothing to answer"),
    ],
)
def test_a_conversation_that_was_never_trained_on_is_refused(messages: Any, complaint: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=complaint):
        rendered(messages, add_generation_prompt=True)


# The following tests run the exported network with stand-ins for transformers.


class Config:
    def __init__(self, **given: Any) -> None:
        vars(self).update(given)


class Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        pass

    @staticmethod
    def loss_function(logits: torch.Tensor, labels: torch.Tensor, **_given: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class CacheOfAll:
    """Keeps the keys and values of all tokens."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.layers[0][0].size(2) if self.layers else 0

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(both, dim=2) for both in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


@dataclasses.dataclass
class Output:
    last_hidden_state: Any = None
    loss: Any = None
    logits: Any = None
    cache: Any = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for value in vars(self).values() if value is not None)


@pytest.fixture
def modeling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modeling file as a module."""
    names = {
        "transformers": {"GenerationMixin": object, "PretrainedConfig": Config, "PreTrainedModel": Model},
        "transformers.cache_utils": {"Cache": CacheOfAll, "DynamicCache": CacheOfAll},
        "transformers.modeling_outputs": {"BaseModelOutputWithPast": Output, "CausalLMOutputWithPast": Output},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("exported_modeling", MODELING_FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(modeling: Any, folder: Path) -> Any:
    model = modeling.NanochatForCausalLM(modeling.NanochatConfig(**read(folder / "config.json")))
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval()


def drawn_ids(model: GPT, rows: int, time: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, time), generator=torch.Generator().manual_seed(seed))


SHAPES: list[dict[str, Any]] = [
    {},
    {"depth": 3, "window_pattern": "L", "n_kv_head": 4},
    {"depth": 1, "n_kv_head": 1},
    {"depth": 2, "window_pattern": "S", "context_length": 600},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_network_has_equal_logits(modeling: Any, store: Store, tmp_path: Path, shape: Any) -> None:
    ours = save_random(store, REF, **shape)
    reference = load_checkpoint(store, REF).build_model()
    theirs = loaded(modeling, exported(store, tmp_path / "out"))
    ids = drawn_ids(ours, 3, ours.config.context_length)
    expected, found = reference(ids), theirs(ids).logits
    assert found.shape == (3, ours.config.context_length, ours.config.vocab_size)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert torch.equal(theirs(ids, logits_to_keep=2).logits.argmax(-1), expected[:, -2:].argmax(-1))
    logits, _ = theirs(ids, use_cache=True, return_dict=False)
    assert torch.equal(logits, found)


@torch.inference_mode()
def test_a_cache_and_padding_change_nothing(modeling: Any, store: Store, tmp_path: Path) -> None:
    ours = save_random(store, REF)
    theirs = loaded(modeling, exported(store, tmp_path / "out"))
    rows = [drawn_ids(ours, 1, 150), drawn_ids(ours, 1, 137, seed=2)]
    ids, mask = torch.zeros(2, 150, dtype=torch.int64), torch.zeros(2, 150, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, -row.size(1) :], mask[i, -row.size(1) :] = row[0], 1
    cache = None
    found = []
    # The first pass reads a prompt. Each later pass reads one or several tokens.
    for length in [130, 131, 132, 140, 150]:
        given = theirs.prepare_inputs_for_generation(
            ids[:, :length], cache=cache, attention_mask=mask[:, :length], logits_to_keep=0
        )
        output = theirs(**given)
        cache = output.cache
        found.append(output.logits)
    logits = torch.cat(found, dim=1)
    for i, row in enumerate(rows):
        expected = theirs(row).logits[0]
        assert (logits[i, -row.size(1) :] - expected).abs().max() < 2e-5 * expected.abs().max()


def test_what_would_compute_other_logits_is_refused(modeling: Any, store: Store, tmp_path: Path) -> None:
    ours = save_random(store, REF)
    theirs = loaded(modeling, exported(store, tmp_path / "out"))
    ids = drawn_ids(ours, 1, 5)
    with pytest.raises(ValueError, match="needs input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 5, 64))
    with pytest.raises(ValueError, match="attention_mask of shape"):
        theirs(ids, attention_mask=torch.ones(1, 1, 5, 5))
    cache = theirs(ids, use_cache=True).cache
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="pass previous_ids"):
            theirs(ids, **{name: cache})


def test_a_gradient_reaches_every_weight(modeling: Any, store: Store, tmp_path: Path) -> None:
    ours = save_random(store, REF)
    theirs = loaded(modeling, exported(store, tmp_path / "out"))
    ids = drawn_ids(ours, 2, 140)
    loss = theirs(ids, labels=ids).loss
    assert float(loss) == pytest.approx(float(ours.loss(ids[:, :-1], ids[:, 1:])), rel=1e-5)
    loss.backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in theirs.parameters())


# The following tests check the export in the layout of karpathy/nanochat.


def upstream_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16])
def test_an_imported_checkpoint_goes_back_with_the_same_bytes(store: Store, tmp_path: Path, tables: Any) -> None:
    config = upstream_config(n_kv_head=1, window_pattern="sl")
    weights = random_weights(config)
    weights |= {name: tensor.to(tables) for name, tensor in weights.items() if "wte" in name or "value_embeds" in name}
    source = tmp_path / "theirs"
    save(source, config, weights)
    import_checkpoint(
        ImportSettings(
            folder=str(source), tokenizer_folder=str(source / "tokenizer"), model="ours", home=str(store), stage="sft"
        )
    )
    back = exported(store, tmp_path / "back", format="nanochat")
    assert upstream_files(back).keys() == {
        "chatsft_checkpoints/d4/model_001200.pt",
        "chatsft_checkpoints/d4/meta_001200.json",
        "tokenizer/tokenizer.pkl",
        "tokenizer/token_bytes.pt",
    }
    stored = torch.load(back / "chatsft_checkpoints/d4/model_001200.pt", weights_only=True)
    assert stored.keys() == weights.keys()
    for name, tensor in weights.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert read(back / "chatsft_checkpoints/d4/meta_001200.json") == read(source / "meta_001200.json")
    assert (back / "tokenizer/tokenizer.pkl").read_bytes() == (source / "tokenizer/tokenizer.pkl").read_bytes()


def test_our_checkpoint_comes_back_from_the_layout_of_nanochat(store: Store, tmp_path: Path) -> None:
    model = save_random(store, CheckpointRef("ours", "base", 7), dtype=torch.bfloat16)
    out = exported(store, tmp_path / "out", format="nanochat")
    again = import_checkpoint(
        ImportSettings(
            folder=str(out / "base_checkpoints/d4"),
            tokenizer_folder=str(out / "tokenizer"),
            model="again",
            home=str(store),
        )
    )
    checkpoint = load_checkpoint(store, again)
    assert (checkpoint.config, checkpoint.tokenizer.digest) == (model.config, tokenizer().digest)
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in checkpoint.weights.items())
    meta = read(out / "base_checkpoints/d4/meta_000007.json")
    assert (meta["step"], meta["max_seq_len"], meta["total_batch_size"]) == (7, 160, 8192)
    lengths = torch.load(out / "tokenizer/token_bytes.pt", weights_only=True)
    assert (lengths.dtype, lengths.tolist()) == (torch.int32, tokenizer().bytes_per_token)


# The following tests check the export program.


def test_the_newest_checkpoint_of_the_last_stage_is_taken_unless_another_is_named(store: Store, tmp_path: Path) -> None:
    for ref in (CheckpointRef("ours", "base", 9), CheckpointRef("ours", "sft", 2), CheckpointRef("ours", "sft", 3)):
        save_random(store, ref, depth=1)
    assert "ours sft/step_000003" in (exported(store, tmp_path / "a") / "README.md").read_text()
    named = exported(store, tmp_path / "b", revision="base/step_000009")
    assert "ours base/step_000009" in (named / "README.md").read_text()


def test_a_damaged_checkpoint_is_skipped(store: Store, tmp_path: Path) -> None:
    save_random(store, REF, depth=1)
    newest = CheckpointRef("ours", "sft", 40)
    save_random(store, newest, depth=1)
    (tmp_path / f"home/{newest.prefix}/config.json").write_text("{}")
    assert "ours sft/step_000030" in (exported(store, tmp_path / "out") / "README.md").read_text()


def test_an_empty_folder_may_exist_already(store: Store, tmp_path: Path) -> None:
    save_random(store, REF, depth=1)
    (tmp_path / "out").mkdir()
    assert {path.name for path in exported(store, tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "missing"}, "model 'missing' has no base or sft or rl checkpoint in .*; train or import it first"),
        ({"model": "../ours"}, "cannot name a model"),
        ({"revision": "sft"}, "names no checkpoint"),
        ({"revision": "sft/step_000031"}, "there is no checkpoint"),
        ({"folder": "used"}, "used is not empty; nothing is replaced"),
        ({"folder": "used/file"}, "file is not empty; nothing is replaced"),
        ({"folder": "used/file/below"}, "cannot be"),
    ],
)
@pytest.mark.parametrize("form", ["huggingface", "nanochat"])
def test_bad_input_is_refused_and_nothing_is_written(
    store: Store, tmp_path: Path, changes: Any, complaint: str, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random(store, REF, depth=1)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("mine")
    before = upstream_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        exported(store, Path("out"), format=form, **changes)
    assert upstream_files(tmp_path) == before


@pytest.mark.parametrize("form", ["huggingface", "nanochat"])
def test_a_full_disk_leaves_nothing_behind(
    store: Store, tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random(store, REF, depth=1)
    before = upstream_files(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left on device"):
        exported(store, tmp_path / "out", format=form)
    assert upstream_files(tmp_path) == before
    assert not (tmp_path / "out").exists()
