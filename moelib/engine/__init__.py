"""llama.cpp: downloaded or found, asked, its answers and its log read."""
