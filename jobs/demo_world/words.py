"""Words to spell and to count letters in, names of strangers, and the split that each belongs to.

To copy an unknown word token by token is the hardest skill that the demo teaches. Models learn it from many different
words, so most training words are made up. The hash of a made-up word decides its split; English words have a table per
split.
"""

import hashlib
import random

from jobs.demo_world.facts import PEOPLE
from jobs.demo_world.phrasings import Split

# One made-up word in eight is held out.
_HELDOUT_ONE_IN = 8
# A shorter made-up word could by chance be an English word, and training texts may contain that word.
_SHORTEST_HELDOUT = 6

_ENGLISH_TRAIN = """
able above across adult agree airport alarm album alley almost alone amount angle animal answer apple arrow artist
attic autumn avenue award bacon badge baggage balance ballet bamboo bandage barrel basket battle beach beauty believe
bell belly bench berry better bicycle bitter blanket blossom blue board bonnet book borrow bottle bottom bowl branch
breakfast breeze bridge bright broccoli brother bubble bucket budget buffalo build bullet bundle butter button cabbage
cabin camera candle canoe canvas capital captain career careful carpet carrot castle cattle ceiling cellar center
cereal chair cheese cherry chicken chimney chocolate circle circus citizen classic clever closet cloud clover coconut
coffee collar college comfort common compass concert copper corner correct cottage cotton council country cousin
cradle crayon cricket crystal cucumber culture curtain cushion daisy danger daughter decide deer degree delight desert
dessert diamond different dinner dinosaur distance dollar dolphin donkey door double dragon drawer dream dress drizzle
during eager eagle early earth easel echo effect effort egg eleven engine enough error evening event example excellent
expert fabric factory falcon family farmer father feather fellow fence fiddle field finger finish flavor flower follow
forest forget fossil fountain fox freedom freeze friend frozen funnel gallery gallop garden garlic gather gentle
giggle ginger giraffe glass glitter glory goblet goose gossip grammar granite grape gravel green grocery guitar gutter
hallway hammer hammock happen harbor harvest hello helmet hidden hobby hockey holiday honey hook horizon horse hotel
hundred hunger hurry igloo imagine improve indeed infant insect inside island ivory jacket jaguar jelly jewel jiggle
journal juggle jungle kangaroo keeper kennel kettle kidney kingdom kitchen kitten knee knuckle ladder lagoon language
lantern laundry lawyer leather lemon lesson letter lettuce level library lily limit little lizard llama lobster lonely
loop lumber magazine magnet mammal manner maple marble market marriage matter meadow melon member message middle
million minute mirror mixture model moment monkey moon morning mosquito mother motor mountain muffin muscle museum
mushroom mustard napkin narrow nation nature needle nephew nickel noodle normal nothing number object ocean office
olive onion opinion orange orbit ordinary ostrich otter oven oyster paddle palace pancake panther paper parade parrot
passenger pattern peanut pebble pencil penguin people pepper perfect piano pickle picture pigeon pillow pilot pirate
planet plastic platter pocket poem poodle poppy potato powder present pretty princess problem public puddle pumpkin
puppet puzzle pyramid quality quarrel queen question quiet rabbit raccoon radio rattle reason recipe ribbon riddle
river robin rocket rubber saddle salad sandal sausage scatter scissors season seed shallow sheep shelter shiver
shoulder signal silver simple sister skeleton sleep slippers snail soccer soldier spaghetti sparrow spider spinach
spoon spring squirrel stallion station stomach street success sudden sugar suggest summer supper surface sweater
swimming table tailor tambourine teddy teeth temple tennis thimble thread thunder ticket tiger timber tomorrow tongue
tooth toward traffic travel treasure triangle trouble trumpet tulip tunnel turkey turnip turtle twelve umbrella uncle
unicorn useful valley vanilla velvet vessel village violet visit volcano voyage waffle wallet walnut warrior water
weather wedding week whisper whistle window winter wizard wonder wooden yellow yogurt zebra zigzag zipper
"""
ENGLISH_TRAIN = tuple(_ENGLISH_TRAIN.split())

