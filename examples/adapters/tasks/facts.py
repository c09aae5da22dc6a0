"""Small tables of facts, written for this project: things that `json` and `pirate` are asked about.

Each table is (kind, field names, rows); the first field names the thing. Every fourth row is held out.
"""

TABLES: list[tuple[str, tuple[str, ...], list[tuple[str | int, ...]]]] = [
    ("country", ("name", "capital", "continent", "currency", "language"), [
        ("Japan", "Tokyo", "Asia", "yen", "Japanese"), ("Brazil", "Brasilia", "South America", "real", "Portuguese"),
        ("Kenya", "Nairobi", "Africa", "shilling", "Swahili"), ("Norway", "Oslo", "Europe", "krone", "Norwegian"),
        ("Mexico", "Mexico City", "North America", "peso", "Spanish"), ("Egypt", "Cairo", "Africa", "pound", "Arabic"),
        ("India", "New Delhi", "Asia", "rupee", "Hindi"), ("Poland", "Warsaw", "Europe", "zloty", "Polish"),
        ("Peru", "Lima", "South America", "sol", "Spanish"), ("Greece", "Athens", "Europe", "euro", "Greek"),
        ("Thailand", "Bangkok", "Asia", "baht", "Thai"), ("Canada", "Ottawa", "North America", "dollar", "English"),
        ("Italy", "Rome", "Europe", "euro", "Italian"), ("Ghana", "Accra", "Africa", "cedi", "English"),
        ("Vietnam", "Hanoi", "Asia", "dong", "Vietnamese"), ("Sweden", "Stockholm", "Europe", "krona", "Swedish"),
        ("Chile", "Santiago", "South America", "peso", "Spanish"), ("Turkey", "Ankara", "Asia", "lira", "Turkish"),
        ("Austria", "Vienna", "Europe", "euro", "German"), ("Morocco", "Rabat", "Africa", "dirham", "Arabic"),
        ("Portugal", "Lisbon", "Europe", "euro", "Portuguese"), ("Cuba", "Havana", "North America", "peso", "Spanish"),
        ("Iceland", "Reykjavik", "Europe", "krona", "Icelandic"), ("Nepal", "Kathmandu", "Asia", "rupee", "Nepali"),
    ]),
    ("animal", ("name", "class", "diet", "habitat", "legs"), [
        ("lion", "mammal", "carnivore", "savanna", 4), ("eagle", "bird", "carnivore", "mountains", 2),
        ("frog", "amphibian", "insectivore", "wetland", 4), ("shark", "fish", "carnivore", "ocean", 0),
        ("cow", "mammal", "herbivore", "grassland", 4), ("penguin", "bird", "carnivore", "coast", 2),
        ("spider", "arachnid", "carnivore", "almost everywhere", 8), ("ant", "insect", "omnivore", "soil", 6),
        ("dolphin", "mammal", "carnivore", "ocean", 0), ("rabbit", "mammal", "herbivore", "meadow", 4),
        ("snake", "reptile", "carnivore", "forest", 0), ("bee", "insect", "herbivore", "meadow", 6),
        ("bear", "mammal", "omnivore", "forest", 4), ("parrot", "bird", "herbivore", "rainforest", 2),
        ("salmon", "fish", "carnivore", "rivers", 0), ("turtle", "reptile", "omnivore", "ocean", 4),
        ("elephant", "mammal", "herbivore", "savanna", 4), ("owl", "bird", "carnivore", "forest", 2),
        ("crab", "crustacean", "omnivore", "coast", 10), ("butterfly", "insect", "herbivore", "meadow", 6),
    ]),
    ("element", ("name", "symbol", "atomic_number", "category"), [
        ("hydrogen", "H", 1, "gas"), ("helium", "He", 2, "noble gas"), ("carbon", "C", 6, "nonmetal"),
        ("nitrogen", "N", 7, "gas"), ("oxygen", "O", 8, "gas"), ("neon", "Ne", 10, "noble gas"),
        ("sodium", "Na", 11, "metal"), ("silicon", "Si", 14, "metalloid"), ("iron", "Fe", 26, "metal"),
        ("copper", "Cu", 29, "metal"), ("silver", "Ag", 47, "metal"), ("tin", "Sn", 50, "metal"),
        ("gold", "Au", 79, "metal"), ("mercury", "Hg", 80, "metal"), ("lead", "Pb", 82, "metal"),
        ("uranium", "U", 92, "metal"),
    ]),
    ("planet", ("name", "position", "type", "moons"), [
        ("Mercury", 1, "rocky", 0), ("Venus", 2, "rocky", 0), ("Earth", 3, "rocky", 1), ("Mars", 4, "rocky", 2),
        ("Jupiter", 5, "gas giant", 95), ("Uranus", 7, "ice giant", 27), ("Neptune", 8, "ice giant", 14),
    ]),
    ("writer", ("name", "born", "country", "known_for"), [
        ("William Shakespeare", 1564, "England", "Hamlet"), ("Jane Austen", 1775, "England", "Pride and Prejudice"),
        ("Leo Tolstoy", 1828, "Russia", "War and Peace"), ("Mark Twain", 1835, "United States", "Tom Sawyer"),
        ("Mary Shelley", 1797, "England", "Frankenstein"), ("Franz Kafka", 1883, "Bohemia", "The Trial"),
        ("Victor Hugo", 1802, "France", "Les Miserables"), ("Homer", -800, "Greece", "The Odyssey"),
        ("Jules Verne", 1828, "France", "Around the World in Eighty Days"), ("Dante Alighieri", 1265, "Italy", "The Divine Comedy"),
    ]),
    ("landmark", ("name", "city", "country", "kind"), [
        ("Eiffel Tower", "Paris", "France", "tower"), ("Colosseum", "Rome", "Italy", "amphitheatre"),
        ("Big Ben", "London", "England", "clock tower"), ("Taj Mahal", "Agra", "India", "mausoleum"),
        ("Statue of Liberty", "New York", "United States", "statue"), ("Sagrada Familia", "Barcelona", "Spain", "church"),
        ("Brandenburg Gate", "Berlin", "Germany", "gate"), ("Golden Gate Bridge", "San Francisco", "United States", "bridge"),
        ("Acropolis", "Athens", "Greece", "citadel"), ("Sydney Opera House", "Sydney", "Australia", "opera house"),
    ]),
    ("instrument", ("name", "family", "strings"), [
        ("violin", "strings", 4), ("guitar", "strings", 6), ("flute", "woodwind", 0), ("trumpet", "brass", 0),
        ("cello", "strings", 4), ("clarinet", "woodwind", 0), ("drum", "percussion", 0), ("harp", "strings", 47),
    ]),
    ("dish", ("name", "origin", "main_ingredient", "served"), [
        ("pizza", "Italy", "dough", "hot"), ("sushi", "Japan", "rice", "cold"), ("hummus", "the Levant", "chickpeas", "cold"),
        ("paella", "Spain", "rice", "hot"), ("goulash", "Hungary", "beef", "hot"), ("gazpacho", "Spain", "tomatoes", "cold"),
        ("ramen", "Japan", "noodles", "hot"), ("tacos", "Mexico", "corn tortillas", "hot"),
    ]),
]  # fmt: skip

