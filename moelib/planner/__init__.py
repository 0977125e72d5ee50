"""What a placement of a model needs of a machine, from the file's header alone."""
