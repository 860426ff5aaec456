"""Programs that run once."""

from nanochat_core.openmp import limit_spinning

limit_spinning()
