"""What can be studied: models, quants, placements, studies, and where their files are published."""
