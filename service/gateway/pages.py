"""`/`, which tries the model out, and `/dashboard`: static files, read once, allowed to talk to this server only."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

STATIC = Path(__file__).parent / "static"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",
}


def pages_router(root_path: str = "") -> APIRouter:
    """Routes for the pages and their files, which find each other below `root_path`, with a slash after it or without.

    Raises OSError where they are not installed.
    """
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in _KINDS}
    contents = {name: (path.read_bytes(), _KINDS[path.suffix]) for name, path in files.items()}
    for name in ("index.html", "dashboard.html"):
        body, kind = contents[name]
        contents[name] = (body.replace(b'="static/', f'="{root_path}/static/'.encode()), kind)
    router = APIRouter()

    def answer(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404)
        body, kind = contents[name]
        return Response(body, headers={**_HEADERS, "Content-Type": kind})

    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return answer("index.html")

    @router.head("/dashboard", include_in_schema=False)
    @router.get("/dashboard", include_in_schema=False)
    async def dashboard() -> Response:
        return answer("dashboard.html")

    @router.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return answer(name)

    return router
