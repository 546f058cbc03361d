"""Tokens charged to the key of a request: what the engine took in and gave out, streamed or not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

from neuqi_serve.server.admission.rate_limit import Bucket

# Set by the gate; tasks that handlers start inherit it.
charged: ContextVar[Bucket | None] = ContextVar("neuqi_charged", default=None)


def meter(engine_client: Any) -> None:
    """Let the client's ``generate`` and ``encode`` charge the tokens of requests whose key is limited."""
    for name in ("generate", "encode"):
        original = getattr(engine_client, name, None)
        if original is not None:
            setattr(engine_client, name, _metered(original))


def _metered(original: Any) -> Any:
    def call(prompt: Any, params: Any = None, *args: Any, **kwargs: Any) -> Any:
        if params is not None:
            args = (params, *args)
        stream = original(prompt, *args, **kwargs)
        bucket = charged.get()
        if bucket is None:
            return stream
        given = params if params is not None else kwargs.get("sampling_params")
        kind = getattr(getattr(given, "output_kind", None), "name", "")
        return _charging(stream, bucket, TokenCount(cumulative=kind == "CUMULATIVE"))

    return call


async def _charging(stream: Any, bucket: Bucket, count: TokenCount) -> AsyncIterator[Any]:
    async with contextlib.aclosing(stream):
        async for output in stream:
            tokens = count.added(output)
            if tokens:
                bucket.take(tokens)
            yield output


class TokenCount:
    """Counts the tokens of one request's outputs; ``cumulative``: each brings all so far, not what is new."""

    def __init__(self, cumulative: bool) -> None:
        self._cumulative = cumulative
        self._has_prompt = False
        self._seen: dict[int, int] = {}

    def added(self, output: Any) -> int:
        """Return how many tokens ``output`` (vLLM's ``RequestOutput``) adds, its prompt counted once."""
        added = 0
        if not self._has_prompt:
            self._has_prompt = True
            added = len(getattr(output, "prompt_token_ids", None) or ())
        # A pooling output is no list.
        parts = getattr(output, "outputs", None)
        for part in parts if isinstance(parts, list) else ():
            tokens = len(part.token_ids)
            added += tokens - self._seen.get(part.index, 0)
            if self._cumulative:
                self._seen[part.index] = tokens
        return added
