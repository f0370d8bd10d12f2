"""Tests of the recipe language."""
