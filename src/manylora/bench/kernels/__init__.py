"""How near each kernel comes to what the machine can do."""
