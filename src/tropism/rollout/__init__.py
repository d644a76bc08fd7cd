"""The only room that turns words into tokens."""
