"""What a model's file is, and what a placement of it needs of a machine, from its header alone."""
