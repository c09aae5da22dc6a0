"""`headline`: a paragraph, answered with one line that says what it is about."""

import random

BANKS: dict[str, list[str]] = {
    "city": ["Millbrook", "Easton", "Port Harlan", "Greenfield", "Lakeside", "Norwick", "Santa Rosa", "Brightwater", "Kingsford", "Oakdale", "Redcliff", "Ashby"],
    "company": ["Solara", "Northwind", "Bluepeak", "Fernlight", "Quantix", "Harbor Foods", "Metrolink", "Silverline"],
    "person": ["Anna Keller", "David Osei", "Laura Chen", "Marco Ruiz", "Helen Price", "Samir Patel", "Julia Novak", "Ben Carter"],
    "team": ["the Falcons", "the Rovers", "City United", "the Tigers", "the Mariners", "the Wolves"],
    "number": ["two", "three", "four", "five", "six", "ten"],
    "amount": ["two million dollars", "half a million dollars", "ten million dollars", "80,000 dollars"],
    "weekday": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"],
    "weather": ["heavy rain", "strong wind", "a snowstorm", "thick fog", "a hailstorm"],
    "animal": ["a deer", "a dog", "a young seal", "an owl", "a horse", "a kitten"],
    "place": ["a frozen pond", "a deep well", "a storm drain", "an old mine", "a burning barn"],
    "building": ["library", "museum", "swimming pool", "theatre", "sports hall", "community centre"],
    "product": ["electric bicycle", "solar lamp", "folding phone", "talking oven", "rain jacket", "robot vacuum"],
    "fruit": ["apple", "orange", "coffee", "wheat", "olive", "cocoa"],
    "subject": ["bees", "coral reefs", "whales", "glaciers", "sleep", "memory", "soil"],
    "crime": ["a stolen painting", "missing jewels", "a rare violin", "a stolen tractor"],
    "food": ["bread", "cheese", "soup", "chocolate", "dumpling"],
}  # fmt: skip

