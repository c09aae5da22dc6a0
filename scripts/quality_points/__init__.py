"""What `make show-quality` shows, one file a subject."""
