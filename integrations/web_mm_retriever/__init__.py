"""Image search as a web page and a JSON API: `mm-retriever serve`, or `web_app` in a program of your own.

An adapter and nothing else: what is searched, what may be read and how large it may be is `ImageSearch`'s; MCP over
HTTP, which it serves too, is `mcp_server_mm_retriever`'s.
"""

from mm_retriever.errors import MissingExtraError

try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise MissingExtraError.of(error, error.name or "starlette", "web") from error

from web_mm_retriever.app import web_app
from web_mm_retriever.serving import serve_web

__all__ = ["serve_web", "web_app"]
