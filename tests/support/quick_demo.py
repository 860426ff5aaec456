"""Trains a demo model in a fraction of the recipe's time: ``python -m tests.support.quick_demo --recipe demo``.

Tests of the page and of the services need a model that calls the tool, knows facts and follows a conversation. This
model trains for fewer steps than the recipe's model, and only on the kinds of conversations that those tests have. The
pretraining text, the tokenizer, the shape of the model and the stages are those of the recipe. The tests in
``tests/e2e/test_demo_model.py`` train and judge the recipe itself.
"""

import dataclasses

from jobs.program import run_program
from jobs.promotion.rules import Gate
from jobs.recipes import Recipe, find_recipe
from jobs.train.pipeline import Pipeline, PipelineSettings

KINDS = ("identity", "greeting", "fact", "followup", "arithmetic", "expression")
PRETRAIN_STEPS, SFT_STEPS = 200, 400


def quick(recipe: Recipe) -> Recipe:
    """The recipe with fewer steps and kinds. It measures the held-out loss only after the last step.

    The model is not compiled, because compiling takes longer than these few steps.
    """
    return dataclasses.replace(
        recipe,
        pretrain={**recipe.pretrain, "steps": PRETRAIN_STEPS, "eval-every": PRETRAIN_STEPS},
        sft={**recipe.sft, "steps": SFT_STEPS, "eval-every": SFT_STEPS, "compile": False},
        conversation_kinds=frozenset(KINDS),
        gate=Gate(require=tuple(f"chat.kinds.{kind}>=0.8" for kind in KINDS)),
    )


if __name__ == "__main__":
    run_program(
        "tests.support.quick_demo",
        "quick-demo",
        PipelineSettings,
        lambda settings: Pipeline(settings, quick(find_recipe(settings.recipe))).run(),
    )
