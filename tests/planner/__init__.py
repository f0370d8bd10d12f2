"""Tests of compressor.planner."""
