"""What a study says: laws of its speed and memory, with how far they are from what was measured."""
