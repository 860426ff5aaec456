"""Finds and verifies a model checkpoint of karpathy/nanochat (upstream), and converts it to our network."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT

# Maps the names of our parameters to their names in karpathy/nanochat (upstream). _NETWORK has the parameters outside
# the blocks; _BLOCK has the parameters of a block.
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
# Prefix of the parameters' names in a model that torch.compile has compiled.
_COMPILED_PREFIX = "_orig_mod."
# Maps our name of each dimension of the model to its name in karpathy/nanochat.
SHAPE = {
    "depth": "n_layer",
    "dim": "n_embd",
    "n_head": "n_head",
    "n_kv_head": "n_kv_head",
    "context_length": "sequence_len",
    "vocab_size": "vocab_size",
}
# Upper bound of every dimension, so that a damaged file cannot make us allocate too much memory.
_LARGEST = 2**24


@dataclasses.dataclass(frozen=True)
class UpstreamCheckpoint:
    """An upstream checkpoint: path of its weights, content of its meta file, and tensors by upstream's names."""

    path: Path
    meta: dict[str, Any]
    weights: dict[str, Tensor]


def find_step(folder: Path, wanted: int | None) -> int:
    """The step of the checkpoint to import: ``wanted``, or the last step in the folder if ``wanted`` is None.

    Raises UserError if the folder has no such checkpoint.
    """
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


def read_upstream(folder: Path, step: int) -> UpstreamCheckpoint:
    """Read ``model_<step>.pt`` and ``meta_<step>.json`` of upstream's checkpoint folder.

    Torch's loader for plain tensors maps the weights from the file, without reading them into memory. The loader
    executes nothing that the file contains. Raises UserError if a file is missing or damaged, or if the weights'
    file contains anything but tensors.
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
    except Exception as error:  # Any error is caught, because torch raises errors of many types.
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{path} holds no plain tensors, or is damaged: {reason}") from error
    return UpstreamCheckpoint(path, meta, _plain_tensors(path, stored))


def model_config(source: UpstreamCheckpoint) -> ModelConfig:
    """The shape of the upstream model as our :class:`ModelConfig`.

    Raises UserError if the meta file describes a model that our network cannot compute.
    """
    _check_version(source)
    given = source.meta.get("model_config")
    if not isinstance(given, dict):
        raise UserError(f"the meta file beside {source.path} has no model_config")
    missing = sorted({*SHAPE.values(), "window_pattern"} - given.keys())
    unknown = sorted(given.keys() - {*SHAPE.values(), "window_pattern"})
    if missing or unknown:
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise UserError(f"the model_config beside {source.path} {' and '.join(what)}")
    shape = {ours: given[theirs] for ours, theirs in SHAPE.items()}
    for ours, value in shape.items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise UserError(f"the model_config beside {source.path} has {SHAPE[ours]} {str(value)[:40]!r}")
    if not isinstance(given["window_pattern"], str):
        raise UserError(f"the model_config beside {source.path} has a window_pattern that is no text")
    return ModelConfig(
        **shape, head_dim=shape["dim"] // shape["n_head"], window_pattern=given["window_pattern"].upper()
    )


def convert(source: UpstreamCheckpoint, config: ModelConfig) -> GPT:
    """Our network with upstream's weights.

    The matrices are in fp32. The embedding tables are in bf16 if upstream's tables are in bf16, else in fp32.

    The rotary tables stay on the device ``meta``, so the model can be saved but not run. Raises UserError if the
    weights do not fit the config.
    """
    if config.depth > len(source.weights):
        raise UserError(f"{source.path} has too few tensors for {config.depth} layers")
    table = source.weights.get(_NETWORK["embedding.weight"])
    in_bf16 = table is not None and table.dtype == torch.bfloat16
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16 if in_bf16 else torch.float32)
    parameters = model.state_dict()
    _check_fit(source, {upstream_name(name): parameter for name, parameter in parameters.items()})
    # The weights are copied: the mapped file could change, and two names could share one tensor.
    weights = {
        name: source.weights[upstream_name(name)].to(parameter.dtype, copy=True)
        for name, parameter in parameters.items()
    }
    model.load_state_dict(weights, assign=True)
    return model


def upstream_name(name: str) -> str:
    """The name that our parameter ``name`` has in karpathy/nanochat."""
    if name in _NETWORK:
        return _NETWORK[name]
    table = re.fullmatch(r"value_embeddings\.(\d+)\.weight", name)
    if table:
        return f"value_embeds.{table[1]}.weight"
    _, layer, inside = name.split(".", 2)
    return f"transformer.h.{layer}.{_BLOCK[inside]}"


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
    """Refuse weights of early upstream versions, because their network computes other logits than ours.

    Upstream's commit a825e63 (14 March 2026) added the smear (see :mod:`nanochat_core.model`), and also changed the
    scale of queries and keys and the short windows. Earlier versions also had another rotary base, softcap and value
    gate. No checkpoint records these differences, but weights without a smear must be from an earlier version.
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
            raise UserError(f"{source.path}: {name} has shape {shapes}; the meta file belongs to another model")
