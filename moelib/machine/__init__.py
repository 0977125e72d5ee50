"""This computer: its processes, CPU, RAM and GPUs, and what a process has mapped."""
