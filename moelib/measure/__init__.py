"""One run with its instruments: device, VRAM, GPU counters, the server and its requests."""
