"""Imports of upstream's checkpoints, compared with upstream's network written here in float64 with plain loops."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.train.import_nanochat import ImportSettings, import_checkpoint
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.errors import UserError
from nanochat_core.store import open_store
from tests.support.upstream_folders import STEP, VOCAB, Weights, model_config, random_weights, save


def imported(folder: Path, home: Path, **changes: Any) -> CheckpointRef:
    given = {"folder": str(folder), "tokenizer_folder": str(folder / "tokenizer"), "model": "theirs", "home": str(home)}
    return import_checkpoint(ImportSettings(**(given | changes)))


def logits_after(folder: Path, home: Path, ids: list[int]) -> np.ndarray:
    """The logits of the imported model in fp32."""
    checkpoint = load_checkpoint(open_store(str(home)), imported(folder, home))
    with torch.inference_mode():
        return checkpoint.build_model()(torch.tensor([ids]))[0].double().numpy()


# The following functions compute upstream's network.


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def turned(x: np.ndarray, position: int) -> np.ndarray:
    """Rotate channel pairs (i, i + half) as complex numbers, by the angle -position * 100000^(-2i / head_dim)."""
    half = len(x) // 2
    angle = position * 100_000.0 ** (-2 * np.arange(half) / len(x))
    z = (x[:half] + 1j * x[half:]) * np.exp(-1j * angle)
    return np.concatenate([z.real, z.imag])


def reference_logits(config: dict[str, Any], stored: Weights, ids: list[int]) -> np.ndarray:
    w = {name: tensor.double().numpy() for name, tensor in stored.items()}
    layers, n_head, n_kv_head = config["n_layer"], config["n_head"], config["n_kv_head"]
    head_dim, context = config["n_embd"] // n_head, config["sequence_len"]
    x = norm(w["transformer.wte.weight"][ids])
    smeared = x.copy()
    for t in range(1, len(ids)):
        gate = sigmoid(w["smear_gate.weight"][0] @ x[t, :24])
        smeared[t] += w["smear_lambda"][0] * gate * x[t - 1]
    x = x0 = smeared
    for layer in range(layers):
        x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
        prefix = f"transformer.h.{layer}."
        h = norm(x)
        q, k, v = (
            (h @ w[f"{prefix}attn.c_{name}.weight"].T).reshape(len(ids), -1, head_dim) for name in ("q", "k", "v")
        )
        if f"value_embeds.{layer}.weight" in w:
            gate = 3 * sigmoid(h[:, :12] @ w[f"{prefix}attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{layer}.weight"][ids].reshape(v.shape)
        q, k = (
            np.array([[1.2 * norm(turned(head, t)) for head in heads] for t, heads in enumerate(y)]) for y in (q, k)
        )
        letter = config["window_pattern"][layer % len(config["window_pattern"])]
        short = math.ceil(context / 512) * 128
        window = short if letter == "S" and layer < layers - 1 else context
        mixed = np.zeros((len(ids), n_head, head_dim))
        for t in range(len(ids)):
            seen = range(max(0, t - window), t + 1)
            for head in range(n_head):
                shared = head // (n_head // n_kv_head)
                scores = np.array([q[t, head] @ k[s, shared] for s in seen]) / head_dim**0.5
                chances = np.exp(scores - scores.max())
                mixed[t, head] = (chances / chances.sum()) @ v[list(seen), shared]
        x = x + mixed.reshape(len(ids), -1) @ w[f"{prefix}attn.c_proj.weight"].T
        hidden = np.maximum(norm(x) @ w[f"{prefix}mlp.c_fc.weight"].T, 0) ** 2
        x = x + hidden @ w[f"{prefix}mlp.c_proj.weight"].T
        if layer == layers // 2:
            middle = x
    x = norm(x - w["backout_lambda"][0] * middle)
    return 15 * np.tanh(x @ w["lm_head.weight"][: config["vocab_size"]].T / 15)


@pytest.mark.parametrize(
    ("changes", "time"),
    [
        ({}, 145),
        ({"window_pattern": "L"}, 131),
        ({"window_pattern": "sl"}, 139),
        ({"n_kv_head": 1, "n_layer": 3}, 137),
        ({"n_embd": 256, "n_layer": 2}, 33),
        ({"n_layer": 1}, 7),
    ],
    ids=["windows", "full", "lower case", "grouped", "head_dim 128", "one layer"],
)
def test_an_imported_model_has_upstreams_logits(tmp_path: Path, changes: Any, time: int) -> None:
    config = model_config(**changes)
    weights = random_weights(config)
    ids = torch.randint(VOCAB, (time,), generator=torch.Generator().manual_seed(time)).tolist()
    save(tmp_path / "theirs", config, weights)
    ours = logits_after(tmp_path / "theirs", tmp_path / "home", ids)
    theirs = reference_logits(config | {"window_pattern": config["window_pattern"].upper()}, weights, ids)
    assert theirs.std() > 1
    assert np.abs(ours - theirs).max() < 2e-4


def test_every_parameter_reaches_the_logits(tmp_path: Path) -> None:
    """If a parameter had no effect, a comparison of logits could not detect that two parameters are exchanged."""
    config, ids = model_config(n_layer=2), list(range(30))
    weights = random_weights(config)
    before = reference_logits(config, weights, ids)
    for name in weights:
        changed = weights | {name: weights[name] * 1.5 + 0.01}
        assert np.abs(reference_logits(config, changed, ids) - before).max() > 1e-3, name


def test_names_of_a_compiled_model_are_the_same_model(tmp_path: Path) -> None:
    config, ids = model_config(n_layer=2), list(range(20))
    weights = random_weights(config)
    save(tmp_path / "plain", config, weights)
    save(tmp_path / "compiled", config, {f"_orig_mod.{name}": tensor for name, tensor in weights.items()})
    plain = logits_after(tmp_path / "plain", tmp_path / "a", ids)
    assert np.array_equal(plain, logits_after(tmp_path / "compiled", tmp_path / "b", ids))


def test_bf16_tables_stay_as_they_are_and_other_weights_become_fp32(tmp_path: Path) -> None:
    config, ids = model_config(n_layer=2), list(range(30))
    weights = random_weights(config)
    tables = [name for name in weights if "wte" in name or "value_embeds" in name]
    weights |= {name: weights[name].bfloat16() for name in tables}
    weights["lm_head.weight"] = weights["lm_head.weight"].bfloat16()
    save(tmp_path / "theirs", config, weights)
    ours = logits_after(tmp_path / "theirs", tmp_path / "home", ids)
    assert np.abs(ours - reference_logits(config, weights, ids)).max() < 2e-4
    checkpoint = load_checkpoint(open_store(str(tmp_path / "home")), CheckpointRef("theirs", "base", STEP))
    stored = {name for name, tensor in checkpoint.weights.items() if tensor.dtype == torch.bfloat16}
    assert stored == {"embedding.weight", "value_embeddings.1.weight"}
    assert checkpoint.meta["dtype"] == "bfloat16"


def test_a_checkpoint_has_the_tokenizer_and_says_where_it_came_from(tmp_path: Path) -> None:
    save(tmp_path / "theirs", model_config(n_layer=1), random_weights(model_config(n_layer=1)))
    ref = imported(tmp_path / "theirs", tmp_path / "home", stage="sft")
    assert ref == CheckpointRef("theirs", "sft", STEP)
    checkpoint = load_checkpoint(open_store(str(tmp_path / "home")), ref)
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("a text")) == "a text"
    assert checkpoint.meta["upstream"]["user_config"] == {"depth": 4}
    assert checkpoint.meta["plan"] == {"steps": STEP, "batch_tokens": 8192}


def test_the_last_step_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    config = model_config(n_layer=1)
    for step in (200, 1000, 30):
        save(tmp_path / "theirs", config, random_weights(config, step), step)
    assert imported(tmp_path / "theirs", tmp_path / "home").step == 1000
    assert imported(tmp_path / "theirs", tmp_path / "home", step=30).step == 30
    with pytest.raises(UserError, match="has no step 31; it has 30, 200, 1000"):
        imported(tmp_path / "theirs", tmp_path / "home", step=31)
    with pytest.raises(UserError, match="models/theirs/base/step_000030 is already in"):
        imported(tmp_path / "theirs", tmp_path / "home", step=30)


class Reduce:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/nanochat-import-was-executed"),))


def without(name: str) -> Weights:
    weights = random_weights(model_config())
    del weights[name]
    return weights


def with_(name: str, value: Any) -> Weights:
    return random_weights(model_config()) | {name: value}


BAD = {
    "an early version": (without("smear_lambda"), {}, "has no smear_lambda: it is from before 14 March 2026"),
    "a missing tensor": (without("x0_lambdas"), {}, "lacks x0_lambdas"),
    "an unknown tensor": (with_("lora.weight", torch.ones(1)), {}, "has unknown lora.weight"),
    "another shape": (with_("resid_lambdas", torch.ones(5)), {}, r"resid_lambdas has shape \(5,\) instead of \(4,\)"),
    "integers": (with_("resid_lambdas", torch.ones(4, dtype=torch.int8)), {}, "is no plain tensor"),
    "no tensor": (with_("resid_lambdas", [1.0]), {}, "is no plain tensor"),
    "a tensor larger than the file": (
        with_("lm_head.weight", torch.ones(1, 1).expand(2**20, 2**20)),
        {},
        "its tensors are larger than the file",
    ),
    "an object": (with_("resid_lambdas", Reduce()), {}, "holds no plain tensors, or is damaged"),
    "a list": ([torch.ones(1)], {}, "holds no table of named tensors"),
    "another depth": (random_weights(model_config()), {"n_layer": 6}, "lacks transformer.h.4"),
    "absurd depth": (random_weights(model_config()), {"n_layer": 10**6}, "too few tensors for 1000000 layers"),
    "absurd context": (random_weights(model_config()), {"sequence_len": 10**12}, "has sequence_len '1000000000000'"),
    "another vocabulary": (random_weights(model_config()), {"vocab_size": 310}, "do not belong together"),
    "no number": (random_weights(model_config()), {"n_embd": "64"}, "has n_embd '64'"),
    "a truth value": (random_weights(model_config()), {"n_head": True}, "has n_head 'True'"),
    "heads that do not divide": (random_weights(model_config()), {"n_head": 3}, "3 heads of 21 do not make dim 64"),
    "unknown windows": (random_weights(model_config()), {"window_pattern": "SX"}, "may hold only S and L"),
    "windows of another type": (random_weights(model_config()), {"window_pattern": 5}, "a window_pattern that is no"),
    "an unknown field": (random_weights(model_config()), {"n_expert": 8}, "has unknown n_expert"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_reproduced_is_refused_and_nothing_is_written(tmp_path: Path, name: Any) -> None:
    weights, changes, complaint = BAD[name]
    save(tmp_path / "theirs", model_config(**changes), weights)
    with pytest.raises(UserError, match=complaint) as refused:
        imported(tmp_path / "theirs", tmp_path / "home")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "home").exists()
    assert not Path("/tmp/nanochat-import-was-executed").exists()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "meta_001200.json").unlink(), "meta_001200.json cannot be read: No such file"),
        (lambda folder: (folder / "meta_001200.json").write_text("{"), "is no JSON file"),
        (lambda folder: (folder / "meta_001200.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "meta_001200.json").write_text("{}"), "has no model_config"),
        (lambda folder: (folder / "model_001200.pt").write_bytes(b"PK"), "holds no plain tensors, or is damaged"),
        (lambda folder: (folder / "model_001200.pt").unlink(), "holds no model_<step>.pt"),
        (lambda folder: (folder / "tokenizer/tokenizer.pkl").unlink(), "tokenizer.pkl cannot be read: No such file"),
        (lambda folder: (folder / "tokenizer/tokenizer.pkl").write_bytes(b"."), "damaged|refused"),
    ],
)
def test_a_damaged_folder_is_refused_and_nothing_is_written(tmp_path: Path, damage: Any, complaint: str) -> None:
    config = model_config(n_layer=1)
    save(tmp_path / "theirs", config, random_weights(config))
    damage(tmp_path / "theirs")
    with pytest.raises(UserError, match=complaint):
        imported(tmp_path / "theirs", tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the checkpoint folder .* cannot be read"):
        imported(tmp_path / "missing", tmp_path / "home")


def test_a_truncated_weights_file_is_refused_at_any_length(tmp_path: Path) -> None:
    config = model_config(n_layer=1)
    save(tmp_path / "theirs", config, random_weights(config))
    path = tmp_path / "theirs" / f"model_{STEP:06d}.pt"
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="holds no plain tensors, or is damaged"):
            imported(tmp_path / "theirs", tmp_path / "home")
