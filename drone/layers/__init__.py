"""What replaces a dense module."""
