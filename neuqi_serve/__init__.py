"""neuqi-serve: OpenAI-compatible serving of language models with NeUQI 2-, 3- and 4-bit weights, on vLLM."""

from neuqi_serve._version import VERSION as __version__

__all__ = ["__version__"]
