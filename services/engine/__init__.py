"""The service that serves a model over gRPC."""

from nanochat_core.openmp import limit_spinning

limit_spinning()
