"""Import a checkpoint of karpathy/nanochat: ``python -m jobs.train.import_nanochat --folder DIR --model NAME …``."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jobs.train.upstream.tokenizer import read_upstream_tokenizer
from nanochat_core import logs
from nanochat_core.checkpoint import CheckpointRef, check_model_name, list_checkpoints
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError, run_main
from nanochat_core.model import GPT
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint

log = logging.getLogger("jobs.train.import_nanochat")

# Upstream's names of our parameters: those of the whole network, then those inside a block.
_NETWORK = {
    "embedding.weight": "transformer.wte.weight",
    "head.weight": "lm_head.weight",
    "residual_scales": "resid_lambdas",
    "skip_scales": "x0_lambdas",
    "smear_gate.weight": "smear_gate.weight",
    "smear_scale": "smear_lambda",
    "backout_scale": "backout_lambda",
}
_BLOCK = {
    "attention.q.weight": "attn.c_q.weight",
    "attention.k.weight": "attn.c_k.weight",
    "attention.v.weight": "attn.c_v.weight",
    "attention.out.weight": "attn.c_proj.weight",
    "attention.value_gate.weight": "attn.ve_gate.weight",
    "mlp.up.weight": "mlp.c_fc.weight",
    "mlp.down.weight": "mlp.c_proj.weight",
}
# What torch.compile puts before the names of a compiled model.
_COMPILED_PREFIX = "_orig_mod."
# Upstream's names of the model's shape.
_SHAPE = {
    "depth": "n_layer",
    "dim": "n_embd",
    "n_head": "n_head",
    "n_kv_head": "n_kv_head",
    "context_length": "sequence_len",
    "vocab_size": "vocab_size",
}
# No number of a shape is larger; what is comes from a damaged file and would only allocate memory.
_LARGEST = 2**24


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    """Import a checkpoint of karpathy/nanochat into the store."""

    folder: str = setting(help="upstream's checkpoint folder, such as ~/.cache/nanochat/base_checkpoints/d20")
    tokenizer_folder: str = setting(help="upstream's tokenizer folder, such as ~/.cache/nanochat/tokenizer")
    model: str = setting(help="name of the model in the store")
    step: int | None = setting(None, "which checkpoint of the folder; the last one when not given", minimum=0)
    stage: Literal["base", "sft", "rl"] = setting("base", "which stage of training the checkpoint is from")
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")


@dataclasses.dataclass(frozen=True)
class UpstreamCheckpoint:
    """An upstream checkpoint as it lies on disk: its meta file, and tensors by upstream's names."""

    path: Path
    meta: dict[str, Any]
    weights: dict[str, Tensor]


def run(settings: ImportSettings) -> CheckpointRef:
    """Read, convert and save; the store is touched only once everything has been found right."""
    check_model_name(settings.model)
    folder = Path(settings.folder).expanduser()
    step = _step(folder, settings.step)
    source = read_upstream(folder, step)
    config = model_config(source)
    tokenizer = read_upstream_tokenizer(Path(settings.tokenizer_folder).expanduser() / "tokenizer.pkl")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer in {settings.tokenizer_folder} has {tokenizer.vocab_size} ids but the model in {folder} "
            f"{config.vocab_size}; they do not belong together"
        )
    model = convert(source, config)
    store = open_store(settings.home)
    ref = CheckpointRef(settings.model, settings.stage, step)
    if ref in list_checkpoints(store, settings.model, settings.stage):
        raise UserError(f"{ref.prefix} is already in {store}; choose another --model")
    save_checkpoint(store, ref, model=model, tokenizer=tokenizer, meta=_meta(source, model, tokenizer, step))
    log.info(
        "imported", extra={"checkpoint": ref.prefix, "source": str(source.path), **dataclasses.asdict(model.config)}
    )
    return ref


def read_upstream(folder: Path, step: int) -> UpstreamCheckpoint:
    """``model_<step>.pt`` and ``meta_<step>.json`` of upstream's checkpoint folder.

    The weights are mapped from the file, not read into memory, and by torch's loader for plain tensors alone.

    Raises:
        UserError: a file is missing or damaged, or holds something else than tensors.
    """
    path = folder / f"model_{step:06d}.pt"
    meta_path = folder / f"meta_{step:06d}.json"
    try:
        meta = json.loads(meta_path.read_bytes())
    except OSError as error:
        raise UserError(f"{meta_path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{meta_path} is no JSON file: {error}") from error
    if not isinstance(meta, dict):
        raise UserError(f"{meta_path} holds no JSON object")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # a damaged file makes torch raise nearly anything
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{path} holds no plain tensors, or is damaged: {reason}") from error
    return UpstreamCheckpoint(path, meta, _plain_tensors(path, stored))


