"""Tests of compressor.checkpoint."""
