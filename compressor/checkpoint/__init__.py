"""Reading sources and writing results: safetensors, GGUF, Hub, config."""
