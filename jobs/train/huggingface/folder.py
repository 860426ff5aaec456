"""A checkpoint as a folder that ``transformers`` loads with ``trust_remote_code=True``."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from jobs.train.huggingface.tokenizer import tokenizers_file
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.chunked_loss import LOGIT_SOFTCAP
from nanochat_core.config import ModelConfig
from nanochat_core.model import ROTARY_BASE
from nanochat_core.tokenizer import ASSISTANT_END, BOS, SPECIAL_TOKENS, Tokenizer

MODELING_FILE = Path(__file__).with_name("modeling_nanochat.py")
CHAT_TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")
# The type must not be ``nanochat``: the class of that name in transformers is karpathy/nanochat's network of 2025,
# which has no smear, value embeddings, windows, skip or backout.
MODEL_TYPE = "nanochat_gpt"

# Maps the names of our parameters to their names in the exported file. _NETWORK has the parameters outside the blocks,
# except the value embeddings (see exported_name); _BLOCK has the parameters of a block.
_NETWORK = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "residual_scales": "model.residual_scales",
    "skip_scales": "model.skip_scales",
    "smear_gate.weight": "model.smear_gate.weight",
    "smear_scale": "model.smear_scale",
    "backout_scale": "model.backout_scale",
}
_BLOCK = {
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.value_gate.weight": "self_attn.value_gate.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def write_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files of the exported model into an existing folder."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    safetensors.torch.save_file(_weights(checkpoint), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(config, tokenizer))
    _write_json(folder / "generation_config.json", _token_ids(tokenizer))
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizers_file(tokenizer), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(checkpoint))
    shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
    (folder / "README.md").write_text(_readme(checkpoint), encoding="utf-8")


def exported_name(name: str) -> str:
    """The name that our parameter ``name`` has in ``model.safetensors``."""
    if name in _NETWORK:
        return _NETWORK[name]
    if re.fullmatch(r"value_embeddings\.\d+\.weight", name):
        return f"model.{name}"
    _, layer, inside = name.split(".", 2)
    return f"model.layers.{layer}.{_BLOCK[inside]}"


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's weights in their own dtypes, without the padding rows of the embedding tables and the head."""
    rows = {"embedding.weight", "head.weight"} | {name for name in checkpoint.weights if "value_embeddings" in name}
    size = checkpoint.config.vocab_size
    return {
        exported_name(name): tensor[:size].contiguous() if name in rows else tensor
        for name, tensor in checkpoint.weights.items()
    }


def _config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    module = MODELING_FILE.stem
    return {
        "architectures": ["NanochatForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.NanochatConfig",
            "AutoModel": f"{module}.NanochatModel",
            "AutoModelForCausalLM": f"{module}.NanochatForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "attention_windows": list(config.windows),
        "value_embedding_layers": [layer for layer in range(config.depth) if config.has_value_embedding(layer)],
        "rope_theta": ROTARY_BASE,
        "final_logit_softcapping": LOGIT_SOFTCAP,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **_token_ids(tokenizer),
    }


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Special token ids for generation, which ends with the assistant's message or when another document begins."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.special_ids[ASSISTANT_END], tokenizer.bos_id],
        "pad_token_id": tokenizer.bos_id,
    }


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Content of ``tokenizer_config.json``. A base model has no token for the end of a document, so BOS is its EOS."""
    is_base = checkpoint.ref.stage == "base"
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": checkpoint.config.context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": BOS if is_base else ASSISTANT_END,
        "pad_token": BOS,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != BOS],
        "chat_template": CHAT_TEMPLATE_FILE.read_text(encoding="utf-8"),
    }


def _readme(checkpoint: Checkpoint) -> str:
    name = f"{checkpoint.ref.model} {checkpoint.ref.revision}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

Exported from nanochat. The model needs its own code, `{MODELING_FILE.name}`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
```

`tokenizer(text)` puts `{BOS}` in front of the text, as in training. The context is {checkpoint.config.context_length}
tokens long.
"""


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
