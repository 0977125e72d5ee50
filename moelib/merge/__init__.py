"""What several machines measured of one study, brought together; and what sets these machines apart."""
