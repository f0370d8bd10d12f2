"""Serving what engines do not have: a vLLM plug-in for packed KV caches."""
