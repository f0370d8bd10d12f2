"""Measurements of a result against its source."""
