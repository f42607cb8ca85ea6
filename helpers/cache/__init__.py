"""The packed key/value cache."""
