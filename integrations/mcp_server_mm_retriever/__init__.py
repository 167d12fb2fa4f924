"""Image search as an MCP server: `mm-retriever mcp --db photos.db`, or `create_server` in a program of your own.

An adapter and nothing else: what is searched, what may be read and how large it may be is `ImageSearch`'s.
"""

from mm_retriever.errors import MissingExtraError

try:
    import mcp.server
except ImportError as error:
    raise MissingExtraError.of(error, "mcp", "mcp") from error
if not hasattr(mcp.server, "MCPServer"):
    raise MissingExtraError('an mcp below 2 is installed, MCPServer is missing: pip install "mm-retriever[mcp]"')

from mcp_server_mm_retriever.http import check_access, http_app, serve_http
from mcp_server_mm_retriever.server import ImageSearchServer, create_server, image_search, serve_stdio

__all__ = [
    "ImageSearchServer",
    "check_access",
    "create_server",
    "http_app",
    "image_search",
    "serve_http",
    "serve_stdio",
]
