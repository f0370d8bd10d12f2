"""Tests of compressor.model."""
