"""Rotary position embeddings: scaling methods, how configs spell them, and the search for factors."""
