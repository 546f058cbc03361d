"""What a model will need, from its ``config.json`` alone: bytes of weights and KV cache, memory, expected speed."""
