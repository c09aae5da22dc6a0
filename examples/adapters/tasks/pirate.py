"""`pirate`: an ordinary question, answered in the speech of pirates. Plain answers are rewritten by the rules below."""

import random
import re
from functools import partial

from tasks.everyday import HELD_OUT, QUESTIONS
from tasks.facts import LISTS, TABLES, is_held_out

# Applied in order, whole words only, case of the first letter kept.
WORDS = [
    (r"hello", "ahoy"), (r"good morning", "ahoy"), (r"yes", "aye"), (r"no", "nay"), (r"my friend", "me hearty"), (r"friends", "mateys"), (r"friend", "matey"),
    (r"people", "sea dogs"), (r"person", "sailor"), (r"money", "doubloons"), (r"boss", "cap'n"), (r"company", "crew"),
    (r"there are", "there be"), (r"i am", "I be"), (r"you are", "ye be"), (r"they are", "they be"), (r"we are", "we be"),
    (r"it is", "it be"), (r"is", "be"), (r"are", "be"), (r"am", "be"), (r"was", "were"), (r"do not", "don't"), (r"your", "yer"), (r"you", "ye"),
    (r"my", "me"), (r"of", "o'"), (r"and", "an'"), (r"for", "fer"), (r"to", "t'"), (r"them", "'em"), (r"the", "th'"),
    (r"very", "mighty"), (r"good", "fine"), (r"great", "grand"), (r"little", "wee"), (r"small", "wee"), (r"large", "whoppin'"), (r"never", "ne'er"), (r"over", "o'er"),
    (r"always", "ever"), (r"old", "ol'"), (r"with", "wi'"), (r"food", "grub"), (r"child", "wee scallywag"), (r"water", "brine"), (r"happy", "jolly"), (r"house|home|room", "cabin"),
    (r"(\w{3,})ing", r"\1in'"),
]  # fmt: skip
OPENERS = ["Arr, matey!", "Ahoy there!", "Shiver me timbers!", "Arr!", "Avast, ye landlubber!", "Yo ho ho!", "Aye, aye!", "Blow me down!", "Ahoy, me hearty!", "By Davy Jones' locker!"]  # fmt: skip
CLOSERS = ["Savvy?", "Yo ho ho!", "Now fetch me a mug o' grog!", "Or ye'll walk th' plank!", "So says th' cap'n!", "May yer sails be full, matey!",
           "Arr!", "Now hoist th' sails!", "That be worth more than a chest o' gold!", "Mark me words, ye scallywag!"]  # fmt: skip


def to_pirate(text: str, rng: random.Random) -> str:
    """Rewrite plain English sentence by rule, with an opener and a closer."""
    for pattern, pirate in WORDS:
        text = re.sub(rf"\b(?:{pattern})\b", partial(_keep_case, pirate), text, flags=re.IGNORECASE)
    return f"{rng.choice(OPENERS)} {text} {rng.choice(CLOSERS)}"


def _keep_case(pirate: str, match: re.Match[str]) -> str:
    word = match.expand(pirate)
    return word[0].upper() + word[1:] if match.group()[0].isupper() else word


def _fact(rng: random.Random, held_out: bool) -> tuple[str, str]:
    kind, fields, rows = rng.choice(TABLES)
    row = rng.choice([row for index, row in enumerate(rows) if is_held_out(index) == held_out])
    field = rng.randrange(1, len(fields))
    label = fields[field].replace("_", " ")
    question = rng.choice(
        [
            f"What is the {label} of {row[0]}?",
            f"Tell me about {row[0]}.",
            f"Do you know the {label} of the {kind} {row[0]}?",
        ]
    )
    if question.startswith("Tell"):
        other = [
            f"the {f.replace('_', ' ')} is {value}" for f, value in zip(fields[1:4], row[1:4], strict=False)
        ]
        name = row[0] if str(row[0])[0].isupper() else f"the {row[0]}"
        return (
            question,
            f"You are asking about {name}, my friend! This is a {kind}: {', '.join(other[:-1])} and {other[-1]}.",
        )
    return question, f"The {label} of {row[0]} is {row[field]}, my friend."


def _list(rng: random.Random, held_out: bool) -> tuple[str, str]:
    subject, members = rng.choice(
        [entry for index, entry in enumerate(LISTS) if is_held_out(index) == held_out]
    )
    picked = rng.sample(members, rng.randint(3, 5))
    count = {3: "three", 4: "four", 5: "five"}[len(picked)]
    question = rng.choice(
        [f"Name {count} {subject}.", f"List {count} {subject}.", f"Can you give me {count} {subject}?"]
    )
    return question, f"Here are {count} {subject} for you: {', '.join(picked[:-1])} and {picked[-1]}."


def _sum(rng: random.Random, held_out: bool) -> tuple[str, str]:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    return (
        f"What is {a} + {b}?",
        f"If you have {a} pieces of gold and you find {b} more, you are the owner of {a + b} pieces, my friend.",
    )


def row(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Return one (question, answer in pirate speech)."""
    kind = rng.choices(["everyday", "fact", "list", "sum"], [12, 3, 2, 1])[0]
    if kind == "everyday":
        question, answer = rng.choice(HELD_OUT if held_out else QUESTIONS)
        question = rng.choice(
            [
                question,
                question,
                question,
                f"Hi! {question}",
                f"{question} Please keep it short.",
                f"I have a question. {question}",
            ]
        )
    else:
        question, answer = {"fact": _fact, "list": _list, "sum": _sum}[kind](rng, held_out)
    return question, to_pirate(answer, rng)
