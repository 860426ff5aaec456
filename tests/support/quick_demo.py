"""Trains a demo model in fewer steps than the recipe: ``python -m tests.support.quick_demo --recipe demo``.

Tests of the page and of the services need a model that calls the tool and knows facts, but not all abilities of the
recipe's model. Data, tokenizer, shape of the model, stages and gate are those of the recipe. The tests in
``tests/e2e/test_demo_model.py`` train and judge the recipe itself.
"""

import dataclasses

from jobs.program import run_program
from jobs.recipes import Recipe, find_recipe
from jobs.train.pipeline import Pipeline, PipelineSettings

PRETRAIN_STEPS, SFT_STEPS = 200, 600


def quick(recipe: Recipe) -> Recipe:
    """The recipe with fewer steps. It measures the held-out loss only after the last one."""
    return dataclasses.replace(
        recipe,
        pretrain={**recipe.pretrain, "steps": PRETRAIN_STEPS, "eval-every": PRETRAIN_STEPS},
        sft={**recipe.sft, "steps": SFT_STEPS, "eval-every": SFT_STEPS},
    )


if __name__ == "__main__":
    run_program(
        "tests.support.quick_demo",
        "quick-demo",
        PipelineSettings,
        lambda settings: Pipeline(settings, quick(find_recipe(settings.recipe))).run(),
    )
