"""What the demo asks."""

TRAINED = ("json", "pirate", "sql", "headline")
"""The adapters that come with the repository."""

_PARAGRAPH = (
    "Write a headline for this: The city council voted on Tuesday to close the old bridge to cars from March on. "
    "Cyclists and walkers may still cross. The mayor said that repairs would have cost nine million."
)
_TABLE = "Table: orders(id, customer, city, total, year). Question: {}"

TRAINED_REQUESTS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "json"),
    ("Name three animals that live in the sea.", "json"),
    ("What is the capital of France?", "pirate"),
    ("How do I make a cup of tea?", "pirate"),
    (_TABLE.format("How many orders came from Paris?"), "sql"),
    (_TABLE.format("What is the largest total in 2021?"), "sql"),
    (_PARAGRAPH, "headline"),
    ("How do I make a cup of tea?", "pirate:1+headline:0.5"),
    ("What is the capital of France?", "json:0.6+pirate:0.6"),
    (_PARAGRAPH, "headline:1+pirate:0.5"),
)

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Why is the sky blue?",
    "How many legs does a spider have?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Give me a tip for sleeping well.",
    "What is the opposite of cold?",
    "Who wrote Romeo and Juliet?",
    "What is two plus three?",
    "Name a country in Africa.",
    "How do plants drink water?",
    "What should I pack for a rainy day?",
    "Tell me a fact about the moon.",
    "What is a good name for a dog?",
    "How long is a marathon?",
    "What is bread made of?",
    "Which planet is the largest?",
    "Describe winter in one sentence.",
    "What does a librarian do?",
)
