"""How the KV cache is stored: codecs, the formats made of them, the packed cache, and their fitting."""
