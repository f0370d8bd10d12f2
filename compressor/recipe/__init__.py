"""The recipe language: one YAML file says what a compression job does."""