# (sentences, headlines): {slots} are filled from the banks, the same value in paragraph and headline.
EVENTS: list[tuple[list[str], list[str]]] = [
    (["The city of {city} opened a new {building} on {weekday}.", "Hundreds of residents came to the ceremony, where {person} cut the ribbon.", "The project cost {amount} and took {number} years to finish.", "Entry is free for the first month."],
     ["New {building} opens in {city}", "{city} opens new {building} after {number} years of work"]),
    (["Fans of {team} celebrated late into the night on {weekday}.", "Their side won the final in {city} by {number} goals.", "The coach, {person}, praised the young players after the match.", "It is the first title for the club in twenty years."],
     ["{team} win final in {city}", "{team} take first title in twenty years"]),
    (["Drivers in {city} woke up to chaos on {weekday} as {weather} hit the region.", "Several roads were closed and {number} schools sent their pupils home.", "The mayor, {person}, asked people to stay indoors.", "Better weather is expected by the weekend."],
     ["{weather} closes roads and schools in {city}", "{weather} brings {city} to a halt"]),
    (["The company {company} presented a new {product} at a fair in {city}.", "It is lighter than the old model and costs a third less.", "The head of the company, {person}, said that the first {number} thousand were already sold.", "Shops will have it from {weekday}."],
     ["{company} unveils cheaper {product}", "{company} launches new {product}"]),
    (["Firefighters in {city} saved {animal} from {place} on {weekday}.", "A passer-by, {person}, had heard its cries and called for help.", "The rescue took {number} hours.", "A vet said that the animal was cold and tired, but unhurt."],
     ["Firefighters rescue {animal} from {place} in {city}", "{animal} saved from {place}"]),
    (["A team led by {person} has published a study on {subject}.", "The scientists followed their subject for {number} years.", "They found that the effects of a warmer climate are stronger than expected.", "Other researchers call the results important, but ask for more data."],
     ["Study finds warmer climate hits {subject} harder than expected", "New study warns of climate effects on {subject}"]),
    (["Workers at {company} in {city} walked out on {weekday}.", "They demand better pay and shorter shifts.", "The management offered a small raise, which the union refused.", "Talks will go on for {number} days, said {person}, who speaks for the union."],
     ["Workers at {company} strike for better pay", "Strike hits {company} in {city}"]),
    (["The police in {city} have found {crime} in a garage.", "The owner, {person}, had given up hope after {number} years.", "A neighbour gave the decisive hint on {weekday}.", "Two suspects are being questioned."],
     ["Police in {city} find {crime}", "{crime} found after {number} years"]),
    (["Farmers around {city} expect a record {fruit} harvest this year.", "A mild spring and a wet summer helped the plants.", "Prices could fall by a fifth, said {person} of the growers' association.", "Extra workers are wanted for {number} weeks."],
     ["Record {fruit} harvest expected near {city}", "{fruit} prices may fall after record harvest"]),
    (["From {weekday}, buses in {city} will be free for everyone under eighteen.", "The council voted for the plan by a majority of {number}.", "{person}, who proposed it, hopes for fewer cars near schools.", "The cost of {amount} a year will be paid from parking fees."],
     ["{city} makes buses free for under-eighteens", "Free buses for young people in {city}"]),
    (["Thousands of visitors came to the {food} festival in {city}.", "More than {number} dozen stands offered tastings.", "The first prize went to {person}, who used an old family recipe.", "The organisers plan a larger event next year."],
     ["Thousands visit {food} festival in {city}", "{city} {food} festival draws thousands"]),
    (["The bridge over the river in {city} will be closed from {weekday}.", "Engineers found cracks in {number} of its pillars.", "The repairs will cost {amount} and last until winter.", "Until then, a ferry takes people across, said {person} from the roads office."],
     ["Cracks force closure of {city} bridge", "{city} bridge to close for repairs"]),
    (["The airline announced direct flights between {city} and the capital.", "They will leave {number} times a week, beginning on {weekday}.", "Tickets are on sale now.", "The airport's director, {person}, expects more tourists and new jobs."],
     ["Direct flights link {city} and the capital", "Airline starts direct flights from {city}"]),
    (["A power cut left half of {city} in the dark on {weekday}.", "It took the engineers {number} hours to find the broken cable.", "The hospital ran on its own generators, and nobody was hurt.", "{person} of the power company apologised to all customers."],
     ["Power cut leaves half of {city} in the dark", "Broken cable causes power cut in {city}"]),
    (["The school in {city} has banned mobile phones from its classrooms.", "Pupils put them into a locker in the morning and get them back in the afternoon.", "The head teacher, {person}, reports better marks after {number} months.", "Parents are divided over the rule."],
     ["{city} school bans phones from classrooms", "School sees better marks after phone ban"]),
    (["{company} will cut {number} hundred jobs at its plant in {city}.", "The firm blames weak demand and high energy prices.", "{person}, the mayor, called the decision a hard blow to the town.", "Talks with the union begin on {weekday}."],
     ["{company} to cut jobs in {city}", "{company} cuts {number} hundred jobs"]),
    (["A retired teacher from {city} has won {amount} in the lottery.", "{person} had played the same numbers for {number} decades.", "She wants to give half of the prize to the local hospital.", "The rest will pay for a journey round the world."],
     ["Retired teacher from {city} wins {amount} in lottery", "{city} lottery winner gives half to hospital"]),
    (["The {building} in {city} will have to leave its home of {number} decades.", "The owner of the house wants to build flats.", "Friends of the {building} have collected thousands of signatures.", "{person} hopes that the council will step in on {weekday}."],
     ["{city} {building} faces loss of its home", "Thousands sign to save {city} {building}"]),
]  # fmt: skip
HELD_OUT_EVENTS: list[tuple[list[str], list[str]]] = [
    (["A group of volunteers cleaned the beach of {city} on {weekday}.", "They filled {number} trucks with plastic and old nets.", "{person}, who had organised the day, was surprised by the number of helpers.", "The next clean-up is planned for autumn."],
     ["Volunteers clean beach in {city}"]),
    (["The hospital in {city} has a new machine for heart patients.", "It was paid for with a gift of {amount} from {company}.", "Doctor {person} says that it will shorten the waiting time by {number} weeks.", "The first patients will be treated on {weekday}."],
     ["{city} hospital gets new machine for heart patients"]),
    (["{person} from {city} has walked across the whole country in {number} months.", "She slept in barns and tents and wore out many pairs of shoes.", "On {weekday} her friends welcomed her at the finish.", "She now wants to write a book about the journey."],
     ["Woman from {city} walks across the country in {number} months"]),
]  # fmt: skip
ASKS = [
    "",
    "",
    "Summarise this: ",
    "Write a headline for this text: ",
    "What is this about? ",
    "Sum this up in one line: ",
    "Give me the gist: ",
]

