"""Which requests reach the server at all: those of this machine's programs and of its own page, and of no other page.

A page elsewhere can make a browser send requests to a server on loopback: by its address, or under a name of its own
that it lets point to 127.0.0.1 (DNS rebinding). A browser says in every such request under which name it asks (Host),
and which page asks (Origin, Sec-Fetch-Site). Both must be this server's; other programs send neither of the latter two.
No answer allows another origin to read it.
"""

import re
from collections.abc import Collection
from typing import Any

from starlette.responses import JSONResponse

from isotune.serving.limits import FORBIDDEN, NOT_JSON, Refused

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]+)?")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = (
    ("content-security-policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
     "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cache-control", "no-store"),
)  # fmt: skip


class Guard:
    """ASGI middleware around the application; `names` are those under which the server may be asked."""

    def __init__(self, app: Any, names: Collection[str]) -> None:
        self.app, self.names = app, frozenset(name.lower() for name in names)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            self._check(scope)
        except Refused as refused:
            await JSONResponse(refused.as_json(), refused.status)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _check(self, scope: Any) -> None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or _host_name(hosts[0]) not in self.names:
            raise Refused(
                FORBIDDEN, "wrong_host", f"this server is not asked under the name {(hosts or [''])[0][:100]!r}", "Host"
            )
        same = {f"http://{hosts[0]}".lower(), f"https://{hosts[0]}".lower()}
        for origin in headers.get("origin", []):
            if origin.lower() not in same:
                raise Refused(FORBIDDEN, "wrong_origin", f"a page of {origin[:100]!r} may not ask here", "Origin")
        reads_page = scope["method"] in ("GET", "HEAD")
        site = headers.get("sec-fetch-site", ["none"])
        if not reads_page and any(one not in ("same-origin", "none") for one in site):
            raise Refused(FORBIDDEN, "wrong_origin", "another page may not ask here", "Sec-Fetch-Site")
        media = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
        if scope["method"] == "POST" and media != "application/json":
            raise Refused(NOT_JSON, "not_json", "the body is JSON: say Content-Type: application/json", "Content-Type")


def _host_name(host: str) -> str:
    """The name in a Host header, without its port; empty where it has none."""
    found = _HOST.fullmatch(host.lower())
    return found[1].strip("[]") if found else ""
