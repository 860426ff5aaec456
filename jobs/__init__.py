"""Programs for data, training, lessons and evaluation. Unlike the programs in ``services``, they serve no users."""

from nanochat_core.openmp import limit_spinning

limit_spinning()
