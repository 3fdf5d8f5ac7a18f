"""Pictures of what a trained network does: what it retrieves, how it remembers, and what it gains from a text."""
