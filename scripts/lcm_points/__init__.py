"""What `make show-lcm` shows, one file a subject."""
