"""Draft heads: tokens proposed ahead of the target, which verifies them."""
