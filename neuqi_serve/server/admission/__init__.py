"""Who may ask the server what, and how much: API keys, rate limits, and the ASGI middleware that applies them."""
