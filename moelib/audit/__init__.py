"""Records, and the checks that decide what is believed."""
