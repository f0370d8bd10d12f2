"""Tests with the real serving engine."""
