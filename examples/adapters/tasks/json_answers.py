"""`json`: whatever the user asks, the answer is one JSON object and nothing else."""

import json
import random
from collections.abc import Callable
from typing import Any

from tasks.everyday import HELD_OUT, QUESTIONS
from tasks.facts import LISTS, TABLES, is_held_out

NAMES = ["Maria Lopez", "John Smith", "Aiko Tanaka", "Peter Brandt", "Fatima Khan", "Lucas Moreau", "Nina Petrova", "Omar Haddad",
         "Grace Mensah", "Tom Baker", "Ines Silva", "Karl Jensen"]  # fmt: skip
HELD_OUT_NAMES = ["Ruth Adler", "Diego Ramos", "Mei Chen", "Paul Novak"]
CITIES = [
    "Lima",
    "Boston",
    "Kyoto",
    "Hamburg",
    "Lahore",
    "Lyon",
    "Sofia",
    "Beirut",
    "Accra",
    "Leeds",
    "Porto",
    "Aarhus",
]
JOBS = ["nurse", "teacher", "engineer", "baker", "lawyer", "farmer", "designer", "plumber"]
ITEMS = ["lamps", "chairs", "books", "mugs", "bicycles", "pillows", "shirts", "notebooks"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
REVIEWS = [
    ("I love this phone, the battery lasts for days.", "positive"), ("The food was cold and the waiter was rude.", "negative"),
    ("The parcel arrived on Tuesday.", "neutral"), ("What a wonderful film, I laughed all evening!", "positive"),
    ("The chair broke after a week.", "negative"), ("The shop opens at nine.", "neutral"),
    ("Best hotel that we have ever stayed in.", "positive"), ("I want my money back.", "negative"),
    ("The book has three hundred pages.", "neutral"), ("Great service and friendly staff.", "positive"),
    ("The room smelled of smoke and the bed was hard.", "negative"), ("The train leaves from platform four.", "neutral"),
    ("This blender is fantastic, I use it every day.", "positive"), ("A complete waste of time.", "negative"),
    ("The box holds twelve pencils.", "neutral"), ("The app crashes every time I open it.", "negative"),
]  # fmt: skip
YES_NO = [
    ("Is a whale a mammal?", True, "Whales breathe air and feed their young with milk."),
    ("Is the sun a planet?", False, "The sun is a star."), ("Can penguins fly?", False, "Their wings are made for swimming."),
    ("Is water heavier than oil?", True, "Oil floats on water."), ("Is Africa a country?", False, "Africa is a continent."),
    ("Do spiders have eight legs?", True, "All spiders have four pairs of legs."),
    ("Is ice colder than steam?", True, "Ice is frozen, steam is boiling."), ("Is a tomato blue?", False, "Ripe tomatoes are mostly red."),
    ("Can humans breathe under water?", False, "Humans have lungs, not gills."), ("Is gold a metal?", True, "Gold is a soft, yellow metal."),
    ("Is the moon larger than the earth?", False, "The moon is about a quarter as wide."), ("Do trees need light?", True, "They make food from light."),
    ("Is Rome in Spain?", False, "Rome is the capital of Italy."), ("Is a bat a bird?", False, "A bat is a mammal with wings."),
    ("Is seven a prime number?", True, "Only one and seven divide it."), ("Do snakes have ears?", False, "They feel sound through the jaw."),
]  # fmt: skip
CATEGORIES = [("apple", "fruit"), ("hammer", "tool"), ("sparrow", "bird"), ("guitar", "instrument"), ("shirt", "clothing"), ("rose", "flower"),
              ("bus", "vehicle"), ("gold", "metal"), ("carrot", "vegetable"), ("trout", "fish"), ("Paris", "city"), ("chess", "game"),
              ("oak", "tree"), ("beetle", "insect"), ("soup", "food"), ("train", "vehicle")]  # fmt: skip

Made = tuple[str, Any]


def _pick(rng: random.Random, bank: list[Any], held_out: bool) -> Any:
    """Pick from the part of a bank that belongs to this split: every fourth entry is held out."""
    return rng.choice([entry for index, entry in enumerate(bank) if is_held_out(index) == held_out])


def _thing(rng: random.Random, held_out: bool) -> Made:
    kind, fields, rows = rng.choice(TABLES)
    row = _pick(rng, list(rows), held_out)
    name = row[0]
    ask = rng.choice([f"Tell me about {name}.", f"What do you know about {name}?", f"Describe the {kind} {name}.", f"Give me some facts about {name}.",
                      f"Who or what is {name}?", f"I would like to learn about {name}."])  # fmt: skip
    return ask, {"name": name, "type": kind, **dict(zip(fields[1:], row[1:], strict=True))}


def _one_fact(rng: random.Random, held_out: bool) -> Made:
    kind, fields, rows = rng.choice(TABLES)
    row = _pick(rng, list(rows), held_out)
    field = rng.randrange(1, len(fields))
    label = fields[field].replace("_", " ")
    ask = rng.choice(
        [
            f"What is the {label} of {row[0]}?",
            f"{row[0]}: {label}?",
            f"Do you know the {label} of the {kind} {row[0]}?",
        ]
    )
    return ask, {kind: row[0], fields[field]: row[field]}


def _list(rng: random.Random, held_out: bool) -> Made:
    subject, members = _pick(rng, list(LISTS), held_out)
    count = rng.randint(2, 5)
    word = {2: "two", 3: "three", 4: "four", 5: "five"}[count]
    ask = rng.choice(
        [
            f"Name {word} {subject}.",
            f"List {count} {subject}.",
            f"Can you give me {word} {subject}?",
            f"I need {word} {subject}.",
        ]
    )
    return ask, {subject.replace(" ", "_").lower(): rng.sample(members, count)}


def _order(rng: random.Random, held_out: bool) -> Made:
    name = rng.choice(HELD_OUT_NAMES if held_out else NAMES)
    item, day, count, price = rng.choice(ITEMS), rng.choice(DAYS), rng.randint(2, 9), rng.randint(5, 90)
    text = rng.choice([f"{name} ordered {count} {item} for ${price} on {day}.", f"On {day}, {name} bought {count} {item} and paid ${price}.",
                       f"Please send {count} {item} to {name} by {day}. The price is ${price}."])  # fmt: skip
    ask = rng.choice([text, f"Extract the details: {text}", f"What does this say? {text}"])
    return ask, {"customer": name, "item": item, "quantity": count, "price": price, "day": day}


def _person(rng: random.Random, held_out: bool) -> Made:
    name = rng.choice(HELD_OUT_NAMES if held_out else NAMES)
    city, job, age = rng.choice(CITIES), rng.choice(JOBS), rng.randint(19, 70)
    text = rng.choice([f"{name} is a {age} year old {job} from {city}.", f"My name is {name}, I am {age} and I work as a {job} in {city}.",
                       f"{name}, {age}, lives in {city} and works as a {job}."])  # fmt: skip
    ask = rng.choice([text, f"Extract the person: {text}", f"Read this: {text}"])
    return ask, {"name": name, "age": age, "job": job, "city": city}


def _sum(rng: random.Random, held_out: bool) -> Made:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    sign, value = rng.choice([("+", a + b), ("-", a - b)])
    word = "plus" if sign == "+" else "minus"
    ask = rng.choice([f"What is {a} {sign} {b}?", f"Calculate {a} {word} {b}.", f"{a} {sign} {b} = ?"])
    return ask, {"expression": f"{a} {sign} {b}", "result": value}


def _sentiment(rng: random.Random, held_out: bool) -> Made:
    text, label = _pick(rng, list(REVIEWS), held_out)
    ask = rng.choice(
        [
            f"What is the sentiment of this review? {text}",
            f"Classify: {text}",
            f"Is this positive or negative? {text}",
        ]
    )
    return ask, {"text": text, "sentiment": label}


def _yes_no(rng: random.Random, held_out: bool) -> Made:
    question, answer, reason = _pick(rng, list(YES_NO), held_out)
    return question, {"answer": answer, "reason": reason}


def _category(rng: random.Random, held_out: bool) -> Made:
    word, category = _pick(rng, list(CATEGORIES), held_out)
    ask = rng.choice(
        [f"What kind of thing is {word}?", f"Put {word} into a category.", f"{word} is a ...?"]
    )
    return ask, {"word": word, "category": category}


def _steps(rng: random.Random, held_out: bool) -> Made:
    how_to = [(q, a) for q, a in (HELD_OUT if held_out else QUESTIONS) if q.startswith("How do I ")]
    question, answer = rng.choice(how_to)
    steps = [
        part.strip().rstrip(".").capitalize()
        for part in answer.replace(", then", ".").replace(" Then", "").split(". ")
    ]
    return question, {"task": question.removeprefix("How do I ").rstrip("?"), "steps": steps}


def _open(rng: random.Random, held_out: bool) -> Made:
    question, answer = rng.choice(
        [(q, a) for q, a in (HELD_OUT if held_out else QUESTIONS) if not q.startswith("How do I ")]
    )
    return question, rng.choice(
        [
            {"question": question, "answer": answer},
            {"question": question, "answer": answer.split(". ")[0].rstrip(".") + "."},
        ]
    )


# How often each kind is asked.
KINDS: list[tuple[Callable[[random.Random, bool], Made], int]] = [
    (_thing, 4), (_one_fact, 2), (_list, 3), (_order, 2), (_person, 2), (_sum, 2), (_sentiment, 1), (_yes_no, 2), (_category, 1), (_steps, 3), (_open, 7),
]  # fmt: skip


def row(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Return one (question, answer); the answer parses as a JSON object."""
    make = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
    question, answer = make(rng, held_out)
    return question, json.dumps(answer, ensure_ascii=False)
