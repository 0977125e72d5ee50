"""Tables and sentences with the records that each number came from, and those of the evidence itself."""
