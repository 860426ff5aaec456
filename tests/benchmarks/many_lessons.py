"""Give one model many lessons, one after another, and test at the end whether it still knows the first lesson.

Run the program from the project's root after ``make run`` has trained the demo model:
``python -m tests.benchmarks.many_lessons --home .nanochat --lessons 20``. Each lesson states three to five invented
facts about one person or one town. The seed chooses the facts. The program copies the store and works on the copy.

``--personal`` begins with two lessons of the kind that a person writes: ten facts, and a new name of the assistant with
its maker. ``--imported`` first writes the model as a checkpoint of karpathy/nanochat, and imports it into an empty
store. ``--others demo`` asks held-out questions of a recipe before the first lesson and after the last one. Neither the
training nor the examination of a lesson knows these questions.

The exit code is 0 if all these claims hold, otherwise 1:

- The gate promotes every lesson.
- At the end, the model answers at least 90 % of the first lesson's questions, as written and in held-out wordings.
- ``nanochat teach --list`` lists all lessons, and the metadata of the promoted model names all promoted lessons.
- A roll-back to the lesson in the middle promotes exactly the weights after that lesson, and a roll-back to the last
  lesson promotes the weights after the last one again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.recipes import find_recipe
from jobs.tasks import demo
from jobs.teach.memory import all_wordings, lineage
from nanochat_core.checkpoint import load_checkpoint, load_meta, weights_digest
from nanochat_core.lessons.items import Item
from nanochat_core.lessons.records import Lesson
from tests.support.pupil import Pupil, broken_rules, shares

LEAST_HELD = 0.9
# Most held-out wordings of a question that are asked at the end.
WORDINGS = 3
FEWEST_FACTS, MOST_FACTS = 3, 5

PEOPLE = (
    "Aldous Brenner; Yara Quist; Piet Hollander; Zofia Marek; Ingmar Stolt; Ruben Castell; Wanda Ferris; Otis Granger; "
    "Hedda Lindt; Kasimir Dobro; Leonie Brack; Tomas Ekdal; Sunniva Roth; Gregor Palme; Amira Solis"
)
TOWNS = (
    "Vardholm; Quillford; Estermoor; Rakkestad; Lindenau; Porto Velo; Kestrel Bay; Wexbury; Immelstadt; Nordvika; "
    "Tannwick; Oberlohn; Sandrigo; Felsmark; Grimsund"
)
OF_A_PERSON = {
    ("Where does {name} live?", "{name} lives in {value}."): (
        "Bruges; Tampere; Coimbra; Galway; Split; Trieste; Gdansk; Uppsala; Porvoo; Salamanca; Aarhus; Verona; Brno"
    ),
    ("What is {name}'s job?", "{name} works as a {value}."): (
        "glazier; surveyor; pianist; dentist; florist; printer; pilot; tailor; welder; chemist; judge; potter; plumber"
    ),
    ("What is the name of {name}'s horse?", "{name}'s horse is called {value}."): (
        "Comet; Juniper; Pepper; Domino; Velvet; Thunder; Saffron; Marble; Cricket; Bramble; Nimbus; Copper; Willow"
    ),
    ("What is {name}'s favorite dish?", "{name}'s favorite dish is {value}."): (
        "lentil stew; risotto; dumplings; paella; goulash; ramen; moussaka; lasagna; falafel; pancakes; curry; tacos"
    ),
    ("When was {name} born?", "{name} was born in {value}."): (
        "1931; 1938; 1942; 1947; 1953; 1958; 1961; 1966; 1972; 1979; 1984; 1988; 1993"
    ),
}
OF_A_TOWN = {
    ("Who is the mayor of {name}?", "The mayor of {name} is {value}."): (
        "Berta Klee; Simon Vogt; Nadia Falk; Hugo Brandt; Elsa Morin; Viktor Sand; Dora Lenz; Karl Tveit; Rosa Pohl"
    ),
    ("What is the river of {name} called?", "The river of {name} is called the {value}."): (
        "Ossel; Tarn; Weddle; Immer; Calder; Lauter; Brisk; Severin; Mossa; Elder; Nidda; Orle; Fenwater"
    ),
    ("How many bridges does {name} have?", "{name} has {value} bridges."): (
        "three; four; six; seven; eight; nine; eleven; twelve; thirteen; fifteen; seventeen; nineteen; twenty"
    ),
    ("When is the fair of {name}?", "The fair of {name} is in {value}."): (
        "January; February; March; April; May; June; July; August; September; October; November; December"
    ),
    ("What is {name} famous for?", "{name} is famous for its {value}."): (
        "clocks; cheese; carpets; tulips; bells; kites; mustard; glass; wool; violins; cider; marble; pottery"
    ),
}

# Ten facts. Each has its question, its answer, the expected text, and two wordings that no template makes.
PERSONAL = """
What is my dog's name? | Your dog is called Biscuit. | Biscuit | Who barks at my door? | My dog answers to what?
Who is my dentist? | Your dentist is Doctor Lindqvist. | Lindqvist | Who looks after my teeth? | My dentist is who?
Where do I live? | You live in Bergen. | Bergen | In which town is my home? | Which place do I call home?
What is my job? | You work as a beekeeper. | beekeeper | How do I earn my living? | What kind of work do I do?
When is my birthday? | Your birthday is on May 3. | May 3 | On which day was I born? | When do I turn a year older?
What is my sister called? | Your sister is called Marit. | Marit | My sister has which name? | How is my sister named?
What is my favorite dish? | You like fish soup best. | fish soup | What do I eat most? | Which meal makes me happy?
What color is my car? | Your car is dark green. | dark green | My car has which color? | How is my car painted?
Which instrument do I play? | You play the cello. | cello | What do I make music with? | Which instrument is mine?
Where did I go to school? | You went to school in Oslo. | Oslo | In which town was my school? | Where was I taught?
"""
NAMED = (
    ("What is your name?", "I am Juno, your assistant.", "Juno"),
    ("Who made you?", "Ada Winter made me.", "Ada Winter"),
)
# Number and seed of further held-out questions. The lesson itself uses the seeds 0 to 2.
OTHERS, OTHERS_SEED = 400, 9
ABOUT_NAME = ("identity", "greeting")


def shuffled(rng: random.Random, members: str) -> list[str]:
    found = members.split("; ")
    return rng.sample(found, len(found))


def make_lessons(count: int, seed: int) -> list[list[Item]]:
    """``count`` lessons of three to five facts each, in turn about a person and about a town."""
    rng = random.Random(seed)
    kinds = [(PEOPLE, OF_A_PERSON), (TOWNS, OF_A_TOWN)]
    names = [shuffled(rng, found) for found, _ in kinds]
    made = []
    for number in range(count):
        facts = kinds[number % 2][1]
        name = names[number % 2][number // 2]
        chosen = rng.sample(list(facts.items()), rng.randint(FEWEST_FACTS, MOST_FACTS))
        items = []
        for (question, answer), values in chosen:
            value = shuffled(rng, values)[0]
            items.append(Item.of(question.format(name=name), answer.format(name=name, value=value), expect=value))
        made.append(items)
    return made


def questions(items: list[Item]) -> list[tuple[str, str]]:
    """Each question of a lesson as written and in up to :data:`WORDINGS` held-out wordings, with the expected text."""
    found = []
    for i, worded in all_wordings(items).items():
        found += [(each, items[i].expected) for each in (items[i].question, *worded.held_out[:WORDINGS])]
    return found


def held(pupil: Pupil, made: list[list[Item]]) -> tuple[list[tuple[int, int]], list[str]]:
    """For each lesson: how many questions the promoted model answers rightly, and how many were asked.

    The second list quotes the wrong answers.
    """
    asked = [questions(items) for items in made]
    given = iter(pupil.answers(pupil.served, [each for some in asked for each in some]))
    counts, wrong = [], []
    for number, some in enumerate(asked, 1):
        right = 0
        for question, expected in some:
            answer, is_right = next(given)
            right += is_right
            if not is_right:
                wrong.append(f"lesson {number}: {question} {answer} (expected: {expected})")
        counts.append((right, len(some)))
    return counts, wrong


def personal_facts() -> list[list[str]]:
    return [line.split(" | ") for line in PERSONAL.strip().splitlines()]


def personal_lessons() -> list[list[Item]]:
    facts = [Item.of(question, answer, expect=expected) for question, answer, expected, *_ in personal_facts()]
    return [facts, [Item.of(question, answer, expect=expected) for question, answer, expected in NAMED]]


def further_wordings(pupil: Pupil) -> None:
    """Ask the promoted model each of the ten facts in the two wordings that no template makes."""
    asked = [(wording, expected) for _, _, expected, *wordings in personal_facts() for wording in wordings]
    right = [is_right for _, is_right in pupil.answers(pupil.served, asked)]
    print(f"the ten facts in wordings that no template makes: {sum(right)} of {len(right)}")


def others_right(pupil: Pupil, recipe: str) -> int:
    """How many of the :data:`OTHERS` held-out questions of a recipe the promoted model answers rightly.

    Questions about the assistant are left out, because a lesson may rename it.
    """
    items = [item for item in find_recipe(recipe).evaluation_items(OTHERS, OTHERS_SEED) if item.kind not in ABOUT_NAME]
    graded = answer_greedily(load_checkpoint(pupil.store, pupil.served), demo.task(items))
    right = sum(any(answer.right) for answer in graded)
    print(f"held-out questions of {recipe}: {right} of {len(items)} right", flush=True)
    return right


def roll_back(pupil: Pupil, lesson: Lesson) -> bool:
    """Whether a roll-back promotes exactly the weights that the gate promoted after the lesson."""
    pupil.program("--roll-back", str(lesson.number))
    same = weights_digest(pupil.store, pupil.served) == lesson.digest
    print(f"roll-back to lesson {lesson.number}: {pupil.served.revision}, {'its' if same else 'OTHER'} weights")
    return same


def run(pupil: Pupil, made: Sequence[list[Item]], flags: Sequence[str], recipe: str) -> list[str]:
    """Give the lessons and check the claims. Returns the claims that do not hold."""
    count = len(made)
    if recipe:
        others_right(pupil, recipe)
    given: list[Lesson] = []
    began = time.monotonic()
    for number, items in enumerate(made, 1):
        started = time.monotonic()
        given.append(pupil.teach(f"lesson-{number}", items, *flags))
        lesson = given[-1]
        steps, seconds = lesson.training.get("steps", 0), time.monotonic() - started
        training = lesson.training.get("seconds", 0)
        print(
            f"lesson {number}: {len(items)} facts, {lesson.state}, {steps} steps in {training:.0f} s, {seconds:.0f} s "
            f"from the request to the decision; {shares(lesson)}",
            flush=True,
        )
        print("".join(f"  {reason}\n" for reason in broken_rules(lesson)), end="", flush=True)
    print(f"{count} lessons in {time.monotonic() - began:.0f} s")

    promoted = [lesson for lesson in given if lesson.state == "promoted"]
    counts, wrong = held(pupil, made)
    print("right at the end, lesson by lesson: " + ", ".join(f"{right}/{asked}" for right, asked in counts))
    right, asked = (sum(column) for column in zip(*counts, strict=True))
    print(f"all lessons: {right} of {asked}")
    print("\n".join(wrong))
    if recipe:
        others_right(pupil, recipe)

    failed = []
    if len(promoted) != count:
        failed.append(f"{count - len(promoted)} lessons are not promoted")
    if counts[0][0] < LEAST_HELD * counts[0][1]:
        failed.append(f"the first lesson has {counts[0][0]} of {counts[0][1]} right answers left")
    listed = pupil.program("--list")
    inside = lineage(load_meta(pupil.store, pupil.served))
    if inside != [lesson.number for lesson in promoted]:
        failed.append(f"the promoted model names the lessons {inside}")
    if not all(lesson.digest[:12] in listed for lesson in promoted) or len(listed.splitlines()) != count + 1:
        failed.append(f"the list is\n{listed}")
    if promoted and not all([roll_back(pupil, promoted[len(promoted) // 2 - 1]), roll_back(pupil, promoted[-1])]):
        failed.append("a roll-back promoted other weights")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", default=".nanochat")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--lessons", type=int, default=20, choices=range(31), metavar="0..30")
    parser.add_argument("--personal", action="store_true", help="begin with ten facts, and a name with a maker")
    parser.add_argument("--imported", action="store_true", help="teach the model as a checkpoint of karpathy/nanochat")
    parser.add_argument(
        "--others", default="", help="recipe whose held-out questions are asked at the beginning and end"
    )
    parser.add_argument("--flags", default="", help="further flags of the lessons, such as '--max-steps 480'")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    made = [*(personal_lessons() if options.personal else []), *make_lessons(options.lessons, options.seed)]
    if not made:
        parser.error("--lessons is 0, and --personal is missing: there is no lesson to give")
    with tempfile.TemporaryDirectory() as folder:
        begin = Pupil.imported if options.imported else Pupil.copy
        pupil = begin(options.home, Path(folder), options.model, options.threads)
        failed = run(pupil, made, options.flags.split(), options.others)
        if options.personal:
            further_wordings(pupil)
    print("every claim holds" if not failed else "\n".join(f"FAILED: {each}" for each in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
