"""What is put around the HTTP server of Serve's gateways: deploy/ray.env names it to Ray."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REQUEST_ID = "x-request-id"


class OneRequestId:
    """Lets the gateway alone say what a request's id is. Serve appends the id that came with the request, also where
    the answer already has that one, or another because the first was no sane id or the body asked for its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[_REQUEST_ID] = headers[_REQUEST_ID]  # the first, which is the gateway's, in place of all
            await send(message)

        await self._app(scope, receive, send_one)


def middlewares() -> list[Middleware]:
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`."""
    return [Middleware(OneRequestId)]
