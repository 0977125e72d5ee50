"""What serves a model beside llama-server, by the same door: shimmy."""
