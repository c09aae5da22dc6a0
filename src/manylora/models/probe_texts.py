"""The texts on which a mixture is probed: plain, of several kinds, and of no task that adapters are trained on."""

PROBE_TEXTS = (
    "The bridge was closed for repairs in spring, so most people now walk along the river to reach the station.",
    "To make the soup, cut two onions and a carrot, fry them in a little oil, and add a litre of water.",
    "A year on Mars lasts almost twice as long as a year on Earth, because the planet is farther from the Sun.",
    '"Did you lock the door?" she asked. He felt in his pocket for the key, then shook his head.',
    "Water boils at a lower temperature on a mountain, where the pressure of the air is lower than at the sea.",
    "The library opens at nine in the morning and closes at six. On Sundays it is closed all day.",
    "First sort the numbers from small to large. The one in the middle of the list is called the median.",
    "In the old town there is a small museum of clocks, and every hour all of them strike at the same time.",
)
"""About 25 tokens each: a few hundred positions in all."""
