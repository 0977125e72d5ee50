"""Carrying a study out: a bench for its runs, files as they are, cells in turn, notebooks."""
