"""What a study says: contrasts of quants, what dominates what, and the questions and claims of the plan."""
