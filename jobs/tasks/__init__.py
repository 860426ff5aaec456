"""Tasks for a chat model, one file per dataset, and ``letters`` for the two tasks whose questions are generated.

A dataset's file has everything about it: the files it is read from, the evaluation's questions and how their answers
are scored, the conversations to fine-tune on, the problems to practice on with reinforcement learning, and the
reward. The modules ``task`` and ``conversations`` define these terms, and ``registry`` finds tasks by name.
"""
