"""Small programs that a person runs."""