def model_config(source: UpstreamCheckpoint) -> ModelConfig:
    """Our description of the model's shape.

    Raises:
        UserError: the meta file describes no model, or one of an upstream version with another network.
    """
    _check_version(source)
    given = source.meta.get("model_config")
    if not isinstance(given, dict):
        raise UserError(f"the meta file beside {source.path} has no model_config")
    missing = sorted({*_SHAPE.values(), "window_pattern"} - given.keys())
    unknown = sorted(given.keys() - {*_SHAPE.values(), "window_pattern"})
    if missing or unknown:
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise UserError(f"the model_config beside {source.path} {' and '.join(what)}")
    shape = {ours: given[theirs] for ours, theirs in _SHAPE.items()}
    for ours, value in shape.items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise UserError(f"the model_config beside {source.path} has {_SHAPE[ours]} {str(value)[:40]!r}")
    if not isinstance(given["window_pattern"], str):
        raise UserError(f"the model_config beside {source.path} has a window_pattern that is no text")
    return ModelConfig(
        **shape, head_dim=shape["dim"] // shape["n_head"], window_pattern=given["window_pattern"].upper()
    )


def convert(source: UpstreamCheckpoint, config: ModelConfig) -> GPT:
    """The network with upstream's weights: matrices in fp32, embedding tables in upstream's dtype.

    Its parameters are in memory; its rotary tables are not made (device ``meta``), so it can be saved but not run.

    Raises:
        UserError: the weights are not those of such a network.
    """
    if config.depth > len(source.weights):
        raise UserError(f"{source.path} has too few tensors for {config.depth} layers")
    table = source.weights.get(_NETWORK["embedding.weight"])
    in_bf16 = table is not None and table.dtype == torch.bfloat16
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16 if in_bf16 else torch.float32)
    parameters = model.state_dict()
    _check_fit(source, {upstream_name(name): parameter for name, parameter in parameters.items()})
    # Copied, since what is mapped from the file could change under us or be one tensor under two names.
    weights = {
        name: source.weights[upstream_name(name)].to(parameter.dtype, copy=True)
        for name, parameter in parameters.items()
    }
    model.load_state_dict(weights, assign=True)
    return model


def upstream_name(name: str) -> str:
    """Upstream's name of our parameter ``name``."""
    if name in _NETWORK:
        return _NETWORK[name]
    table = re.fullmatch(r"value_embeddings\.(\d+)\.weight", name)
    if table:
        return f"value_embeds.{table[1]}.weight"
    _, layer, inside = name.split(".", 2)
    return f"transformer.h.{layer}.{_BLOCK[inside]}"


def _step(folder: Path, wanted: int | None) -> int:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise UserError(f"the checkpoint folder {folder} cannot be read: {error.strerror or error}") from error
    steps = sorted(int(match[1]) for match in map(re.compile(r"model_(\d{6,9})\.pt").fullmatch, names) if match)
    if not steps:
        raise UserError(f"{folder} holds no model_<step>.pt; is it upstream's checkpoint folder?")
    if wanted is not None and wanted not in steps:
        raise UserError(f"{folder} has no step {wanted}; it has {', '.join(map(str, steps[-10:]))}")
    return steps[-1] if wanted is None else wanted


def _plain_tensors(path: Path, stored: Any) -> dict[str, Tensor]:
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise UserError(f"{path} holds no table of named tensors")
    for name, tensor in stored.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(f"{path}: {name[:100]} is no plain tensor of floating-point numbers")
    if sum(tensor.nbytes for tensor in stored.values()) > path.stat().st_size:
        raise UserError(f"{path} is damaged: its tensors are larger than the file")
    return {name.removeprefix(_COMPILED_PREFIX): tensor.detach() for name, tensor in stored.items()}


def _check_version(source: UpstreamCheckpoint) -> None:
    """Refuse weights of upstream versions whose network differs in more than its parameters.

    The smear came in one commit (a825e63, 14 March 2026) with another scale of queries and keys and other short
    windows; earlier versions had another rotary base, softcap and value gate too. No checkpoint records these, so
    filling in parameters that do nothing would give other logits than upstream's.
    """
    if _NETWORK["smear_scale"] not in source.weights:
        raise UserError(
            f"{source.path} has no smear_lambda: it is from before 14 March 2026, when upstream's network had other "
            "attention scales and windows, and cannot be reproduced; train it again with a later version"
        )


def _check_fit(source: UpstreamCheckpoint, expected: Mapping[str, Tensor]) -> None:
    missing, surplus = sorted(expected.keys() - source.weights.keys()), sorted(source.weights.keys() - expected.keys())
    for what, names in (("lacks", missing), ("has unknown", surplus)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{source.path} {what} {', '.join(name[:100] for name in names[:3])}{more}")
    for name, parameter in expected.items():
        if source.weights[name].shape != parameter.shape:
            shapes = f"{tuple(source.weights[name].shape)} instead of {tuple(parameter.shape)}"
            raise UserError(f"{source.path}: {name} has shape {shapes}; the meta file is of another model")


def _meta(source: UpstreamCheckpoint, model: GPT, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    return {
        "settings": {},
        "inputs": {"tokenizer": tokenizer.digest},
        "plan": {"steps": step, "batch_tokens": source.meta.get("total_batch_size")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scaling_parameters": model.config.scaling_parameters,
        "flops_per_token": model.config.flops_per_token,
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "finished": True,
        "step": step,
        "history": [],
        "upstream": source.meta,
    }


def main() -> None:
    settings = load(ImportSettings, prefix="NANOCHAT_IMPORT", program="python -m jobs.train.import_nanochat")
    logs.configure("import", settings.log_level)
    run(settings)


if __name__ == "__main__":
    run_main(main, "python -m jobs.train.import_nanochat")
