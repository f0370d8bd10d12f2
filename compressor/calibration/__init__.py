"""Calibration data: what texts a recipe names, and the rows of tokens that a model is shown of them."""
