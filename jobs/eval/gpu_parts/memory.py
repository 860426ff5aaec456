"""Plans the memory of training and serving with fake tensors, which have shapes but take no memory."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jobs.eval.gpu_parts.context import FULL, Context, Result
from nanochat_core.config import ModelConfig
from nanochat_core.engine.cache_groups import bytes_per_block
from nanochat_core.model import GPT
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, parameter_groups

# Depths of the models whose memory is planned. The largest is the depth of karpathy/nanochat's "GPT-2 speedrun".
DEPTHS = (12, 20, 26)


def plan_memory(_context: Context) -> Result:
    """Bytes of memory that a model of each depth needs in bf16 for training and for serving.

    A micro-batch of the training has ``FULL.train_rows`` rows, as in the measurements on a GPU.
    """
    return {"plans": [plan(FULL.model(depth), FULL.train_rows) for depth in DEPTHS]}


def plan(config: ModelConfig, rows: int) -> Result:
    """The memory that a model in bf16 needs, in bytes.

    ``saved_bytes`` is the memory that the forward pass of a micro-batch of ``rows`` rows keeps for the backward pass if
    the model is not compiled. A compiled model keeps less, because its backward pass repeats cheap operations.
    """
    with FakeTensorMode():
        model = GPT(config, torch.bfloat16)
        weights = list(model.parameters())
        optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()))
        state = sum(shard.tensor.nbytes for shard in optimizer.shards())
        own = {weight.untyped_storage()._cdata for weight in weights}
        saved: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            if x.untyped_storage()._cdata not in own:
                saved[x.untyped_storage()._cdata] = x
            return x

        ids = torch.zeros((rows, config.context_length), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.loss(ids, ids, "sum")
        return {
            "depth": config.depth,
            "weight_bytes": sum(weight.nbytes for weight in weights),
            "gradient_bytes": sum(weight.nbytes for weight in weights),
            "optimizer_bytes": state,
            "rows": rows,
            "saved_bytes": sum(x.untyped_storage().nbytes() for x in saved.values()),
            "serving_weight_bytes": 2 * sum(weight.numel() for weight in weights),
            "cache_bytes_per_token": bytes_per_block(config, config.depth, 1, torch.bfloat16),
        }
