"""The optimizer of every training stage: Muon for the matrices inside the blocks, AdamW for all other parameters.

``groups`` assigns a rule and a learning rate to each parameter. ``shards`` explains how work and state are divided over
the ranks. ``adamw`` and ``muon`` contain the two rules, and ``optimizer`` combines them.
"""

from nanochat_core.training.optim.groups import OptimizerConfig, parameter_groups
from nanochat_core.training.optim.muon import muon_dtype
from nanochat_core.training.optim.optimizer import MuonAdamW
from nanochat_core.training.optim.shards import Shard
