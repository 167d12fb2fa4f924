"""Which row of a sidecar belongs to which image; rows that belong to none, or to several, are reported."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from mm_retriever.ingest.sidecar import Sidecar, SidecarSource, find_sidecars, read_sidecar
from mm_retriever.ingest.sidecar_columns import IMAGE_NAME, SidecarRow, folded, image_key, listed
from mm_retriever.ingest.sources import Source, items


def match_sidecar(sidecar: SidecarSource | None, source: Source, folder: str | None) -> SidecarMatch:
    """Match a sidecar (None: those in the folder) to the images of a source, if that can be iterated twice."""
    if sidecar is None:
        rows = find_sidecars(folder) if folder is not None else Sidecar({})
    else:
        rows = Sidecar({}) if sidecar is False else read_sidecar(sidecar)
    if not isinstance(source, str | os.PathLike | Sequence):
        return SidecarMatch(rows, None)
    return SidecarMatch(rows, ((item.sidecar_names, item.path) for item in items(source, lambda name, reason: None)))


class SidecarMatch:
    """Finds the row of each image, and knows at the end which rows were not used.

    A row belongs to the image of that path or else, if only one image fits, to the one whose path ends with it, or that
    has that file name, with or without its suffix. Case, Unicode form, backslashes and `./` make no difference there.
    `images` are the names and the path of every image that will be looked up; None if they are not known yet, and then
    a name that fits several images goes to the first.
    """

    def __init__(self, sidecar: Sidecar, images: Iterable[tuple[Sequence[str], str | None]] | None) -> None:
        self._sidecar = sidecar
        self._folded: dict[str, list[str]] = defaultdict(list)
        self._endings: dict[str, list[str]] = defaultdict(list)  # of keys with folders, from the second part on
        for key in sidecar.rows:
            self._folded[folded(key)].append(key)
            parts = folded(key).split("/")
            for start in range(1, len(parts) - 1):
                self._endings["/".join(parts[start:])].append(key)
        self._owners: dict[str, tuple[int, str]] = {}  # row -> how well it fits its image, and that image
        self._shared: set[str] = set()  # rows that fit several images equally well
        self._doubtful: set[str] = set()  # images that several rows fit equally well
        self._used: set[str] = set()
        self._known = images is not None
        if sidecar.rows:
            for names, path in images or ():
                self._claim(names, path)

    def row(self, names: Sequence[str], path: str | None) -> SidecarRow | None:
        """Return the row of an image, by its path below the folder, its file name and its absolute path, if any."""
        if not names or not self._sidecar.rows:
            return None
        if not self._known:
            self._claim(names, path)
        fit, key = self._best(names, path)
        if key is None or self._owners.get(key) != (fit, path or names[0]) or (self._known and key in self._shared):
            return None
        self._used.add(key)
        return self._sidecar.rows[key]

    @property
    def files(self) -> frozenset[str]:
        """Paths of the files that the rows were read from."""
        return self._sidecar.files

    @property
    def has_rows(self) -> bool:
        """Whether there is a sidecar with rows."""
        return bool(self._sidecar.rows)

    @property
    def unused(self) -> list[str]:
        """Names of the rows that belong to no image that was looked up."""
        return [key for key in self._sidecar.rows if key not in self._used]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the file, on rows that fit several images, and on rows that fit none."""
        source, unused = self._sidecar.source, self.unused
        notes = [*self._sidecar.notes]
        if self._shared:
            names = listed(sorted(self._shared))
            notes.append(f"{source}: {names}: several images fit; give their paths below the folder instead")
        if self._doubtful:
            notes.append(f"{source}: {listed(sorted(self._doubtful))}: several rows fit, so none was taken")
        if lost := [key for key in unused if key not in self._shared]:
            notes.append(f"{source}: {len(lost)} of {len(self._sidecar)} rows match no image: {listed(lost)}")
        return tuple(notes)

    def _claim(self, names: Sequence[str], path: str | None) -> None:
        if not names:
            return
        image = path or names[0]
        fit, key = self._best(names, path)
        if key is None:
            if fit >= 0:
                self._doubtful.add(image)
            return
        owner = self._owners.get(key)
        if owner is None or fit < owner[0]:
            self._owners[key] = (fit, image)
            self._shared.discard(key)
        elif fit == owner[0] and image != owner[1]:
            self._shared.add(key)

    def _best(self, names: Sequence[str], path: str | None) -> tuple[int, str | None]:
        """The fit of the best row, 0 is best, and that row; (-1, None) if none fits, (n, None) if several do."""
        for fit, keys in self._candidates(names, path):
            if keys:
                return fit, keys[0] if len(keys) == 1 else None
        return -1, None

    def _candidates(self, names: Sequence[str], path: str | None) -> Iterator[tuple[int, list[str]]]:
        """Yield rows for the image with their fit, the best first."""
        below, name = image_key(names[0]), image_key(names[-1])
        whole = image_key(path) if path is not None else below
        folded_below, folded_name = folded(below), folded(name)
        parts = folded(whole).split("/")
        endings = ["/".join(parts[start:]) for start in range(len(parts) - 1)]
        depth = folded_below.count("/") + 2  # the folder and everything below it
        yield 0, self._exact(below) or self._exact(whole)
        yield 1, self._folded.get(folded_below, [])
        for ending in endings:
            yield 2, self._folded.get(ending, [])
        # A longer path, from another machine, that ends with the folder and what is in it.
        yield 3, self._endings.get("/".join(parts[-depth:]), []) if len(parts) > depth else []
        yield 4, self._exact(name)
        yield 5, self._folded.get(folded_name, [])
        yield 6, self._without_suffix(folded_below)
        for ending in endings:
            yield 7, self._without_suffix(ending)
        yield 8, self._without_suffix(folded_name)

    def _exact(self, key: str) -> list[str]:
        return [key] if key in self._sidecar.rows else []

    def _without_suffix(self, name: str) -> list[str]:
        return [key for key in self._folded.get(posixpath.splitext(name)[0], []) if not IMAGE_NAME.fullmatch(key)]
