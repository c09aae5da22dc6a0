"""One module per example adapter: row(rng, held_out) returns a question and its answer."""
