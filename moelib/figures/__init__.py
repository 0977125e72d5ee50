"""Figures: on given axes, and whole ones for the document."""
