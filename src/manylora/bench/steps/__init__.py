"""How the time of a decode step grows, and what it is made of."""
