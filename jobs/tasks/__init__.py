"""Tasks that a chat model is trained and evaluated on.

The module of a dataset has everything about the dataset: the files it is read from, the questions of its evaluation and
how answers are scored, the conversations to fine-tune on, the problems for reinforcement learning, and the reward. The
modules ``task`` and ``conversations`` define these terms, and ``registry`` finds tasks by name. The questions of
``letters``, ``arithmetic`` and ``demo`` are generated, and ``own_questions`` reads the user's questions.
"""
