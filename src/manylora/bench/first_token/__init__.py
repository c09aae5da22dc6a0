"""How much later the first token comes when its adapter was never read."""
