"""Runs programs as PyTorchJobs of a Kubernetes cluster, such as the stages of a pipeline.

``stage_jobs`` decides what a pipeline does next, ``manifest`` writes the objects, ``job`` and ``outcome`` tell what
PyTorchJobs do and how their pods ended, and ``api`` calls the API server. ``pod`` is the program that starts the ranks
of a stage inside of its pods.
"""
