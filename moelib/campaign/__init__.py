"""Carrying a study out: a bench for its runs, cells in turn, notebooks."""
