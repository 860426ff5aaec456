"""The optimizer of every training stage: Muon for the matrices inside the blocks, AdamW for all other parameters.

``groups`` assigns the parameters and their learning rates. ``shards`` explains how work and state are divided over
ranks, ``adamw``, ``muon`` and ``muon_shards`` have the two rules, and ``optimizer`` puts them together.
"""

from nanochat_core.training.optim.groups import OptimizerConfig, parameter_groups
from nanochat_core.training.optim.muon import muon_dtype
from nanochat_core.training.optim.optimizer import MuonAdamW
from nanochat_core.training.optim.shards import Shard

__all__ = ["MuonAdamW", "OptimizerConfig", "Shard", "muon_dtype", "parameter_groups"]
