"""Tests of the report and its views."""
