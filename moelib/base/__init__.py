"""What every room stands on: files, locks, schemas, statistics; nothing of models or engines."""
