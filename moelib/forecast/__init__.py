"""What a model will give on this machine, predicted from runs of two slices of it."""
