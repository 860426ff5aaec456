"""Checks the results of this device against fp32: the engine's log probabilities, and the gradients of training."""

from typing import Any

import torch
from torch import Tensor

from jobs.eval.bench.models import random_model, random_tokenizer
from jobs.eval.gpu_parts.context import Context, Result
from jobs.eval.gpu_parts.training import multiplies_fp8, trainable
from nanochat_core.config import ModelConfig
from nanochat_core.device import DTYPES
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.model import GPT

# A small model is enough, because a wrong kernel changes the results of a small model too.
MODEL = ModelConfig.from_depth(4, vocab_size=512, head_dim=64, context_length=512)
_PROMPT_LENGTHS, _OUTPUT_TOKENS = (5, 40, 300), 32
# Largest permitted difference, in fp32, between a log probability of the engine and of a plain forward pass. The engine
# adds numbers in another order, so the last bits differ.
_MOST_FP32 = 5e-3
# In bf16, the engine's error may be at most this many times the error of a plain forward pass. Both are mean squares of
# the differences from fp32.
_MOST_BF16_RATIO = 2.0
# Largest permitted relative error of a gradient, compared with the gradient in fp32.
_MOST_GRADIENT = {"bf16": 0.1, "fp8": 0.3}


class WrongNumbers(Exception):
    """A result differs from the result in fp32 by more than rounding explains."""


def check_numerics(context: Context) -> Result:
    """Measure the errors of this device's log probabilities and gradients. Raises WrongNumbers if one is too large."""
    result = {"log_probabilities": _engine_errors(context), "gradients": _gradient_errors(context)}
    engine = result["log_probabilities"]
    wrong = []
    if engine["fp32"]["largest"] > _MOST_FP32:
        wrong.append(f"log probabilities in fp32 differ by up to {engine['fp32']['largest']:.3g}")
    if engine["bf16"]["mean_square"] > _MOST_BF16_RATIO * engine["bf16"]["mean_square_plain"]:
        wrong.append("log probabilities in bf16 are farther from fp32 than those of a plain forward pass")
    for name, error in result["gradients"].items():
        if not error < _MOST_GRADIENT[name]:
            wrong.append(f"gradients in {name} have a relative error of {error:.3g}")
    if wrong:
        raise WrongNumbers("; ".join(wrong))
    return result


def _engine_errors(context: Context) -> dict[str, Any]:
    """Errors of the log probabilities of greedy tokens, with the engine's kernels and with a plain forward pass."""
    exact = random_model(MODEL, torch.float32, seed=0, device=context.device)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(256, (length,), generator=draw).tolist() for length in _PROMPT_LENGTHS]
    errors = {}
    for name in ("fp32", "bf16"):
        model = random_model(MODEL, DTYPES[name], seed=0, device=context.device)
        engine = Engine(model, random_tokenizer(MODEL.vocab_size), EngineConfig(kv_cache_bytes=1 << 27, max_running=8))
        completions = engine.generate(prompts, SamplingParams(max_tokens=_OUTPUT_TOKENS, logprobs=0))
        engine.close()
        of_engine, of_plain = [], []
        for prompt, [completion] in zip(prompts, completions, strict=True):
            row = torch.tensor([*prompt, *completion.token_ids], device=context.device)
            expected = _log_probabilities(exact, row, len(prompt))
            got = torch.tensor([token.logprob for token in completion.tokens], device=context.device)
            of_engine.append(got - expected)
            of_plain.append(_log_probabilities(model, row, len(prompt)) - expected)
        errors[name] = {
            "largest": float(torch.cat(of_engine).abs().max()),
            "mean_square": float(torch.cat(of_engine).square().mean()),
            "mean_square_plain": float(torch.cat(of_plain).square().mean()),
        }
    return errors


@torch.no_grad()
def _log_probabilities(model: GPT, row: Tensor, first: int) -> Tensor:
    """The log probability of each token of ``row`` from index ``first`` on, by a plain forward pass."""
    logits: Tensor = model(row[None])[0, first - 1 : -1]
    return logits.log_softmax(-1).gather(1, row[first:, None]).squeeze(1)


def _gradient_errors(context: Context) -> dict[str, float]:
    """Relative errors of the gradient of an MLP's matrix against fp32, in bf16 and, if the device has it, in fp8."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(MODEL.vocab_size, (4, 129), generator=draw).to(context.device)
    gradients: dict[str, Tensor] = {}
    for precision in ("fp32", "bf16", *(["fp8"] if multiplies_fp8(context.device) else [])):
        model = random_model(MODEL, DTYPES[precision], seed=0, device=context.device)
        loss = context.compiled(trainable(model, context.device, precision).loss)
        torch.autograd.backward(loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        gradient = model.blocks[0].get_parameter("mlp.up.weight").grad
        assert gradient is not None
        gradients[precision] = gradient.float()
        torch._dynamo.reset()
    exact = gradients.pop("fp32")
    return {name: float((got - exact).norm() / exact.norm()) for name, got in gradients.items()}
