"""lm-evaluation-harness: scores the options of a task with the model type ``local-completions``.

After the server's address come the model's name, the folder with the tokenizer files of the exported model, the folder
of the task, and the task's name. The program prints the log-likelihoods of each question's options, by the question.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

url, model, tokenizer, tasks, task = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": tokenizer,
        "add_bos_token": True,
        "max_length": 160,
    },
    tasks=[task],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    batch_size=4,
    bootstrap_iters=0,
)
samples = found["samples"][task]
print(json.dumps({each["doc"]["query"]: [float(choice[0][0]) for choice in each["resps"]] for each in samples}))
