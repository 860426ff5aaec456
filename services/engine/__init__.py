"""The service that serves a model over gRPC."""

from nanochat_core.openmp import limit_spinning

# This runs before any module imports torch, because the OpenMP libraries read their settings when they are loaded.
limit_spinning()
