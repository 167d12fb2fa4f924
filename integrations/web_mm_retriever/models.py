"""What the JSON API takes and gives, as typed models; the OpenAPI document is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

PAGE = 40
MOST_RESULTS = 200
DEEPEST = 10_000
RERANKED = 9
"""Of the best results, where nobody says how many."""
MOST_RERANKED = 50


Id: TypeAlias = Annotated[str, Field(max_length=512)]
Words: TypeAlias = Annotated[str, Field(max_length=2_000)]  # as long as a text may be
RunState: TypeAlias = Literal["idle", "running", "paused", "stopping", "stopped", "done", "failed"]


class Taken(BaseModel):
    """A request body: what it does not know is refused."""

    model_config = ConfigDict(extra="forbid")


class SearchRequest(Taken):
    """What to search for: text, image, both, or results that were liked."""

    text: str = Field(default="", description="What to look for; with an image: what should be different about it.")
    image: str | None = Field(
        default=None,
        description="upload:ID from /v1/uploads, the id of an indexed image, a data: URI, or a URL where allowed.",
    )
    images: list[str] = Field(default=[], description="Further images; the query is the mean of what it is with each.")
    balance: float = Field(
        default=0.5, description="0: like the image alone; 0.5: the model's own; 1: like the words alone."
    )
    avoid: list[Words] = Field(default=[], description="Words that results should have nothing of.")
    liked: list[Id] = Field(default=[], description="Ids of results to find more of (Rocchio's formula).")
    disliked: list[Id] = Field(default=[], description="Ids of results to find fewer of.")
    filters: Any = Field(
        default=None,
        description='Conditions that all results meet: [{"key": "label", "operator": "==", "value": "mug"}].',
    )
    top_k: int = Field(default=PAGE, ge=1, le=MOST_RESULTS, description="How many results.")
    skip: int = Field(
        default=0, ge=0, le=DEEPEST, description="How many of the best to leave out: those already shown."
    )
    unique: bool = Field(
        default=True, description="Of copies of one file only the best, which says how many others there are."
    )
    hybrid: bool = Field(
        default=False, description="Search by the words of the text too, where there is an index of them."
    )
    exclude_image: bool | None = Field(
        default=None,
        description="Leave out the query image itself; by default where a text says what should be different.",
    )


class Result(BaseModel):
    """One result."""

    rank: int
    id: str
    score: float | None = None
    label: str = ""
    text: str = ""
    reason: str = ""
    note: str = Field(default="", description="Why something is missing.")
    copies: int = Field(default=0, description="How many copies of this file were left out.")
    metadata: dict[str, Any] = {}
    thumbnail: str = Field(description="URL of a small JPEG, relative to the page.")
    original: str = Field(description="URL of the file as it was indexed, relative to the page.")


class SearchAnswer(BaseModel):
    """What was found, best first."""

    query: str
    results: list[Result]
    hint: str = ""
    note: str = ""
    next: int | None = Field(default=None, description="`skip` of the next page; null: there is none.")
    seconds: float = Field(description="How long the server worked on it.")


class RerankRequest(Taken):
    """Results to rank by the server's reranker; it sees the text and the image, and nothing else of the query."""

    text: str = Field(default="", description="The words of the query.")
    image: str | None = Field(default=None, description="The image of the query, as of a search.")
    ids: list[Id] = Field(description="Of the results, best first.", min_length=1, max_length=MOST_RERANKED)
    scores: list[float | None] = Field(
        default=[], description="Of the results, for a reranker that is fused with retrieval."
    )


class RerankedResult(BaseModel):
    """One result in its new place."""

    id: str
    score: float | None = Field(
        default=None, description="What the model gave it; null: it gives none, or did not judge it."
    )
    reason: str = Field(default="", description="In the model's words.")
    note: str = Field(default="", description="Why it was not judged.")


class RerankEvent(BaseModel):
    """A line of the answer, sent as it happens; closing the connection stops the model."""

    event: Literal["waiting", "running", "done", "failed"] = Field(
        description="waiting: for other users' rankings; failed: the order stays as it was."
    )
    expected_seconds: float | None = Field(
        default=None, description="How long it takes by what this server measured; null: it has measured none yet."
    )
    seconds: float = Field(default=0, description="How long the model has worked on it.")
    passes: int = Field(default=0, description="Runs of the model so far.")
    results: list[RerankedResult] = []
    error: str = ""


class RateRequest(Taken):
    """Whether a result answers a query of words, of an image, or of both."""

    text: str = Field(default="", description="The words of the query.")
    image: str | None = Field(default=None, description="The image of the query, as of a search.")
    id: str = Field(description="Of the result.")
    rating: Literal["up", "down", "none"] = Field(description="Right, wrong, or taken back.")


class RatingsState(BaseModel):
    """What is kept of ratings, and where."""

    queries: int = Field(description="In the file: those with a right result.")
    waiting: int = Field(description="Queries that were rated without a right result; the server forgets them.")
    place: str = Field(description="The file; to others than the server's own user, its name.")
    download: bool = Field(description="Whether /v1/ratings gives the file, which names where images lie.")


class Draft(BaseModel):
    """A query that a model wrote and nobody has reviewed."""

    id: str = Field(description="Of the line as it is in the file.")
    text: str
    note: str = Field(description="Who wrote it.")
    image: bool = Field(description="Whether it has a query image: place 0 of /v1/review/image.")
    targets: int = Field(description="How many right images it has: places 1, 2, ...")


