"""Which route needs which key. Whatever is not listed here needs an administrator's."""

from __future__ import annotations

from collections.abc import MutableMapping
from enum import Enum
from typing import Any

Scope = MutableMapping[str, Any]


class Access(Enum):
    """Who may call a route: everybody, owners of a key, or owners of an administrator's key."""

    OPEN = "open"
    USER = "user"
    ADMIN = "admin"


# Probes say no more than that the server lives; load balancers ask them without a key.
_OPEN = frozenset({"/health", "/ping"})
_USER = frozenset(
    {
        "/classify",
        "/cohere/v2/chat",
        "/detokenize",
        "/docs",
        "/docs/oauth2-redirect",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/openapi.json",
        "/pooling",
        "/redoc",
        "/rerank",
        "/score",
        "/tokenize",
        "/tokenizer_info",
        "/v2/embed",
        "/v2/rerank",
        "/version",
    }
)
# Everything a client of the OpenAI or Anthropic API asks for, except the routes that change the server.
_USER_PREFIX = "/v1/"
_ADMIN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
# Of the rest of /v1 only what is asked for most has a name in the metrics when it is refused.
_NAMED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/models",
        "/v1/responses",
    }
)
# What a monitoring system reads; it changes nothing.
_MONITORING = frozenset({"/metrics", "/load"})


def route_path(scope: Scope) -> str:
    """Return the path that the routes see: without the prefix that a proxy keeps, and without a slash at the end."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    return path.rstrip("/") or "/"


def access(path: str) -> Access:
    """Return who may call ``path``, as ``route_path`` gives it."""
    if path in _OPEN:
        return Access.OPEN
    if path in _ADMIN:
        return Access.ADMIN
    if path in _USER or path.startswith(_USER_PREFIX):
        return Access.USER
    return Access.ADMIN


def is_monitoring(path: str) -> bool:
    """Whether ``path`` only shows numbers."""
    return path in _MONITORING


def label(scope: Scope, path: str) -> str:
    """Return the route of a request for a metric: its template, never what a client wrote into the address."""
    template = getattr(scope.get("route"), "path", None)
    if isinstance(template, str):
        return template
    known = path in _NAMED or path in _OPEN or path in _USER or path in _ADMIN or path in _MONITORING
    return path if known else "other"


def exists(scope: Scope) -> bool:
    """Whether the application has a route for the request, whatever its method."""
    from starlette.routing import Match

    return any(route.matches(scope)[0] is not Match.NONE for route in scope["app"].routes)
