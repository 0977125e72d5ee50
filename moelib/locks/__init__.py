"""What one process at a time may have: a device of a machine, or a file among all hosts that share its folder."""
