"""Tasks for a chat model, one file per dataset, and ``letters`` for the two tasks whose questions are generated.

The module of a dataset has everything about the dataset: the files it is read from, the questions of its evaluation and
how answers are scored, the conversations to fine-tune on, the problems for reinforcement learning, and the reward. The
modules ``task`` and ``conversations`` define these terms, and ``registry`` finds tasks by name.
"""
