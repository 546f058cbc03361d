"""The vLLM plugin: the only package that subclasses vLLM's classes."""
