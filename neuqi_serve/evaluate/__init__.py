"""What quantization does to a model: KL divergence, perplexity and task accuracy against the original."""
