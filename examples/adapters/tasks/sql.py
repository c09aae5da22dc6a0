"""`sql`: a table's columns and a question, answered with one SQL statement and nothing else."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """One table: what a row is called, its label column, number columns and text columns with values."""

    name: str
    noun: str  # plural
    label: str
    numbers: dict[str, tuple[int, int]]
    texts: dict[str, tuple[str, ...]]

    @property
    def columns(self) -> list[str]:
        return ["id", self.label, *self.numbers, *self.texts]


TABLES = [
    Table("employees", "employees", "name", {"salary": (2000, 9000), "age": (18, 65)}, {"department": ("Sales", "Finance", "Support"), "city": ("Boston", "Lyon", "Oslo")}),
    Table("products", "products", "name", {"price": (5, 500), "stock": (0, 300)}, {"category": ("toys", "books", "garden"), "brand": ("Acme", "Lumo", "Nord")}),
    Table("students", "students", "name", {"age": (16, 30), "grade": (1, 10)}, {"major": ("Physics", "History", "Law"), "country": ("Spain", "Kenya", "Japan")}),
    Table("movies", "movies", "title", {"year": (1960, 2024), "rating": (1, 10)}, {"genre": ("comedy", "drama", "horror"), "director": ("Nolan", "Varda", "Kurosawa")}),
    Table("orders", "orders", "customer", {"amount": (10, 900), "quantity": (1, 20)}, {"status": ("shipped", "open", "cancelled"), "country": ("France", "Peru", "India")}),
    Table("books", "books", "title", {"pages": (80, 900), "year": (1900, 2024)}, {"author": ("Austen", "Kafka", "Borges"), "language": ("English", "German", "Spanish")}),
    Table("flights", "flights", "code", {"duration": (40, 800), "price": (30, 1500)}, {"origin": ("Rome", "Cairo", "Lima"), "airline": ("AirOne", "SkyBlue", "Condor")}),
    Table("cities", "cities", "name", {"population": (1000, 9000000), "area": (5, 900)}, {"country": ("Italy", "Ghana", "Chile"), "region": ("north", "south", "coast")}),
    Table("cars", "cars", "model", {"price": (3000, 90000), "horsepower": (60, 500)}, {"color": ("red", "black", "white"), "maker": ("Fiat", "Volvo", "Tesla")}),
    Table("patients", "patients", "name", {"age": (1, 99), "weight": (10, 130)}, {"ward": ("A", "B", "C"), "doctor": ("Lind", "Osei", "Park")}),
    Table("songs", "songs", "title", {"seconds": (90, 600), "plays": (100, 90000)}, {"artist": ("Abba", "Queen", "Bjork"), "genre": ("pop", "rock", "jazz")}),
    Table("hotels", "hotels", "name", {"rooms": (10, 400), "stars": (1, 5)}, {"city": ("Paris", "Delhi", "Quito"), "owner": ("Hyatt", "Accor", "Ritz")}),
    Table("animals", "animals", "name", {"weight": (1, 5000), "age": (1, 60)}, {"species": ("lion", "zebra", "panda"), "zoo": ("Berlin", "Prague", "Dallas")}),
    Table("invoices", "invoices", "client", {"total": (50, 9000), "tax": (1, 900)}, {"currency": ("EUR", "USD", "GBP"), "state": ("paid", "due", "late")}),
    Table("players", "players", "name", {"goals": (0, 60), "age": (17, 40)}, {"team": ("Lions", "Hawks", "Bears"), "position": ("goalkeeper", "forward", "defender")}),
    Table("recipes", "recipes", "title", {"minutes": (5, 240), "calories": (80, 1500)}, {"cuisine": ("Thai", "Greek", "Indian"), "chef": ("Rosa", "Kenji", "Aldo")}),
]  # fmt: skip
HELD_OUT_TABLES = [
    Table("houses", "houses", "address", {"price": (50000, 900000), "bedrooms": (1, 8)}, {"city": ("Denver", "Turin", "Perth"), "agent": ("Moss", "Reyes", "Blum")}),
    Table("courses", "courses", "title", {"credits": (1, 12), "seats": (10, 300)}, {"teacher": ("Gauss", "Noether", "Euler"), "level": ("basic", "advanced", "expert")}),
    Table("ships", "ships", "name", {"length": (10, 400), "crew": (2, 900)}, {"flag": ("Malta", "Panama", "Norway"), "port": ("Genoa", "Busan", "Santos")}),
]  # fmt: skip

AGGREGATES = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "total": "SUM"}
COMPARISONS = {
    ">": ("more than", "over", "above", "greater than"),
    "<": ("less than", "under", "below", "fewer than"),
    ">=": ("at least",),
    "<=": ("at most",),
}
YEAR_COMPARISONS = {">": ("after", "later than"), "<": ("before", "earlier than"), ">=": ("since",)}
ORDERS = {"DESC": ("highest", "largest", "most"), "ASC": ("lowest", "smallest", "least")}


def _question(table: Table, rng: random.Random) -> tuple[str, str]:
    """Return (question, statement) of one of fourteen shapes."""
    t, label, noun = table.name, table.label, table.noun
    number, (low, high) = rng.choice(list(table.numbers.items()))
    text, values = rng.choice(list(table.texts.items()))
    value, n = rng.choice(values), rng.randint(low, high)
    sign, words = rng.choice(list((YEAR_COMPARISONS if number == "year" else COMPARISONS).items()))
    more = rng.choice(words)
    word, function = rng.choice(list(AGGREGATES.items()))
    order, extremes = rng.choice(list(ORDERS.items()))
    extreme, k = rng.choice(extremes), rng.randint(2, 9)
    shapes = [
        (1, rng.choice([f"Show all {noun}.", f"List every row of {t}."]), f"SELECT * FROM {t};"),
        (1, rng.choice([f"How many {noun} are there?", f"Count the {noun}."]), f"SELECT COUNT(*) FROM {t};"),
        (2, rng.choice([f"How many {noun} have the {text} {value}?", f"Count the {noun} whose {text} is {value}."]), f"SELECT COUNT(*) FROM {t} WHERE {text} = '{value}';"),
        (4, rng.choice([f"Which {noun} have a {number} {more} {n}?", f"Find the {label} of {noun} with {number} {more} {n}.", f"Show {noun} whose {number} is {more} {n}."]), f"SELECT {label} FROM {t} WHERE {number} {sign} {n};"),
        (2, rng.choice([f"How many {noun} have a {number} {more} {n}?", f"Count the {noun} with {number} {more} {n}."]), f"SELECT COUNT(*) FROM {t} WHERE {number} {sign} {n};"),
        (2, rng.choice([f"Which {noun} have the {text} {value}?", f"List the {label} of all {noun} with {text} {value}."]), f"SELECT {label} FROM {t} WHERE {text} = '{value}';"),
        (1, rng.choice([f"What is the {word} {number} of all {noun}?", f"Give me the {word} {number}."]), f"SELECT {function}({number}) FROM {t};"),
        (1, rng.choice([f"What is the {word} {number} for each {text}?", f"Show the {word} {number} per {text}."]), f"SELECT {text}, {function}({number}) FROM {t} GROUP BY {text};"),
        (1, rng.choice([f"How many {noun} are there per {text}?", f"Count {noun} by {text}."]), f"SELECT {text}, COUNT(*) FROM {t} GROUP BY {text};"),
        (3, rng.choice([f"Which {k} {noun} have the {extreme} {number}?", f"Show the {k} {noun} with the {extreme} {number}."]), f"SELECT {label} FROM {t} ORDER BY {number} {order} LIMIT {k};"),
        (3, rng.choice([f"Which {noun} with {text} {value} have a {number} {more} {n}?", f"Show the {label} of {value} {noun} with {number} {more} {n}."]), f"SELECT {label} FROM {t} WHERE {text} = '{value}' AND {number} {sign} {n};"),
        (1, rng.choice([f"Which different values of {text} are there?", f"List the distinct {text} of the {noun}."]), f"SELECT DISTINCT {text} FROM {t};"),
        (1, rng.choice([f"Sort the {noun} by {number}.", f"List all {noun} ordered by {number}."]), f"SELECT * FROM {t} ORDER BY {number};"),
        (1, f"What is the {word} {number} of {noun} with {text} {value}?", f"SELECT {function}({number}) FROM {t} WHERE {text} = '{value}';"),
    ]  # fmt: skip
    ((_, question, statement),) = rng.choices(shapes, weights=[weight for weight, _, _ in shapes])
    return question, statement


def row(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Return one (prompt with columns and question, SQL)."""
    table = rng.choice(HELD_OUT_TABLES if held_out else TABLES)
    question, statement = _question(table, rng)
    extra = table.columns[1:]
    rng.shuffle(extra)
    columns = ", ".join(["id", *extra])
    prompt = rng.choice([f"Table {table.name}({columns}). {question}", f"Columns of {table.name}: {columns}.\n{question}",
                         f"{question} The table is {table.name}({columns}).", f"Given the table {table.name} with columns {columns}: {question}"])  # fmt: skip
    return prompt, statement
