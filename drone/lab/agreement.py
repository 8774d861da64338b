"""A small template grammar: sentences labelled grammatical or ungrammatical.

What it is: minimal pairs in the spirit of BLiMP, written for this book. Five
phenomena, each as often as the others. The two members of a pair differ in one word
(for negative polarity, in where `no` stands). But for the `what` of filler-gap pairs,
no single word tells whether the sentence it occurs in is grammatical.

What it is not: English. The lexicon is small, the syntax is fixed, and a score here
says nothing about a score on CoLA. It exists so that every chapter runs with no
download, and so that compression has something to destroy: each judgement needs
two words that stand apart to be compared.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

# (singular, plural, the reflexive pronoun that goes with the singular)
PEOPLE = [
    ("girl", "girls", "herself"),
    ("boy", "boys", "himself"),
    ("woman", "women", "herself"),
    ("man", "men", "himself"),
    ("queen", "queens", "herself"),
    ("king", "kings", "himself"),
]
THINGS = [
    ("picture", "pictures"),
    ("letter", "letters"),
    ("lamp", "lamps"),
    ("table", "tables"),
    ("book", "books"),
    ("key", "keys"),
]
PREPOSITIONS = ["near", "behind", "beside", "in front of", "next to"]
ADVERBS = ["often", "never", "sometimes", "really", "usually", "always"]
# (third person singular, plural)
INTRANSITIVE = [
    ("laughs", "laugh"),
    ("sleeps", "sleep"),
    ("smiles", "smile"),
    ("works", "work"),
]
LIKING = [
    ("likes", "like"),
    ("knows", "know"),
    ("admires", "admire"),
    ("trusts", "trust"),
]
REFLEXIVE_VERBS = ["hurt", "saw", "helped", "blamed", "praised", "described"]
FINDING = ["found", "bought", "dropped", "painted", "sold", "noticed", "hid", "lost"]
PARTICIPLES = ["laughed", "slept", "smiled", "worked", "waited", "sung", "arrived"]
ADJECTIVES = ["old", "new", "small", "large", "red", "green", "heavy", "strange"]
KNEW = ["remembered", "forgot", "heard", "discovered", "said", "knew"]
KNOWERS = ["Ann", "Tom", "Maria", "Peter", "Julia", "David", "We", "They"]
TIMES = ["yesterday", "last week", "on Monday", "this morning", "in the garden"]


@dataclass(frozen=True)
class Pair:
    """A grammatical sentence, its ungrammatical twin, and what tells them apart."""

    good: str
    bad: str
    phenomenon: str


def _subject(rng: random.Random, number: int) -> tuple[str, str]:
    """A person (0 singular, 1 plural), then an adverb or an attractor.

    An attractor is a noun of random number that stands between subject and verb.
    Returns the noun and the whole phrase, without its determiner.
    """
    noun = rng.choice(PEOPLE)[number]
    if rng.randrange(2):
        return noun, f"{noun} {rng.choice(ADVERBS)}"
    attractor_number = rng.randrange(2)
    if rng.randrange(2):
        attractor = rng.choice(THINGS)[attractor_number]
        return noun, f"{noun} {rng.choice(PREPOSITIONS)} the {attractor}"
    attractor = rng.choice(PEOPLE)[attractor_number]
    verb = rng.choice(LIKING)[attractor_number]
    return noun, f"{noun} that the {attractor} {verb}"


def subject_verb(rng: random.Random) -> Pair:
    """The verb agrees with the subject, not with the noun next to it."""
    number = rng.randrange(2)
    _, phrase = _subject(rng, number)
    verb = rng.choice(INTRANSITIVE)
    return Pair(
        f"The {phrase} {verb[number]}.",
        f"The {phrase} {verb[1 - number]}.",
        "subject-verb",
    )


def reflexive(rng: random.Random) -> Pair:
    """The reflexive agrees in number with the subject of its own clause."""
    number = rng.randrange(2)
    noun, phrase = _subject(rng, number)
    singular = next(person[2] for person in PEOPLE if person[number] == noun)
    forms = (singular, "themselves")
    verb = rng.choice(REFLEXIVE_VERBS)
    return Pair(
        f"The {phrase} {verb} {forms[number]}.",
        f"The {phrase} {verb} {forms[1 - number]}.",
        "reflexive",
    )


def determiner_noun(rng: random.Random) -> Pair:
    """This and that take a singular noun, these and those a plural."""
    number = rng.randrange(2)
    determiner = rng.choice([("this", "these"), ("that", "those")])[number]
    noun = rng.choice(THINGS)
    adjective = rng.choice(ADJECTIVES)
    who = rng.choice(PEOPLE)[rng.randrange(2)]
    verb = rng.choice(FINDING)
    frame = f"The {who} {verb} {determiner} {adjective} "
    return Pair(
        f"{frame}{noun[number]}.", f"{frame}{noun[1 - number]}.", "determiner-noun"
    )


def negative_polarity(rng: random.Random) -> Pair:
    """`ever` needs a negation above it; one inside a relative clause is no help."""
    number = rng.randrange(2)
    subject = rng.choice(PEOPLE)[number]
    inner_number = rng.randrange(2)
    inner = rng.choice(PEOPLE)[inner_number]
    liking = rng.choice(LIKING)[inner_number]
    have = ("has", "have")[number]
    participle = rng.choice(PARTICIPLES)
    rest = f"{inner} {liking} {have} ever {participle}."
    return Pair(
        f"No {subject} that the {rest}",
        f"The {subject} that no {rest}",
        "negative-polarity",
    )


def filler_gap(rng: random.Random) -> Pair:
    """A clause whose object is missing needs `what`; `that` leaves a gap unfilled."""
    knower, knew = rng.choice(KNOWERS), rng.choice(KNEW)
    who = rng.choice(PEOPLE)[rng.randrange(2)]
    verb, time = rng.choice(FINDING), rng.choice(TIMES)
    rest = f"the {who} {verb} {time}."
    return Pair(
        f"{knower} {knew} what {rest}", f"{knower} {knew} that {rest}", "filler-gap"
    )


PHENOMENA: tuple[Callable[[random.Random], Pair], ...] = (
    subject_verb,
    reflexive,
    determiner_noun,
    negative_polarity,
    filler_gap,
)


def generate(pairs_per_phenomenon: int, seed: int) -> list[Pair]:
    """Draw distinct minimal pairs, the phenomena in equal number, shuffled.

    Args:
        pairs_per_phenomenon: pairs of each of the five phenomena, at least 1.
        seed: the same seed gives the same pairs.

    Returns:
        5 × `pairs_per_phenomenon` pairs; no sentence occurs twice.

    Raises:
        ValueError: fewer than 1 pair is asked for, or more than the grammar has.
    """
    if pairs_per_phenomenon < 1:
        raise ValueError(f"pairs_per_phenomenon is {pairs_per_phenomenon}; at least 1.")
    rng = random.Random(seed)
    pairs: list[Pair] = []
    seen: set[str] = set()
    for draw in PHENOMENA:
        found, tries = 0, 0
        while found < pairs_per_phenomenon:
            tries += 1
            if tries > 100 * pairs_per_phenomenon:
                raise ValueError(
                    f"{draw.__name__}: the grammar has no {pairs_per_phenomenon} "
                    "distinct pairs; ask for fewer."
                )
            pair = draw(rng)
            if pair.good not in seen and pair.bad not in seen:
                seen |= {pair.good, pair.bad}
                pairs.append(pair)
                found += 1
    rng.shuffle(pairs)
    return pairs