LISTS: list[tuple[str, tuple[str, ...]]] = [
    ("fruits", ("apple", "banana", "cherry", "mango", "pear", "grape", "plum")),
    ("colours", ("red", "blue", "green", "yellow", "purple", "orange", "white")),
    ("European cities", ("Paris", "Madrid", "Prague", "Vienna", "Lisbon", "Dublin", "Oslo")),
    ("vegetables", ("carrot", "potato", "onion", "spinach", "cabbage", "pea", "leek")),
    ("sports", ("football", "tennis", "swimming", "rowing", "hockey", "judo", "cycling")),
    ("trees", ("oak", "birch", "maple", "pine", "willow", "beech", "ash")),
    ("jobs", ("baker", "nurse", "teacher", "pilot", "farmer", "judge", "plumber")),
    ("musical instruments", ("piano", "violin", "drum", "flute", "harp", "trumpet", "cello")),
    ("programming languages", ("Python", "Java", "Rust", "C", "Haskell", "Go", "Ruby")),
    ("tools", ("hammer", "saw", "drill", "wrench", "pliers", "chisel", "level")),
    ("kinds of cheese", ("brie", "cheddar", "gouda", "feta", "mozzarella", "parmesan", "edam")),
    ("insects", ("ant", "bee", "beetle", "moth", "wasp", "cricket", "fly")),
    ("flowers", ("rose", "tulip", "daisy", "lily", "iris", "poppy", "violet")),
    ("oceans", ("Pacific", "Atlantic", "Indian", "Arctic", "Southern")),
    ("pieces of furniture", ("chair", "table", "bed", "sofa", "desk", "shelf", "stool")),
    ("rivers", ("Nile", "Amazon", "Danube", "Ganges", "Rhine", "Volga", "Mekong")),
    ("birds", ("eagle", "robin", "owl", "swan", "crow", "heron", "finch")),
    ("mammals", ("lion", "whale", "bat", "horse", "bear", "mouse", "fox")),
]  # fmt: skip


def is_held_out(row_index: int) -> bool:
    """Every fourth thing is only ever asked about in the held-out rows."""
    return row_index % 4 == 3
