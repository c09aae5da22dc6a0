"""The adapter as data: what it is, where it lies, how several become one. Runs no model, knows no page."""