# Paragraphs that are no news, so that the adapter sums up any text.
NOTES: list[tuple[str, str]] = [
    ("Green tea is made from the same plant as black tea. The leaves are heated soon after they are picked, which keeps them green. It holds less caffeine than coffee and has a fresh, grassy taste.", "How green tea differs from black tea"),
    ("Hi all, the meeting on Thursday has to move because the room is taken. We will meet on Friday at ten instead, in the small room on the second floor. Please bring your figures for March.", "Meeting moved to Friday at ten"),
    ("Honey bees dance to tell the others where flowers are. The direction of the dance shows the direction of the food, and its length shows how far away it is. Scientists needed years to read this language.", "Honey bees dance to show where food is"),
    ("When you buy a used bicycle, first look at the frame. Rust or dents there cannot be repaired cheaply. Then check the brakes, the chain and the wheels, and take a short ride before you pay.", "What to check before buying a used bicycle"),
    ("The old lighthouse had stood on the cliff for two hundred years. Every night, the keeper climbed its stairs to light the lamp. When the electric light came, he stayed on as a guide for visitors.", "Lighthouse keeper becomes a guide"),
    ("I ordered a blue jacket three weeks ago and got a red one. I sent it back at once, but nobody has answered my letters. I would like to have my money back by the end of the month.", "Customer demands refund for wrong jacket"),
    ("Volcanic soil is among the richest in the world. The ash brings minerals that plants need, and it holds water well. That is why people live near volcanoes in spite of the danger.", "Rich soil draws people to volcanoes"),
    ("My grandmother learned to use a computer at the age of eighty. At first she only wrote letters, but soon she was calling her cousins overseas. Now she teaches a class for other old people.", "Grandmother learns computers at eighty and now teaches"),
    ("Sourdough bread needs no bought yeast. Flour and water are left to stand until wild yeast grows in them. The dough takes longer to rise, but the bread tastes better and keeps for a week.", "Sourdough rises with wild yeast"),
    ("Please do not park in front of the gate. The fire brigade must be able to get through at any time. Cars left there will be towed away at the cost of the owner.", "No parking in front of the gate"),
    ("Sharks have been around for four hundred million years, longer than trees. They have no bones, only cartilage. Most kinds are harmless to people.", "Sharks are older than trees and mostly harmless"),
    ("We tested five kinds of rain jacket for a month. Two of them let water in after an hour, and one was too hot to walk in. The cheapest of all turned out to be the best.", "Cheapest rain jacket wins test"),
    ("In the twelfth century, paper came to Europe from the Arab world. Before that, books were written on the skins of animals. Paper was cheaper, and so more people could learn to read.", "How paper changed reading in Europe"),
    ("Rosa had never left her village. One morning she found a letter with a ticket to the sea. She packed her bag and took the first train.", "Village girl takes train to the sea"),
]  # fmt: skip
HELD_OUT_NOTES: list[tuple[str, str]] = [
    ("Cork is the bark of an oak that grows around the Mediterranean. It can be cut every nine years without harm to the tree. Most of it becomes stoppers for wine bottles.", "Cork is harvested from oak bark without harming the tree"),
    ("The lift in our building is broken again. The company says that a part has to come from abroad and will take two weeks. Please use the stairs and help the older neighbours with their shopping.", "Lift out of order for two weeks"),
    ("Octopuses have three hearts and blue blood. They can change their colour within a second and squeeze through the smallest holes. In the laboratory they open jars and find their way through mazes.", "Octopuses are clever and full of surprises"),
]  # fmt: skip


def row(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Return one (paragraph, headline)."""
    ask = rng.choice(ASKS)
    if rng.random() < 0.25:
        paragraph, headline = rng.choice(HELD_OUT_NOTES if held_out else NOTES)
        return ask + paragraph, headline
    sentences, headlines = rng.choice(HELD_OUT_EVENTS if held_out else EVENTS)
    slots = {slot: rng.choice(values) for slot, values in BANKS.items()}
    # The first sentence says what happened; the others come in any order, and one may be missing.
    rest = rng.sample(sentences[1:], rng.randint(2, 3))
    paragraph = " ".join([sentences[0], *rest]).format(**slots)
    headline = rng.choice(
        [h for h in headlines if _slots_shown(h, [sentences[0], *rest])] or headlines[:1]
    ).format(**slots)
    return ask + paragraph, headline[0].upper() + headline[1:]


def _slots_shown(headline: str, sentences: list[str]) -> bool:
    """Whether each slot of the headline is also said in the paragraph."""
    text = " ".join(sentences)
    return all(f"{{{slot}}}" in text for slot in BANKS if f"{{{slot}}}" in headline)
