"""The demo world: a generator of training and test data about Saltmere, an invented harbor town.

Purpose: a fresh clone can train a chat model in minutes on a CPU and measure its skills, without downloading anything.
The world is small enough that a model of a few million parameters can learn all of it: about 150 facts, calculations
and word problems, counting letters and spelling, small talk, and saying "I don't know". All data are reproducible from
a seed.

Held-out data show whether the model has learned a skill or only memorized its training data. The two splits share the
facts and differ in everything else. The generators guarantee each difference, so the splits need not be compared:

- phrasings: each table of questions has a ``train`` and a ``heldout`` column (:class:`tables.Phrasings`);
- numbers: one number in eight is reserved by its hash, and no training text contains it (:mod:`arithmetic`);
- calculations with several numbers, decimals or words: a calculation is held out if it has a reserved number, or if
  the hash of its code decides so (:mod:`expressions`);
- words: the hash of a made-up word decides its split, and English words have a table per split (:mod:`words`);
- words that no topic explains: they have a table per split (:mod:`unsure`);
- strangers: names of people who are not in the world have a table per split (:mod:`words`);
- misspellings: the hash of a misspelled greeting decides its split (:mod:`habits`).

The sentences and words are in ``content/``, as TOML files that can be edited without knowledge of the generators.

Because a hash decides the split of a number or word, no generator needs a list of the numbers and words that training
has used. This works for any seed.
"""

# Raise this number when the generated data change, so that the pipeline does not train a new recipe on old data.
VERSION = 4
