"""`Thumbnails`: small copies of indexed images, kept on disk.

A thumbnail is kept by the digest of its file, so that one of an earlier state of the file is never shown, and the file
need not be read again. Other users cannot read the folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from llama_index.core.schema import BaseNode

from mm_retriever.files import write_atomically
from mm_retriever.images import ImagePolicy, image_thumbnail
from mm_retriever.own_keys import file_digest
from mm_retriever.request import node_images
from mm_retriever.search_tools.conversation import NamedImage
from mm_retriever.threads import ForkLock

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 2**30
SIDES = (256, 512, 1600)


class Thumbnails:
    """JPEGs by digest and side; may be used by many threads.

    Args:
        folder: where they are kept; created if missing. None: they are not kept.
        max_bytes: the limit of the folder, beyond which the oldest are removed.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int = MAX_BYTES) -> None:
        self._folder, self._most = folder, max_bytes
        self._turn = ForkLock()
        self._bytes = 0
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._bytes = sum(status.st_size for _, status in self._files())
            self._make_room()

    def of(self, node: BaseNode, side: int, policy: ImagePolicy) -> bytes:
        """Return a JPEG of a node's image, its longer side at most `side` pixels.

        Raises:
            ImageLoadError: the image cannot or must not be read, or is not the one that was indexed.
        """
        digest = file_digest(node.metadata)
        roots = "" if policy.roots is None else f" in {':'.join(map(str, policy.roots))}"  # others may not be shown
        kept = self._path(digest, f"{side}{roots}") if digest else None
        if kept is not None:
            try:
                return kept.read_bytes()
            except FileNotFoundError:
                pass
            except OSError as error:
                logger.warning("a thumbnail cannot be read and is made again: %s", error)
        named = NamedImage(node.node_id, node_images(node), policy, node)
        data = named.read(lambda original: image_thumbnail(original, side, policy=policy))
        if kept is not None:
            self._keep(kept, data)
        return data

    def _path(self, digest: str, form: str) -> Path | None:
        if self._folder is None:
            return None
        name = hashlib.sha256(f"{digest} {form}".encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.jpg"

    def _keep(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, data, mode=0o600)
        except OSError as error:  # such as a full disk; the thumbnail is shown anyway
            logger.warning("a thumbnail is not kept: %s", error)
            return
        with self._turn:
            self._bytes += len(data)
        if self._bytes > self._most:
            self._make_room()

    def _make_room(self) -> None:
        """Remove the oldest thumbnails until a tenth of the limit is free."""
        with self._turn:
            if self._bytes <= self._most:
                return
            for path, status in sorted(self._files(), key=lambda item: item[1].st_mtime_ns):
                path.unlink(missing_ok=True)
                self._bytes -= status.st_size
                if self._bytes <= 0.9 * self._most:
                    return

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        assert self._folder is not None
        files = []
        for path in self._folder.glob("??/*.jpg"):
            try:
                files.append((path, path.lstat()))
            except FileNotFoundError:  # another server of the same user removed it
                continue
        return files
