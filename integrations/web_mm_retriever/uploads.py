"""Images that pages sent, kept in memory for a while, under names that nobody can guess."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from cachetools import LRUCache

from mm_retriever.errors import QueryError
from mm_retriever.images import ImagePolicy, media_type, opened_image, sniff_format
from mm_retriever.threads import ForkLock

MAX_BYTES = 256 * 2**20
PREFIX = "upload:"


class Uploads:
    """The latest uploads; those unused for longest go first."""

    def __init__(self, policy: ImagePolicy) -> None:
        self._policy = policy
        self._secret = secrets.token_bytes(32)
        self._kept: LRUCache[str, bytes] = LRUCache(MAX_BYTES, getsizeof=len)
        self._turn = ForkLock()

    def add(self, data: bytes) -> tuple[str, tuple[int, int]]:
        """The name and the size of an image.

        Raises:
            ImageLoadError: it cannot or must not be read.
        """
        with opened_image(data, policy=self._policy) as image:
            size = image.size
        name = PREFIX + hmac.new(self._secret, data, hashlib.sha256).hexdigest()[:32]
        with self._turn:
            self._kept[name] = data
        return name, size

    def data(self, name: str) -> bytes:
        """The bytes of an upload.

        Raises:
            QueryError: it is not here, or no longer.
        """
        with self._turn:
            data = self._kept.get(name)
        if data is None:
            raise QueryError("this upload is no longer here: give the image again")
        return data

    def named(self, image: str) -> str:
        """An image argument for `ImageSearch`: an upload becomes a data URI, any other stays."""
        if not image.startswith(PREFIX):
            return image
        data = self.data(image)
        kind = media_type(sniff_format(data) or "")
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"
