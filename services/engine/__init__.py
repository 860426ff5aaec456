"""The service that serves a model over gRPC."""

from nanochat_core.openmp import limit_spinning

# Threads that wait for each other may spin (check for new work in a loop) only for a short time. This limit is set
# before any module imports torch, because torch loads an OpenMP library, which reads its settings when it is loaded.
limit_spinning()
