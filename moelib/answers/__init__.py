"""What a study says: contrasts, what dominates what, laws with how far they are off, and the plan's questions."""