class ReviewState(BaseModel):
    """What is left to review, and the draft that comes next."""

    place: str = Field(description="Name of the file.")
    queries: int = Field(description="In the file.")
    left: int = Field(description="Of them, not reviewed.")
    draft: Draft | None = Field(default=None, description="null: all are reviewed.")


class ReviewRequest(Taken):
    """A verdict on a draft."""

    id: str
    verdict: Literal["keep", "drop"] = Field(description="keep: with these words; drop: the line goes.")
    text: Words = Field(default="", description="The words, as they were or corrected.")
    after: str = Field(default="", description="The draft after which the next one is shown: the last put off.")


class FolderName(BaseModel):
    """A folder that may be indexed."""

    at: str
    name: str


class FolderNames(BaseModel):
    """A folder that may be indexed, and those in it."""

    at: str = Field(default="", description="What to give as `folder`; empty: above all that may be indexed.")
    name: str = ""
    above: str | None = Field(
        default=None, description="`at` of the folder that it lies in; null: none that may be looked at."
    )
    folders: list[FolderName]
    left_out: int = Field(default=0, description="How many more there are.")


class IndexRequest(Taken):
    """A folder to index: what is new or changed in it is embedded and stored."""

    folder: str = Field(description="`at` of a folder of /v1/folders.")
    prune: bool = Field(default=False, description="Also remove the rows of images whose files are gone.")
    force: bool = Field(
        default=False, description="With prune: also where more than a fifth would go, or a drive is missing."
    )


class SkippedImage(BaseModel):
    """An image that is not stored."""

    path: str = Field(description="Below the folder.")
    reason: str


class IgnoredFiles(BaseModel):
    """Files of one type that are no images."""

    kind: str
    count: int
    reason: str


class IndexingState(BaseModel):
    """The run of indexing that is under way, or the last one."""

    state: RunState
    folder: str = ""
    done: int = 0
    total: int | None = Field(default=None, description="null: the images are still being counted.")
    images_per_second: float | None = Field(default=None, description="Of the last half minute; null: not known yet.")
    seconds_left: float | None = Field(default=None, description="null: not known yet.")
    seconds: float = 0
    counts: dict[str, int] = Field(
        default={}, description="At the end: indexed, replaced, unchanged, removed, skipped, ..."
    )
    skipped: list[SkippedImage] = Field(default=[], description="The first of them.")
    ignored: list[IgnoredFiles] = []
    notes: list[str] = []
    error: str = ""


class RowsRequest(Taken):
    """`mm-retriever search`, as the command line asks it of a server."""

    text: str | None = None
    image: str | None = Field(
        default=None, description="A data: URI; of the user who runs the server also an absolute path or a URL."
    )
    images: list[str] = Field([], max_length=64, description="Further images; the query is the mean with each.")
    where: list[str] = []
    top_k: int = Field(9, ge=1, le=16_384)
    min_score: float | None = None
    hybrid: bool = False
    each_once: bool = False
    group_by: str | None = None
    exclude_query: bool = False


class RowsAnswer(BaseModel):
    """The rows that `mm-retriever search --json` prints, and what it says on stderr.

    Where files lie is told to nobody but the user who runs the server.
    """

    rows: list[dict[str, Any]]
    notes: list[str] = []


class Upload(BaseModel):
    """An image that the server keeps for a while."""

    image: str = Field(description="What to give as `image` of a search.")
    width: int
    height: int


class FacetsRequest(Taken):
    """Which rows to count."""

    filters: Any = None


class FacetValue(BaseModel):
    """One value of a column."""

    value: str | float | int | bool
    count: int


class Facet(BaseModel):
    """A column to choose from: its most frequent values, or the range of its numbers."""

    key: str
    values: list[FacetValue] = []
    least: float | None = None
    most: float | None = None
    count: int = Field(description="How many of the counted rows have it.")


class FacetsAnswer(BaseModel):
    """Columns with counts."""

    facets: list[Facet]
    rows: int = Field(description="How many rows were counted.")
    complete: bool = Field(description="Whether these are all that match; counting ends at a limit.")


class Info(BaseModel):
    """What this server has and can do."""

    version: str
    model: str
    dimension: int
    rows: int
    hybrid: bool
    rerank: str | None = Field(default=None, description="The model that ranks results on demand; null: there is none.")
    rerank_count: int = Field(default=RERANKED, description="How many results the page lets it rank.")
    rerank_seconds: float | None = Field(
        default=None, description="Seconds for one result, as they were measured last; null: nothing was ranked yet."
    )
    ratings: RatingsState | None = Field(default=None, description="null: ratings are not kept.")
    indexing: bool = Field(default=False, description="Whether folders may be indexed here.")
    review: bool = Field(default=False, description="Whether drafted queries may be reviewed here.")
    shows_folders: bool = Field(
        default=False, description="Whether /v1/reveal opens the folder of a file, on this machine."
    )
    urls: bool = Field(description="Whether images may be named by URL.")
    draws_only: bool = Field(description="The model knows drawn products only: it was made for tests and demos.")


class RevealRequest(Taken):
    """An image whose folder is to be opened on the server's machine."""

    id: str


class Nothing(Taken):
    """Nothing needs to be said."""


class Done(BaseModel):
    """It was done."""


class SignIn(Taken):
    """The token of the server, for a page that keeps it as a cookie."""

    token: str = Field(max_length=512)


class Problem(BaseModel):
    """Why a request was refused, and what to do."""

    error: str
