"""The server: vLLM's own OpenAI-compatible API with our checks, defaults, metrics and shutdown around it."""
