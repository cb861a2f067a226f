"""The demo's tasks: text made by rule, each with its instruction in words.

A prompt belongs to the training set or to the held-out set by its hash alone, so no held-out prompt
is ever trained on, however many examples are drawn.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

HELD_OUT_SHARE = 50  # one prompt in fifty
_TRIES = 20_000  # draws after which a task counts as having no more held-out prompts

MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()

PLURALS = dict(
    pair.split("/")
    for pair in (
        "apple/apples baby/babies bench/benches berry/berries bird/birds book/books box/boxes "
        "boy/boys brush/brushes bus/buses car/cars cat/cats chair/chairs cherry/cherries "
        "child/children church/churches city/cities class/classes cup/cups day/days dish/dishes "
        "dog/dogs door/doors farm/farms fish/fish fly/flies foot/feet fox/foxes girl/girls "
        "glass/glasses goose/geese hat/hats horse/horses house/houses kiss/kisses key/keys "
        "knife/knives lady/ladies lamp/lamps leaf/leaves loaf/loaves lunch/lunches man/men "
        "map/maps match/matches mouse/mice party/parties pen/pens pony/ponies ring/rings "
        "river/rivers road/roads sheep/sheep ship/ships shoe/shoes song/songs star/stars "
        "story/stories table/tables tooth/teeth toy/toys train/trains tree/trees watch/watches "
        "wife/wives window/windows wish/wishes wolf/wolves woman/women"
    ).split()
)
ADJECTIVES = (
    "big black blue bright brown clean cold dark deep dry early empty fast fine fresh full gentle "
    "golden good grand green happy heavy high kind large late light little long loud new nice old "
    "open pale plain pretty proud quick quiet red rich round sharp short silent silver simple "
    "small smooth soft strong sweet tall thin tiny warm white wide wild wise yellow young"
).split()
LINKS = "and of in on under over near with behind without".split()
NOUNS = list(PLURALS)
WORDS = sorted({*NOUNS, *ADJECTIVES})

THINGS = "film book meal hotel song game concert lesson trip story garden coffee".split()
OPINIONS = {
    "positive": "wonderful excellent lovely brilliant delightful superb amazing perfect".split(),
    "negative": "terrible awful boring dreadful horrible poor disappointing bad".split(),
    "neutral": "average ordinary usual normal typical common regular standard".split(),
}
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mary Noah Olga Paul".split()


@dataclass(frozen=True)
class Example:
    task: str
    prompt: str
    target: str


Random = random.Random


def number_in_words(number: int) -> str:
    """0 to 9999, as 4312: four thousand three hundred twelve."""
    if number < 20:
        return ONES[number]
    if number < 100:
        rest = f" {ONES[number % 10]}" if number % 10 else ""
        return TENS[number // 10] + rest
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {number_in_words(number % unit)}" if number % unit else ""
    return f"{ONES[number // unit]} {name}{rest}"


def _date_to_iso(r: Random) -> tuple[str, str]:
    date = datetime.date(1950, 1, 1) + datetime.timedelta(days=r.randrange(36525))
    month = MONTHS[date.month - 1]
    written = r.choice([f"{date.day} {month} {date.year}", f"{month} {date.day}, {date.year}"])
    instruction = r.choice(["Write the date as ISO: ", "Convert this date to ISO format: "])
    return instruction + written, date.isoformat()


def _some_number(r: Random) -> int:
    return r.randrange(10 ** r.choice([2, 3, 4, 4]))


def _number_to_words(r: Random) -> tuple[str, str]:
    number = _some_number(r)
    prompt = r.choice([f"Write {number} in words.", f"How do you say {number} in words?"])
    return prompt, number_in_words(number)


def _words_to_number(r: Random) -> tuple[str, str]:
    number = _some_number(r)
    instruction = r.choice(["Write this number in digits: ", "Which number is this? "])
    return instruction + number_in_words(number), str(number)


def _plural(r: Random) -> tuple[str, str]:
    noun, described = r.choice(NOUNS), " ".join(r.sample(ADJECTIVES, r.randint(0, 2)))
    words = f"{described} {noun}".strip()
    prompt = r.choice([f"What is the plural of {words}?", f"Make this plural: {words}"])
    return prompt, f"{described} {PLURALS[noun]}".strip()


def _sort(r: Random) -> tuple[str, str]:
    words = r.sample(WORDS, r.randint(2, 5))
    instruction = r.choice(["Sort these words: ", "Put these words in alphabetical order: "])
    return instruction + ", ".join(words), ", ".join(sorted(words))


def _title(r: Random) -> tuple[str, str]:
    parts = ["the", r.choice(ADJECTIVES), r.choice(NOUNS)]
    if r.random() < 0.5:
        parts += [r.choice(LINKS), "the", r.choice(ADJECTIVES), r.choice(NOUNS)]
    phrase = " ".join(parts)
    instruction = r.choice(["Make a title of this: ", "Write this as a title: "])
    return instruction + phrase, phrase.title()


def _reverse(r: Random) -> tuple[str, str]:
    words = r.sample(WORDS, r.randint(2, 6))
    instruction = r.choice(["Reverse the order of the words: ", "Say these words backwards: "])
    return instruction + " ".join(words), " ".join(reversed(words))


def _count(r: Random) -> tuple[str, str]:
    first = r.randrange(200)
    last = first + r.randint(2, 12)
    prompt = r.choice([f"Count from {first} to {last}.", f"List the numbers {first} to {last}."])
    return prompt, ", ".join(map(str, range(first, last + 1)))


def _weekday(r: Random) -> tuple[str, str]:
    day, step = r.randrange(7), r.randint(1, 60)
    prompt = r.choice(
        [
            f"Which day is {step} days after {DAYS[day]}?",
            f"Today is {DAYS[day]}. Which day is it in {step} days?",
        ]
    )
    return prompt, DAYS[(day + step) % 7]


def _sentiment(r: Random) -> tuple[str, str]:
    label = r.choice(list(OPINIONS))
    thing, other = r.sample(THINGS, 2)
    opinion = r.choice(OPINIONS[label])
    review = r.choice(
        [
            f"The {thing} was {opinion}.",
            f"{r.choice(NAMES)} says that the {thing} was {opinion}.",
            f"After the {other} we had a {thing}, and it was {opinion}.",
            f"What a {opinion} {thing}, said {r.choice(NAMES)} after the {other}.",
        ]
    )
    instruction = r.choice(
        [
            "Is this review positive, negative or neutral? ",
            "Classify the sentiment as positive, negative or neutral: ",
        ]
    )
    return instruction + review, label


TASKS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "date to ISO": _date_to_iso,
    "number to words": _number_to_words,
    "words to number": _words_to_number,
    "plural": _plural,
    "sort words": _sort,
    "title": _title,
    "reverse words": _reverse,
    "count": _count,
    "weekday": _weekday,
    "sentiment": _sentiment,
}


def is_held_out(prompt: str) -> bool:
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def training_examples(seed: int) -> Iterator[Example]:
    """Examples for ever, tasks in turn, none of them held out."""
    r = random.Random(seed)
    while True:
        for task, make in TASKS.items():
            prompt, target = make(r)
            if not is_held_out(prompt):
                yield Example(task, prompt, target)


def held_out_examples(count: int, seed: int = 0) -> list[Example]:
    """Up to ``count`` different examples, tasks in turn; one that has no more is passed over."""
    r = random.Random(f"held out {seed}")
    found: dict[str, Example] = {}
    tasks = dict(TASKS)
    while tasks and len(found) < count:
        for task in list(tasks)[: count - len(found)]:
            example = _another_held_out(task, r, found)
            if example is None:
                del tasks[task]
            else:
                found[example.prompt] = example
    return list(found.values())


def _another_held_out(task: str, r: Random, found: Container[str]) -> Example | None:
    for _ in range(_TRIES):
        prompt, target = TASKS[task](r)
        if is_held_out(prompt) and prompt not in found:
            return Example(task, prompt, target)
    return None
