"""The demonstration: what it searches, and where its images come from.

Owns the four queries of ``mm-retriever demo``, the drawn catalogue's folder and the published archive of 900
Amazon images (download when asked to, safe extraction). Knows nothing of the terminal: progress and questions
belong to the command line.
"""

from __future__ import annotations

import shutil
import tarfile
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from mm_retriever.errors import MMRetrieverError, QueryError
from mm_retriever.files import drafted
from mm_retriever.images import is_image_path

AMAZON_URL = "https://github.com/milvus-io/bootcamp/releases/download/data/amazon_reviews_2023_subset.tar.gz"
AMAZON_BYTES = 20_598_434
MAX_MEMBERS = 20_000
MAX_MEMBER_BYTES = 32 * 2**20
MAX_TOTAL_BYTES = 512 * 2**20
DOWNLOAD_TIMEOUT_S = 30.0
CHUNK_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class DemoQuery:
    """One search of the demonstration: a name for files, a sentence for people, and what is asked."""

    name: str
    title: str
    text: str | None = None
    image: Path | None = None


def catalogue_queries(folder: Path) -> list[DemoQuery]:
    """The published example and three more, with the query images drawn into `folder`.

    Args:
        folder: where the query images are written; it must not be the folder that is indexed.
    """
    from mm_retriever.demo.catalogue import draw_product, draw_theme

    folder.mkdir(parents=True, exist_ok=True)
    leopard, umbrella, mug = folder / "leopard.png", folder / "umbrella.png", folder / "mug.png"
    draw_theme("leopard", "natural", seed=90_001, size=320).save(leopard)
    draw_product("umbrella", "polka dots", "red", seed=90_002, size=320).save(umbrella)
    draw_product("mug", "hearts", "pink", seed=90_003, size=320).save(mug)
    return [
        DemoQuery(name="composed", title="Image and text", text="phone case with this", image=leopard),
        DemoQuery(name="text", title="Text only", text="a green backpack with stars"),
        DemoQuery(name="image", title="Image only", image=umbrella),
        DemoQuery(name="edit", title="An image, changed", text="the same in green", image=mug),
    ]


def folder_queries(folder: Path, *, text: str | None = None, image: Path | None = None) -> list[DemoQuery]:
    """Searches for a folder of the user's own: the one that was asked for, or an image of the folder alone.

    Raises:
        QueryError: when the folder holds no image to ask with.
    """
    if image is None:
        image = next((path for path in sorted(folder.rglob("*")) if path.is_file() and is_image_path(path)), None)
    if image is None:
        raise QueryError(f"no image found in {str(folder)!r}: give a folder with JPEG, PNG or WebP files in it")
    queries = [DemoQuery(name="image", title="Image only", image=image)]
    if text:
        queries.append(DemoQuery(name="text", title="Text only", text=text))
    queries.insert(
        0, DemoQuery(name="composed", title="Image and text", text=text or "the same in another colour", image=image)
    )
    return queries


def download_amazon(target: Path, *, progress: Callable[[int], object] = lambda _: None) -> Path:
    """The published archive at `target`, downloaded unless it is there already.

    Args:
        target: file to write; a partial download never takes its name.
        progress: called with the number of bytes that arrived.

    Raises:
        MMRetrieverError: when the download fails or has another length than the published file.
    """
    if target.is_file() and target.stat().st_size == AMAZON_BYTES:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(AMAZON_URL, timeout=DOWNLOAD_TIMEOUT_S) as response,
            drafted(target) as draft,
        ):
            with draft.open("xb") as file:
                received = _copy(response, file, limit=AMAZON_BYTES, progress=progress)
            if received != AMAZON_BYTES:
                size = f"{received} bytes or more, not the published {AMAZON_BYTES}"
                raise MMRetrieverError(f"{AMAZON_URL} has {size}; not used")
    except OSError as error:
        raise MMRetrieverError(
            f"cannot download {AMAZON_URL} ({error}); fetch it elsewhere and run: mm-retriever demo --amazon ARCHIVE"
        ) from error
    return target


def extract_amazon(archive: Path, folder: Path) -> tuple[Path, Path]:
    """The folder of images and the leopard image of `archive`, extracted below `folder`.

    Only regular image files under ``images_folder/`` come out, under names checked part by part: no links, no
    devices, no absolute or climbing paths, bounded in number and size. Files that are already there and have the
    right length stay.

    Raises:
        MMRetrieverError: when the archive is damaged, hostile or has another layout.
    """
    leopard = folder / "images_folder" / "leopard.jpg"
    images = folder / "images_folder" / "images"
    try:
        with tarfile.open(archive, "r:*") as tar:
            _extract_images(tar, folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise MMRetrieverError(f"cannot read the archive {str(archive)!r}: {error}") from error
    if not leopard.is_file() or not images.is_dir():
        raise MMRetrieverError(
            f"{str(archive)!r} has another layout: "
            "images_folder/images/*.jpg and images_folder/leopard.jpg are expected"
        )
    return images, leopard


def _extract_images(tar: tarfile.TarFile, folder: Path) -> None:
    total = 0
    for count, member in enumerate(_members(tar), start=1):
        total += member.size
        if count > MAX_MEMBERS or member.size > MAX_MEMBER_BYTES or total > MAX_TOTAL_BYTES:
            raise MMRetrieverError(f"the archive is larger than expected at {member.name!r}; stopped")
        target = folder.joinpath(*PurePosixPath(member.name).parts)
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise MMRetrieverError(f"{str(target)!r} is in the way of the archive; remove it or choose another folder")
        if target.is_file() and target.stat().st_size == member.size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        if source is None:
            continue
        with source, drafted(target) as draft, draft.open("xb") as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)


def _members(tar: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    for member in tar:
        path = PurePosixPath(member.name)
        if not member.isreg() or not is_image_path(path) or path.name.startswith("._"):
            continue
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
            raise MMRetrieverError(f"the archive has a member that climbs out of its folder: {member.name!r}; refused")
        if path.parts[0] == "images_folder":
            yield member


def _copy(source: IO[bytes], file: IO[bytes], *, limit: int, progress: Callable[[int], object]) -> int:
    received = 0
    while received <= limit and (chunk := source.read(CHUNK_BYTES)):
        received += len(chunk)
        file.write(chunk)
        progress(len(chunk))
    return received
