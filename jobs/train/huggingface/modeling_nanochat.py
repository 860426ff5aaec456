"""The nanochat GPT for Hugging Face's transformers: ``from_pretrained(folder, trust_remote_code=True)``.

An exported folder contains this file, which needs only torch and transformers. The network is a pre-norm decoder with
rotary attention, RMSNorm of queries and keys, squared ReLU and a softcapped head. Four parts differ from a plain GPT:

- Smear: a gated share of the previous token's embedding is added to each token's embedding.
- Value embeddings: in some layers, a second embedding of the token is added to the attention values, scaled by a gate.
- Skip: each layer's input is a weighted sum of the previous layer's output and the token's embedding.
- Backout: a share of the output of the middle layer is subtracted from the last layer's output.

Smear and value embeddings need token ids, so the model cannot start from ``inputs_embeds``. A token at position 0 has
no previous token. A forward pass that continues a cache also needs ``previous_ids``, the token before the first new
token; ``generate`` passes this argument.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

QK_SCALE = 1.2
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
VALUE_GATE_SCALE = 3.0
# Name of the field for the cache in a model's output: ``cache``, or ``past_key_values`` in older versions of
# transformers. As an argument, the cache may have either name.
CACHE = next(f.name for f in dataclasses.fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


class NanochatConfig(PretrainedConfig):
    """Shape of the model.

    ``attention_windows`` has for each layer the largest number of earlier tokens that a token attends to.
    ``value_embedding_layers`` lists the layers that have a value embedding.
    """

    model_type = "nanochat_gpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - transformers' interface

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        head_dim: int = 128,
        max_position_embeddings: int = 2048,
        attention_windows: list[int] | None = None,
        value_embedding_layers: list[int] | None = None,
        rope_theta: float = 100_000.0,
        final_logit_softcapping: float = 15.0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = 4 * hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.attention_windows = attention_windows or [max_position_embeddings] * num_hidden_layers
        self.value_embedding_layers = value_embedding_layers or []
        self.rope_theta = rope_theta
        self.final_logit_softcapping = final_logit_softcapping
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a learned weight."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[..., i], x[..., i + head_dim/2]) by its position's angle; ``x``: (..., heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class NanochatAttention(nn.Module):
    """Causal attention in which a token attends to itself and to the tokens before it that ``mask`` does not hide."""

    def __init__(self, config: NanochatConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        if layer in config.value_embedding_layers:
            self.value_gate = nn.Linear(VALUE_GATE_CHANNELS, config.num_key_value_heads, bias=False)

    def forward(
        self,
        x: Tensor,
        value_embedding: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        cache: Cache | None,
    ) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if value_embedding is not None:
            gate = VALUE_GATE_SCALE * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view(heads)
        q = rms_norm(rotate(q, cos, sin)) * QK_SCALE
        k = rms_norm(rotate(k, cos, sin)) * QK_SCALE
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return output


class NanochatMLP(nn.Module):
    """An MLP whose hidden layer is four times as wide as the residual stream, with squared ReLU."""

    def __init__(self, config: NanochatConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return output


class NanochatLayer(nn.Module):
    """Attention and MLP, each applied to the normalized residual stream."""

    def __init__(self, config: NanochatConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = NanochatAttention(config, layer)
        self.mlp = NanochatMLP(config)

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        x = x + self.self_attn(rms_norm(x), *attention_inputs)
        output: Tensor = x + self.mlp(rms_norm(x))
        return output


class NanochatPreTrainedModel(PreTrainedModel):
    """Attributes that tell transformers how to load and split the model."""

    config_class = NanochatConfig
    base_model_prefix = "model"
    _no_split_modules = ["NanochatLayer"]  # noqa: RUF012 - transformers' interface
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["smear_scale", "residual_scales", "skip_scales", "backout_scale"]  # noqa: RUF012
    _supports_sdpa = True


class NanochatModel(NanochatPreTrainedModel):
    """The network without its head: token ids become normalized hidden states."""

    def __init__(self, config: NanochatConfig) -> None:
        super().__init__(config)
        depth, kv_dim = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.value_embeddings = nn.ModuleDict(
            {str(layer): nn.Embedding(config.vocab_size, kv_dim) for layer in config.value_embedding_layers}
        )
        self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.layers = nn.ModuleList(NanochatLayer(config, layer) for layer in range(depth))
        self.residual_scales = nn.Parameter(torch.ones(depth))
        self.skip_scales = nn.Parameter(torch.zeros(depth))
        self.backout_scale = nn.Parameter(torch.zeros(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        previous_ids: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **_kwargs: Any,
    ) -> Any:
        """Hidden states of shape (batch, time, hidden_size).

        Args:
            input_ids: (batch, time) token ids that are not in the cache yet.
            attention_mask: (batch, cached + time); 0 hides a padding token, and all other tokens have 1.
            position_ids: (batch, time); by default the number of earlier tokens that the mask shows.
            past_key_values: another name of ``cache``.
            previous_ids: (batch,) the token before ``input_ids``; needed if the cache contains tokens.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model needs input_ids: its smear and value embeddings depend on token ids")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("this model takes an attention_mask of shape (batch, tokens)")
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        cached = 0 if cache is None else cache.get_seq_length()
        time = input_ids.size(1)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(cached, cached + time, device=input_ids.device).unsqueeze(0)
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]
        x = self._smeared(input_ids, position_ids, previous_ids, cached)
        cos, sin = self._rotary_table(position_ids, x.dtype)
        x0, middle = x, x
        tables = dict(self.value_embeddings.items())
        masks: dict[int, Tensor | None] = {}
        for number, layer in enumerate(self.layers):
            window = self.config.attention_windows[number]
            if window not in masks:
                masks[window] = _mask(cached, time, window, attention_mask, x.device)
            x = self.residual_scales[number] * x + self.skip_scales[number] * x0
            value_embedding = tables[str(number)](input_ids) if str(number) in tables else None
            is_causal = masks[window] is None and time > 1
            x = layer(x, value_embedding, cos, sin, masks[window], is_causal, cache)
            if number == self.config.num_hidden_layers // 2:
                middle = x
        x = rms_norm(x - self.backout_scale[0] * middle)
        output = BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _smeared(self, ids: Tensor, positions: Tensor, previous_ids: Tensor | None, cached: int) -> Tensor:
        """Normalized embeddings, each with a gated share of the previous token's embedding."""
        x = rms_norm(self.embed_tokens(ids))
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        if cached:
            if previous_ids is None:
                raise ValueError("the cache holds tokens: pass previous_ids, the token before input_ids in each row")
            before = torch.cat((rms_norm(self.embed_tokens(previous_ids.view(-1, 1))), before[:, 1:]), dim=1)
        before = before * (positions > 0).unsqueeze(-1)
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + (self.smear_scale * gate).to(x.dtype) * before

    def _rotary_table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of shape (batch, time, 1, head_dim / 2)."""
        channels = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions.float().unsqueeze(-1) * self.config.rope_theta ** (-channels / self.config.head_dim)
        return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    """The model with its head, which returns softcapped fp32 logits."""

    def __init__(self, config: NanochatConfig) -> None:
        super().__init__(config)
        self.model = NanochatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of shape (batch, kept tokens, vocab_size), and the mean loss in nats if there are labels.

        Args:
            labels: (batch, time) the input ids again, with -100 for tokens that are not counted.
            logits_to_keep: number of last positions for which logits are computed, or a tensor of positions; 0 means
                all positions.
            attention_mask, kwargs: further arguments of :meth:`NanochatModel.forward`.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(self.lm_head(outputs.last_hidden_state[:, kept]).float() / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)})
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int | Tensor = 1,
        **_kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass; ``input_ids`` holds all tokens so far."""
        cache = past_key_values if cache is None else cache
        cached = 0 if cache is None else cache.get_seq_length()
        return {
            "input_ids": input_ids[:, cached:],
            "previous_ids": input_ids[:, cached - 1] if cached else None,
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }


def _mask(cached: int, time: int, window: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """Boolean mask, True where a query sees a key: (time, cached + time), or (batch, 1, time, cached + time).

    Returns None if causal attention needs no mask. Three conditions must hold: there is no padding, the window covers
    all tokens, and either nothing is cached or only one token is new.
    """
    if padding is None and window >= cached + time - 1 and (time == 1 or not cached):
        return None
    rows = torch.arange(cached, cached + time, device=device).unsqueeze(1)
    distance = rows - torch.arange(cached + time, device=device)
    visible = (distance >= 0) & (distance <= window)
    if padding is None:
        return visible
    # A padding token sees itself, because a softmax over nothing is NaN.
    return (visible & padding.bool()[:, None, None, : cached + time]) | (distance == 0)
