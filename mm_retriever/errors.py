"""The error tree: everything this package raises on purpose, and nothing else.

Every class also inherits the builtin it specialises, so that code that has never heard of this package
(``except ValueError``, ``except ConnectionError``) does the right thing.

    MMRetrieverError
    ├── ImageLoadError          (ValueError)       an image that cannot or must not be read
    ├── CheckpointError         (ValueError)       weights that are missing, wrong, damaged or unsafe
    │   └── ModelNotFoundError  (FileNotFoundError) a name that leads to no file, or a hub out of reach
    ├── QueryError              (ValueError)       a query that cannot be asked: empty, mixed up, out of range
    ├── FilterError             (ValueError)       a metadata filter that cannot be expressed safely
    ├── PromptError             (ValueError)       images and text that do not fit together in one prompt
    ├── RerankError             (RuntimeError)     a ranking that could not be obtained
    ├── ModelServerError        (ConnectionError)  a server of models that gave no answer, or one that cannot be used
    ├── IngestError             (ValueError)       a source or sidecar that cannot be ingested
    │   └── ReindexError        (ValueError)       a collection whose model was not changed
    ├── CopyError               (TypeError)        an object that cannot be taken to another process
    ├── VectorCacheError        (OSError)          a cache file of vectors that cannot be used
    ├── StoreError              (RuntimeError)     the vector store refused
    │   ├── NodeError           (ValueError)       a node that cannot be stored as it is
    │   ├── StoreMismatchError  (ValueError)       a collection made by another model, dimension or metric
    │   ├── StoreDamagedError                      what is stored is not what was stored there: bit rot, a cut file
    │   ├── StoreLockedError    (BlockingIOError)  another process holds the Milvus Lite file
    │   └── StoreUnavailableError (ConnectionError) no answer from the server in time
    └── MissingExtraError       (ImportError)      an optional dependency; the message names the extra

A message says what was given, what is accepted, and what to do; `shown` writes what was given, whatever it is, and
`one_line` makes untrusted text safe to show.
"""

from __future__ import annotations

import reprlib
import unicodedata
from importlib.util import find_spec

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def shown(value: object) -> str:
    """Return a value for a message: at most a few hundred characters, however large or deep untrusted input made it."""
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, a __repr__ without end
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 300 else text[:297] + "..."


_INVISIBLE = ("Cf", "Cn", "Co")  # zero-width, direction and tag characters; what Unicode has not assigned


def one_line(text: object, most: int = 2_000) -> str:
    """Return text on one line, cut to `most` characters, that commands no terminal and hides no words.

    Control characters become spaces; characters that cannot be seen, or that turn the order of the text round, go; half
    a surrogate pair becomes U+FFFD.
    """
    start = str(text)[: 16 * most]  # untrusted text may have millions
    words = "".join(_visible(character) for character in start) if not start.isprintable() else start
    line = " ".join(words.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def reason_of(error: BaseException, most: int = 300) -> str:
    """Return what an error says on one line; its class comes first where it is not one of ours."""
    text = one_line(error, most)
    if isinstance(error, MMRetrieverError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    return "" if category in _INVISIBLE else " "


class MMRetrieverError(Exception):
    """Root of every error this package raises on purpose."""


class ImageLoadError(MMRetrieverError, ValueError):
    """An image that cannot or must not be read: the message names the source and the reason."""

    reason: str = ""  # alone, for lists that name the source themselves


class CheckpointError(MMRetrieverError, ValueError):
    """Weights that are missing keys, have keys too many, are damaged, or would run code."""


class ModelNotFoundError(CheckpointError, FileNotFoundError):
    """A model name that leads to no file, or a hub that cannot be reached."""

    __str__ = Exception.__str__  # OSError formats by errno; these messages are plain


class QueryError(MMRetrieverError, ValueError):
    """A query that cannot be asked: no text and no image, or a number out of range."""


class FilterError(MMRetrieverError, ValueError):
    """A metadata filter that cannot be expressed without changing its meaning."""


class PromptError(MMRetrieverError, ValueError):
    """Images and text that do not fit together in one prompt."""


class RerankError(MMRetrieverError, RuntimeError):
    """A ranking that could not be obtained."""


class ModelServerError(MMRetrieverError, ConnectionError):
    """A server of models that gave no answer, or one that cannot be used."""

    passing: bool = (
        False  # out of reach, overloaded or broken, however often it was asked: nothing else will fare better
    )

    __str__ = Exception.__str__


class IngestError(MMRetrieverError, ValueError):
    """A source or sidecar file that cannot be ingested at all."""


class ReindexError(IngestError):
    """A collection whose model was not changed; it is as it was.

    Attributes:
        unreadable: rows that cannot be embedded anew: image or id, and the reason.
    """

    unreadable: tuple[tuple[str, str], ...] = ()


class CopyError(MMRetrieverError, TypeError):
    """An object that cannot be pickled or described by a dict as the whole that it is."""


class VectorCacheError(MMRetrieverError, OSError):
    """A cache file of vectors that cannot be opened, read or written."""

    __str__ = Exception.__str__


class StoreError(MMRetrieverError, RuntimeError):
    """The vector store refused a request."""


class NodeError(StoreError, ValueError):
    """A node that cannot be stored as it is: no vector, a wrong one, or metadata that Milvus cannot hold."""


class StoreMismatchError(StoreError, ValueError):
    """An existing collection was made by another model, dimension or metric."""


class StoreDamagedError(StoreError):
    """What a store holds is not what was stored there: bit rot, a file that is cut short, or another program."""


class StoreLockedError(StoreError, BlockingIOError):
    """Another process holds the Milvus Lite file."""

    __str__ = Exception.__str__


class StoreUnavailableError(StoreError, ConnectionError):
    """The server gave no answer in time."""

    __str__ = Exception.__str__


class MissingExtraError(MMRetrieverError, ImportError):
    """An optional dependency is not installed; the message has the exact ``pip install``."""

    @classmethod
    def check(cls, module: str, extra: str) -> None:
        """Refuse to begin work that a top-level module is missing for; loads nothing."""
        if find_spec(module) is None:
            raise cls.of(ModuleNotFoundError(name=module), module.replace("_", "-"), extra)

    @classmethod
    def of(cls, error: ImportError, package: str, extra: str) -> MissingExtraError:
        """Say whether a package is not there, or is there and does not load, as beside a newer one it does not know."""
        named = (error.name or "").replace("_", "-").replace(".", "-")
        if isinstance(error, ModuleNotFoundError) and named == package:
            return cls(f'{package} is not installed: pip install "mm-retriever[{extra}]"')
        return cls(f'{package} does not load ({error}): pip install "mm-retriever[{extra}]"')