_ENGLISH_HELDOUT = """
abacus accident address alligator anaconda apartment apricot artichoke asparagus avocado balloon banana bandanna
beetle billboard blackberry blueberry bookkeeper boomerang bungalow butterfly cappuccino caramel cardinal caterpillar
cathedral chameleon chandelier cinema committee coral cranberry dandelion embarrass embassy emerald envelope fabulous
flamingo giggling gorilla graffiti grapefruit grasshopper hamburger happiness hibiscus hippopotamus illusion
jackrabbit jellyfish lavender lollipop macaroni marmalade marshmallow mathematics mayonnaise millennium mississippi
moccasin necessary newspaper occurrence octopus opossum orchestra papaya parachute parallel parliament peppermint
pineapple pistachio platypus pomegranate porcupine possession professor propeller pudding radish raspberry
refrigerator restaurant rhinoceros rhubarb satellite scarecrow seagull sentence skateboard skyscraper snowflake
strawberry stubborn suitcase sunflower tangerine telephone television terrific toboggan toothbrush tornado tortilla
trampoline typewriter vacuum vinegar vocabulary volleyball walrus watermelon wheelbarrow woodpecker zeppelin zucchini
"""
ENGLISH_HELDOUT = tuple(_ENGLISH_HELDOUT.split())

_STRANGERS_TRAIN = """
Adam Agnes Albert Alice Amir Anna Anton Arthur Ben Bella Boris Carla Carlos Cecil Charlie Clara Conrad Daisy Daniel
David Dora Edgar Elena Elias Emil Emma Erik Esther Eva Felix Fiona Frank Frida George Gloria Greta Gustav Hanna
Harold Hassan Helen Henry Ida Igor Ingrid Irene Ivan Jack Jacob James Jane John Jonas Julia Karim Karl Kate Kevin
Lena Leo Lily Louis Lucas Lucy Magnus Maria Martin Mary Max Maya Michael Mohammed Nadia Nina Noah Nora Oliver Olga
Oscar Otto Pablo Paul Paula Peter Philip Rita Robert Rosa Ruth Samuel Sarah Sofia Simon Stella Susan Theo Thomas
Tom Ursula Vera Victor Walter Wanda William Xavier Yara Yusuf Zoe
"""
STRANGERS_TRAIN = tuple(_STRANGERS_TRAIN.split())
_STRANGERS_HELDOUT = """
Abigail Bernard Camille Derek Dorothy Elvis Francesca Gerald Heidi Isabella Jasmine Joseph Kenneth Leopold Margaret
Nathan Ophelia Patrick Quentin Rebecca Sebastian Tamara Umberto Valentina Wendy Yolanda Zacharias
"""
STRANGERS_HELDOUT = tuple(_STRANGERS_HELDOUT.split())

# Parts of syllables. A part that is written twice is drawn twice as often.
_ONSETS = """
b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sm sn sp st str t th tr v w y z
"""
_VOWELS = "a a e e i i o o u u ai ea ee ie oa oo ou y"
_CODAS = "b ck d ff g l ll m mm n nd ng nk nn p pp r rr rt s ss st t tt x zz"
_ONSET, _VOWEL, _CODA = (tuple(parts.split()) for parts in (_ONSETS, _VOWELS, _CODAS))
_OPEN_SYLLABLE_SHARE = 0.4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def is_heldout_word(word: str) -> bool:
    """Whether only held-out conversations may contain this made-up word."""
    return hashlib.sha256(word.lower().encode()).digest()[0] % _HELDOUT_ONE_IN == 0


def made_up_word(rng: random.Random, split: Split) -> str:
    """Draw a pronounceable word of one to four syllables and 3 to 12 letters."""
    while True:
        syllables = rng.choices((1, 2, 3, 4), (1, 5, 4, 1))[0]
        word = "".join(_syllable(rng) for _ in range(syllables))
        if 3 <= len(word) <= 12 and _may_use(word, split):
            return word


def _syllable(rng: random.Random) -> str:
    coda = "" if rng.random() < _OPEN_SYLLABLE_SHARE else rng.choice(_CODA)
    return rng.choice(_ONSET) + rng.choice(_VOWEL) + coda


def letter_string(rng: random.Random) -> str:
    """Draw three to eight random letters for training, from a small alphabet so that letters repeat."""
    while True:
        alphabet = rng.sample(_LETTERS, rng.randint(3, 8))
        word = "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 8)))
        if _may_use(word, "train"):
            return word


def stranger(rng: random.Random, split: Split) -> str:
    """Draw a first name that nobody in Saltmere has; half of these names are made up."""
    if rng.random() < 0.5:
        return rng.choice(STRANGERS_TRAIN if split == "train" else STRANGERS_HELDOUT)
    while True:
        name = made_up_word(rng, split).capitalize()
        if len(name) <= 9 and all(name != person.name for person in PEOPLE):
            return name


def _may_use(word: str, split: Split) -> bool:
    if word in ENGLISH_TRAIN or word in ENGLISH_HELDOUT:
        return False
    if split == "heldout":
        return is_heldout_word(word) and len(word) >= _SHORTEST_HELDOUT
    return not is_heldout_word(word)
