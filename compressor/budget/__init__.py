"""Gates: which measured losses a recipe accepts."""
