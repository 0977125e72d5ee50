"""What quantising costs in quality, and whether a placement changes what a model says: log-probabilities, compared."""
