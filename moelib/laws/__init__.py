"""Laws of speed and VRAM fitted to runs, and how far they are from runs that they did not see."""
