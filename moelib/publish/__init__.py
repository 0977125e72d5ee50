"""Model cards, and their upload with the files."""
