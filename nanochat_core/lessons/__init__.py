"""Lessons in the store: what a person wants to teach a model, and how far the teaching has come.

:mod:`items` reads and checks what the person wrote. :mod:`records` is the queue of lessons, and :mod:`lists` reads it
in pages. :mod:`shapes` checks stored values. The gateway and the program ``jobs.teach`` write lessons into the queue,
and ``jobs.teach`` trains the model on them. This package does not import torch.
"""
