"""The folder of an indexed image, opened on the screen of the server's machine: only where its user sits before it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response

from mm_retriever.errors import QueryError
from mm_retriever.own_keys import own_value
from mm_retriever.search_tools import ImageSearch
from web_mm_retriever import models
from web_mm_retriever.endpoints import Endpoint, as_json, in_thread, read_body


class Folders:
    """What opens folders.

    Args:
        search: whose images have folders.
    """

    def __init__(self, search: ImageSearch) -> None:
        self._search = search
        self._turns = anyio.CapacityLimiter(1)
        self.endpoints = (
            Endpoint(
                "POST",
                "/v1/reveal",
                self.reveal,
                "Open the folder of an image on this machine",
                models.RevealRequest,
                models.Done,
            ),
        )

    async def reveal(self, request: Request) -> Response:
        """Open the folder of an image."""
        body = await read_body(request, models.RevealRequest)
        await in_thread(request, lambda: self._open(body.id), self._turns)
        return as_json(models.Done())

    def _open(self, id_: str) -> None:
        path = own_value(self._search.indexed(id_).metadata, "file_path")
        if not isinstance(path, str) or not Path(path).is_absolute() or not Path(path).is_file():
            raise QueryError("this image is no file of this machine any more")
        program = opener()
        if program is None:
            raise QueryError("nothing on this machine opens folders")
        shown = ["-R", path] if sys.platform == "darwin" else [os.path.dirname(path)]  # noqa: PTH120
        quiet = subprocess.DEVNULL
        try:  # the path is absolute: it is no option
            opening = subprocess.Popen(  # noqa: S603
                [program, *shown], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
            )
        except OSError as error:
            raise QueryError(f"the folder cannot be opened: {error.strerror}") from error
        threading.Thread(target=opening.wait, name="reveal", daemon=True).start()  # it may run as long as its window


def opener() -> str | None:
    """The program that shows folders, where there is a screen to show them on; None where there is none."""
    if sys.platform == "darwin":
        return shutil.which("open")
    has_screen = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return shutil.which("xdg-open") if has_screen else None
