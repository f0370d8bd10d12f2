"""``--smoke``: a recipe run end to end on a small random model of its source's shape."""
