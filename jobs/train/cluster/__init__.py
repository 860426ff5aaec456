"""Runs programs as PyTorchJobs of a Kubernetes cluster, such as the stages of a pipeline.

``stage_jobs`` decides what a pipeline does next, and ``manifest`` writes the objects of the cluster. ``job`` reads the
status of a PyTorchJob, ``outcome`` reads how pods ended, and ``api`` calls the API server. ``pod`` is the program that
starts the ranks of a stage inside its pods.
"""
