"""A model's file: its header, what a placement moves of it, and twins."""
