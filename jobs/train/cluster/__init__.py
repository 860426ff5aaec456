"""Runs the stages of a pipeline as PyTorchJobs of a Kubernetes cluster.

``stage_jobs`` decides what to do next, ``manifest`` writes the objects, ``outcome`` tells how pods ended, and ``api``
calls the API server. ``pod`` is the program that starts the ranks of a stage inside of its pods.
"""
