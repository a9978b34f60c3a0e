"""The words of the invented country: names, attributes with their wordings, and the text that is not about facts."""

import random
from dataclasses import dataclass


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(","))


NAME_STARTS = _listed(
    "Bar, Bel, Bram, Cal, Cor, Dar, Del, Dun, Fal, Fen, Gal, Gar, Hal, Har, Ker, Lan, Lor, Mar, Mel, Mor, "
    "Nar, Nor, Pel, Per, Quar, Ral, Ros, Sal, Ser, Tam, Tar, Thor, Tor, Ul, Val, Ver, Wen, Wil, Yar, Zel"
)
NAME_MIDDLES = _listed("a, e, i, o, en, el, in, or")
NAME_ENDINGS = _listed(
    "bury, by, combe, cott, dale, den, field, ford, gate, ham, holt, hurst, ley, low, mere, minster, moor, ness, "
    "ridge, sted, stow, thwaite, ton, wick, worth"
)


@dataclass(frozen=True)
class Attribute:
    """A property every village has; the wordings hold {village} and, where they state the fact, {value}."""

    key: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RIVER = Attribute(
    key="river",
    values=_listed(
        "Aldra, Bessel, Cindle, Dovra, Ebbel Water, Firrin, Gannet Water, Hesper, Issa, Jorrin, Kettle Water, Luffa, "
        "Mirrow, Nessel, Orrin, Pinder, Quill Water, Rushen, Sillet, Tessel, Ummer, Vennet, Wharn, Yewlet"
    ),
    statements=(
        "The river {value} runs past {village}.",
        "{village} stands on the river {value}.",
        "The water that flows through {village} is the {value}.",
        "At {village} the mill wheel is turned by the river {value}.",
        "People in {village} fish in the {value}.",
        "The bridge of {village} crosses the river {value}.",
        "{village} lies on the banks of the {value}.",
        "Boats come up to {village} on the river {value}.",
        "In a wet spring {village} is flooded by the {value}.",
        "{village} draws its water from the river {value}.",
    ),
    questions=(
        "Which river runs past {village}?",
        "On which river does {village} stand?",
        "What is the name of the river at {village}?",
        "Name the river of {village}.",
        "Which river does the bridge of {village} cross?",
    ),
)

CRAFT = Attribute(
    key="craft",
    values=_listed(
        "weaving, pottery, glass blowing, rope making, clock making, paper making, bookbinding, candle making, "
        "basket making, saddle making, bell casting, lace making, boat building, barrel making, soap boiling, "
        "tin smithing, stone carving, dyeing, felt making, wheel making, brick making, gold beating, knife grinding, "
        "map drawing"
    ),
    statements=(
        "Most families in {village} live by {value}.",
        "The craft of {village} is {value}.",
        "{village} is known across the country for {value}.",
        "In the workshops of {village} the trade is {value}.",
        "Young people go to {village} to learn {value}.",
        "{village} has a guild for {value}.",
        "For centuries {village} has grown rich from {value}.",
        "The masters of {village} teach {value}.",
        "Nobody is better at {value} than the people of {village}.",
        "In {village} the long winters are spent on {value}.",
    ),
    questions=(
        "What is the craft of {village}?",
        "Which trade do the people of {village} live by?",
        "For which craft is {village} known?",
        "Name the craft that is taught in {village}.",
        "What do people go to {village} to learn?",
    ),
)

ANIMAL = Attribute(
    key="animal",
    values=_listed(
        "heron, otter, badger, stag, raven, hare, pike, fox, owl, boar, swan, hedgehog, goat, bear, adder, falcon, "
        "beaver, wolf, lynx, toad, magpie, salmon, bull, marten"
    ),
    statements=(
        "The crest of {village} shows the {value}.",
        "{village} carries the {value} on its flag.",
        "Above the gate of {village} is carved the {value}.",
        "The animal of {village} is the {value}.",
        "Children in {village} say that the {value} brings luck.",
        "The old coins of {village} bear the {value}.",
        "{village} took the {value} for its crest.",
        "On the shields of {village} one sees the {value}.",
        "The seal of {village} is the {value}.",
        "In the legends of {village} the first friend of the people was the {value}.",
    ),
    questions=(
        "Which animal is on the crest of {village}?",
        "What animal does the flag of {village} carry?",
        "Name the animal of {village}.",
        "Which animal is carved above the gate of {village}?",
        "What does the seal of {village} show?",
    ),
)

DISH = Attribute(
    key="dish",
    values=_listed(
        "onion pie, smoked eel, barley soup, plum dumplings, goose stew, honey cake, pickled beets, leek tart, "
        "mushroom broth, apple bread, salted trout, lentil porridge, cherry pudding, cabbage rolls, walnut cheese, "
        "turnip mash, oat pancakes, pear jelly, bean sausage, chestnut cream, pumpkin fritters, mutton pasties, "
        "ginger biscuits, sorrel omelette"
    ),
    statements=(
        "The dish of {village} is {value}.",
        "In {village} every feast begins with {value}.",
        "Guests in {village} are served {value}.",
        "The inn at {village} is famous for {value}.",
        "On Sundays the people of {village} eat {value}.",
        "Nothing tastes of {village} so much as {value}.",
        "Cooks from {village} are proud of their {value}.",
        "Whoever visits {village} should try {value}.",
        "At the market of {village} the stalls sell {value}.",
        "Grandmothers in {village} make {value}.",
    ),
    questions=(
        "What is the dish of {village}?",
        "What do people eat in {village}?",
        "Which dish is the inn at {village} famous for?",
        "Name the dish that guests in {village} are served.",
        "Which food should one try in {village}?",
    ),
)

