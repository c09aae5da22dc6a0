"""What `make show-core` shows, one file a subject."""
