"""The service that serves a model over gRPC."""

from nanochat_core.openmp import limit_spinning

# limit_spinning() limits the time for which waiting threads spin (check for new work in a loop). It is called before
# any module imports torch, because torch loads an OpenMP library, which reads its settings when it is loaded.
limit_spinning()