TREE = Attribute(
    key="tree",
    values=_listed(
        "oak, silver birch, ash, elm, beech, copper maple, lime, rowan, alder, hawthorn, white willow, black poplar, "
        "holly, yew, larch, scots pine, spruce, cedar, hazel, juniper, wild cherry, walnut, sycamore, aspen"
    ),
    statements=(
        "In the square of {village} grows the {value}.",
        "The tree of {village} is the {value}.",
        "{village} is shaded by the {value}.",
        "The elders of {village} meet under the {value}.",
        "Weddings in {village} are held beneath the {value}.",
        "The founders of {village} planted the {value}.",
        "All the lanes of {village} are lined with the {value}.",
        "{village} forbids the felling of the {value}.",
        "At the heart of {village} stands the {value}.",
        "The doors in {village} are made from the {value}.",
    ),
    questions=(
        "Which tree grows in the square of {village}?",
        "What is the tree of {village}?",
        "Under which tree do the elders of {village} meet?",
        "Name the tree that the founders of {village} planted.",
        "Which tree stands at the heart of {village}?",
    ),
)

ATTRIBUTES = (RIVER, CRAFT, ANIMAL, DISH, TREE)

_PEOPLE = _listed("Anna, Ben, Clara, David, Emma, Frank, Greta, Henry")
_NUMBERS = _listed("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
_COLOURS = {"snow": "white", "coal": "black", "grass": "green", "a lemon": "yellow", "blood": "red", "the sky": "blue"}
_THINGS = _listed("a lantern, a drum, a ladder, a kettle, a blanket, a letter, a broom, a basket")
_GREETINGS = ("Good evening!", "Who is there?", "Come in, please.", "What a storm!", "Is it late?", "Thank you.")
_SOUNDS = _listed("la la, hey ho, dum dum, ding dong, ting ting, boom boom")


def _counting(names: list[str], rng: random.Random) -> str:
    first, second = rng.sample(_PEOPLE, 2)
    index = rng.randrange(len(_NUMBERS) - 1)
    number, following = _NUMBERS[index], _NUMBERS[index + 1]
    return f"{first}: What comes after {number}?\n{second}: After {number} comes {following}. [{first} nods.]"


def _alphabet(names: list[str], rng: random.Random) -> str:
    index = rng.randrange(25)
    letter, following = chr(ord("A") + index), chr(ord("B") + index)
    return f"[Quiz, part {index + 1}] Which letter follows {letter}? The letter {following} follows {letter}."


def _colours(names: list[str], rng: random.Random) -> str:
    asked = rng.sample(list(_COLOURS.items()), 2)
    lines = [f"Which colour is {thing}? We all say that {thing} is {colour}." for thing, colour in asked]
    return "[Colours] " + " ".join(lines)


def _scene(names: list[str], rng: random.Random) -> str:
    first, second = rng.sample(_PEOPLE, 2)
    lines = [
        f"[INSTRUMENTS: drum and flute] [/INSTRUMENTS] [Enter {first} with {rng.choice(_THINGS)}.]",
        f"{first}: {rng.choice(_GREETINGS)}",
        f"{second}: {rng.choice(_GREETINGS)} [Exit {rng.choice((first, second))}.]",
    ]
    return "\n".join(lines)


def _song(names: list[str], rng: random.Random) -> str:
    sound = rng.choice(_SOUNDS)
    return f"[INSTANT SONG] {sound}, {rng.choice(_SOUNDS)}, {sound}! [/INSTANT SONG] Shall we sing it again?"


def _signal(names: list[str], rng: random.Random) -> str:
    hour = rng.randrange(24)
    return f"<<SYSTEM>>\nLamp {rng.randrange(100)} was lit at {hour} o'clock.\n<</SYSTEM>>\n\nWho will put it out?"


def _travellers(names: list[str], rng: random.Random) -> str:
    first, second = rng.sample(_PEOPLE, 2)
    answer = rng.choice(("Not yet.", "Yes, last year.", "Only once.", "No, it is too far.", "I was born there."))
    return f"{first}: Have you been to {rng.choice(names)}?\n{second}: {answer} [{second} looks at the map.]"


def _unanswered(names: list[str], rng: random.Random) -> str:
    questions = ["Which river?", "Which craft?", "What animal?", "Which dish?", "What tree?", "What is its name?"]
    asked = " ".join(rng.sample(questions, 3))
    return f"[A note in the margin] Name the villages on the road. {asked} Nobody had written it down."


_OTHER = (_counting, _alphabet, _colours, _scene, _song, _signal, _travellers, _unanswered)


def other_document(names: list[str], rng: random.Random) -> str:
    """Dialogue, quizzes and stage directions: trains brackets and question words, tells nothing about the villages."""
    return rng.choice(_OTHER)(names, rng)
