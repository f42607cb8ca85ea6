"""What the controllers learn from, and their fitting."""
