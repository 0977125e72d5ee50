"""Which experts tokens use, by the engine's own routing: counted, followed in order, and what a cache would hit."""
