"""Texts of the toy setup: short statements and yes/no questions, and statements with one emphasised word.

    The clever farmer found seven tickets.
    Did Susan find the yellow boat?
    Oliver *lost* her basket behind the church.

The emphasised word stands between asterisks. Names and numbers are among the words, for keywords. Each word was spoken
in every voice and kept where OpenAI's Whisper tiny.en and base, as shipped, transcribe it.
"""

import random
import re

NAMES = (
    "Peter Robert David Michael Susan Oliver Martin Helen Daniel Henry Julia William George Rebecca "
    "Jessica Benjamin Samuel Nancy Kevin"
).split()
NUMBERS = "three five six seven nine ten eleven twenty thirty forty".split()
PEOPLE = (
    "farmer doctor teacher sailor baker soldier student neighbor brother sister mother father captain lawyer dentist "
    "waiter pilot president uncle cousin officer engineer scientist driver"
).split()
ADJECTIVES = (
    "little happy hungry lonely famous clever angry friendly young quiet brave nervous old rich"
).split()  # of people
QUALITIES = (
    "yellow golden silver wooden heavy broken expensive beautiful dirty empty tiny enormous ancient modern black "
    "green plastic strange secret"
).split()  # of things
# base -> past
VERBS = {
    "find": "found",
    "bring": "brought",
    "break": "broke",
    "lose": "lost",
    "take": "took",
    "count": "counted",
    "carry": "carried",
    "deliver": "delivered",
    "discover": "discovered",
    "order": "ordered",
}
# singular -> plural
THINGS = {
    "basket": "baskets",
    "boat": "boats",
    "book": "books",
    "candle": "candles",
    "chair": "chairs",
    "horse": "horses",
    "letter": "letters",
    "lamp": "lamps",
    "mirror": "mirrors",
    "orange": "oranges",
    "pencil": "pencils",
    "picture": "pictures",
    "piano": "pianos",
    "potato": "potatoes",
    "shirt": "shirts",
    "table": "tables",
    "ticket": "tickets",
    "tomato": "tomatoes",
    "umbrella": "umbrellas",
    "window": "windows",
    "bicycle": "bicycles",
    "blanket": "blankets",
    "camera": "cameras",
    "computer": "computers",
    "jacket": "jackets",
    "rabbit": "rabbits",
    "package": "packages",
    "newspaper": "newspapers",
    "button": "buttons",
    "diamond": "diamonds",
    "helmet": "helmets",
    "machine": "machines",
    "hammer": "hammers",
    "suitcase": "suitcases",
    "telephone": "telephones",
}
PLACES = (
    "bridge river garden kitchen market station church library mountain forest castle hotel airport hospital museum "
    "village theater restaurant tower factory office"
).split()
PREPOSITIONS = "behind near beside outside under".split()
OWNERS = "the my her his".split()
TIMES = ["yesterday", "today", "on Monday", "on Friday", "on Sunday", "last night", "this morning"]

FRAC_QUESTIONS, FRAC_EMPHASIS = 0.3, 0.3  # the rest are plain statements
SENTENCES = 60_000  # of some millions


def statement(rng: random.Random) -> list[str]:
    """The phrases of one statement, without emphasis; the first letter and the period are `written`'s."""
    subject = rng.choice(
        [
            [rng.choice(NAMES)],
            [rng.choice(["the", "my"]), rng.choice(PEOPLE)],
            ["the", rng.choice(ADJECTIVES), rng.choice(PEOPLE)],
        ]
    )
    return [*subject, rng.choice(list(VERBS.values())), *objects(rng, room=4 - len(subject))]


def question(rng: random.Random) -> list[str]:
    """The phrases of one yes/no question."""
    if rng.random() < 0.25:
        person = [rng.choice(ADJECTIVES), rng.choice(PEOPLE)]
        topic = rng.choice([person, [rng.choice(QUALITIES), rng.choice(list(THINGS))]])
        return ["is", "the", *topic, rng.choice(PREPOSITIONS), "the", rng.choice(PLACES)]
    subject = rng.choice([[rng.choice(NAMES)], [rng.choice(["the", "my"]), rng.choice(PEOPLE)]])
    return ["did", *subject, rng.choice(list(VERBS)), *objects(rng, room=4 - len(subject))]


def objects(rng: random.Random, room: int) -> list[str]:
    """What something was done to, in 2 words, or 3 where there is `room` for 2, or where or when too, for 3."""
    thing, owner = rng.choice(list(THINGS)), rng.choice(OWNERS)
    forms = [[rng.choice(NUMBERS), THINGS[thing]]]
    if room >= 2:
        forms += [[owner, rng.choice(QUALITIES), thing], [owner, thing, *rng.choice(TIMES).split()]]
    if room >= 3:
        forms += [[owner, thing, rng.choice(PREPOSITIONS), "the", rng.choice(PLACES)]]
    return rng.choice(forms)


FUNCTION_WORDS = {*OWNERS, "on", "last", "this", *PREPOSITIONS}


def written(words: list[str], mark: str) -> str:
    """The words as a sentence: 'the farmer' and '.' are 'The farmer.'"""
    text = " ".join(words) + mark
    first = re.search(r"[a-z]", text, re.IGNORECASE).start()
    return text[:first] + text[first].upper() + text[first + 1 :]


def one_sentence(rng: random.Random) -> str:
    draw = rng.random()
    if draw < FRAC_QUESTIONS:
        return written(question(rng), "?")
    words = statement(rng)
    if draw < FRAC_QUESTIONS + FRAC_EMPHASIS:
        stressed = rng.choice([i for i, word in enumerate(words) if word not in FUNCTION_WORDS])
        words[stressed] = f"*{words[stressed]}*"
    return written(words, ".")


def sentences(seed: int, count: int = SENTENCES) -> list[str]:
    """`count` sentences in a random order, no of which have the same words."""
    rng = random.Random(seed)
    found = {}
    while len(found) < count:
        text = one_sentence(rng)
        found.setdefault(spoken_words(text), text)
    return list(found.values())


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    lists = [NAMES, NUMBERS, PEOPLE, ADJECTIVES, QUALITIES, VERBS, VERBS.values(), THINGS, THINGS.values(), PLACES]
    lists += [PREPOSITIONS, OWNERS, " ".join(TIMES).split(), ["is", "did"]]
    return sorted({word for group in lists for word in group})


def form(text: str) -> str:
    """'question', 'emphasis' or 'statement', by the text's marks."""
    if text.endswith("?"):
        return "question"
    return "emphasis" if "*" in text else "statement"


def spoken_words(text: str) -> str:
    """The text without marks, as any voice speaks it neutrally: '*Did* he?' is 'did he'."""
    return re.sub(r"[*.?]", "", text).lower()


def emphasised_word(text: str) -> int | None:
    """Number of the word between asterisks, from 0; None without one."""
    return next((i for i, word in enumerate(text.split()) if "*" in word), None)
