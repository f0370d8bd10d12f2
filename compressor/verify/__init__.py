"""Proof that a finished checkpoint is whole, means what its source meant, and is served so by an engine."""
