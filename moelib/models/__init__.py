"""Model files: fetched from the Hub, made or adopted, and quantised with a manifest."""
