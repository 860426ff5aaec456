"""The demo world: a generator of training and test data about Saltmere, an invented harbor town.

Purpose: a fresh clone can train a chat model in minutes on a CPU and measure its skills, without downloading anything.
The world is small enough that a model of a few million parameters can learn all of it: about 150 facts, calculations
and word problems, counting letters and spelling, small talk, and saying "I don't know". All data are reproducible from
a seed.

There is a split for training (``train``) and a held-out split (``heldout``). Held-out data show whether the model has
learned a skill or only memorized its training data. Both splits have the same facts and answers, but no user
message occurs in both. The generators guarantee this for any seed, so the splits need not be compared:

- phrasings: a table of questions has a ``train`` and a ``heldout`` list (:class:`tables.Phrasings`). A held-out
  question may have a training phrasing only if it asks about new numbers or words;
- numbers: the hash of a number decides whether it is reserved. One number in eight is, and no training text contains
  it (:mod:`arithmetic`);
- calculations with several numbers, decimals or words: a calculation is held out if it has a reserved number, or if
  the hash of its code decides so (:mod:`expressions`);
- words: the hash of a made-up word decides its split, and English words have a list per split (:mod:`words`);
- words that the model cannot place in any topic: they have a list per split (:mod:`unsure`);
- strangers: first names of people who are not in the world have a list per split (:mod:`words`);
- misspellings: the hash of a misspelled message decides its split (:mod:`habits`).

Because a hash decides the split of a number or word, no generator needs a list of the numbers and words that training
has used.

The sentences and words are in ``content/``, as TOML files that can be edited without knowledge of the generators.
"""

# Raise this number when the generated data change. A store keeps the number of its data, so the pipeline notices data
# of an older version and does not train on them.
VERSION = 5
