"""The page at ``/``: one static file, with a content security policy that allows its own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from starlette.responses import Response

PAGE = Path(__file__).with_name("page") / "index.html"


def attach_page(app: Any) -> None:
    """Serve the page at ``/`` of a FastAPI ``app``. It holds no secret and needs no key; what it asks for does."""
    content = PAGE.read_bytes()
    headers = page_headers(content)

    async def page() -> Response:
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)


def page_headers(content: bytes) -> dict[str, str]:
    """Return the headers for a page of this ``content``: scripts and styles run by their hash, all else is refused."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(content, "script"),
        "style-src": _hashes(content, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        # A newer server brings a newer page, and its hashes.
        "Cache-Control": "no-cache",
    }


def _hashes(content: bytes, element: str) -> str:
    """Return the sources of a policy that allow the inline elements of this name (CSP level 2, §7.17)."""
    found = re.findall(rf"<{element}>(.*?)</{element}>".encode(), content, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
