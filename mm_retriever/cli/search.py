"""``mm-retriever search``: text, image or both, with or without reranking."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_retriever.cli import options
from mm_retriever.errors import QueryError, one_line

if TYPE_CHECKING:
    from PIL import Image

    from mm_retriever.running import Note

EXAMPLES = (
    '[bold]mm-retriever search "a red dress"[/bold]\n\n'
    '[bold]mm-retriever search "the same in red" -i shoe.jpg --html results.html[/bold]\n\n'
    '[bold]mm-retriever search -i shoe.jpg --where "price<50" --where "label in boots, shoes"[/bold]\n\n'
    "[bold]curl -s https://example.org/a.jpg | mm-retriever search -i -[/bold]\n\n"
    '[bold]mm-retriever search "beach" -0 | xargs -0 cp -t album/[/bold]'
)
_query, _result, _output = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("What to look for", "Which results", "Output")
)


def search(
    words: Annotated[list[str] | None, typer.Argument(help="The same as --text, without the option.")] = None,
    text: Annotated[str | None, _query("--text", "-t", help="What to look for, or what to change.")] = None,
    image: Annotated[
        list[str] | None,
        _query(
            "--image",
            "-i",
            help="An image to look for, or to start from: a file, a URL, a data URI, or - for stdin; repeat for more "
            "(the query is the mean of what it is with each).",
            callback=options.home,
        ),
    ] = None,
    db: options.Db = "photos.db",
    model: options.HeldModel = None,
    model_url: options.ModelUrl = None,
    model_key: options.ModelKey = None,
    collection: options.Collection = "mm_retriever",
    top_k: Annotated[int, _result("--top-k", "-k", min=1, max=16_384, help="How many results.")] = 9,
    where: Annotated[
        list[str] | None,
        _result(
            help="What a result must be: label=shoes, year>2020, taken>=2024-01-31, 'label in mug, cup', "
            "'caption contains red', 'price is empty'; repeat for more."
        ),
    ] = None,
    min_score: Annotated[float | None, _result(help="Leave out results below this similarity (-1 to 1).")] = None,
    hybrid: Annotated[
        bool, _result("--hybrid", help="Search by words too, in a store of `index --hybrid`; scores tell ranks.")
    ] = False,
    each_once: Annotated[
        bool, _result("--each-once", help="Show copies of one file once; the next results take their places.")
    ] = False,
    per_item: Annotated[
        bool, _result("--per-item", help="Only the best image of each item (column `item`); --top-k counts items.")
    ] = False,
    exclude_query: Annotated[bool, _result("--exclude-query", help="Leave out the query image itself.")] = False,
    rerank: Annotated[
        bool, options.reranking("--rerank", help="Let a vision model rank the results and say why.")
    ] = False,
    rerank_model: Annotated[
        str | None,
        options.reranking(
            help="Default: Phi-3.5 Vision; `tiny` if that is the --model.", autocompletion=options.reranker_names
        ),
    ] = None,
    rerank_url: options.RerankUrl = None,
    rerank_api: options.RerankApi = None,
    rerank_key: options.RerankKey = None,
    as_json: Annotated[bool, _output("--json", help="Print the results as JSON.")] = False,
    paths: Annotated[bool, _output("--paths", help="Print the paths of the results, one a line.")] = False,
    null: Annotated[bool, _output("--null", "-0", help="The same, each ended by a NUL byte: for xargs -0.")] = False,
    html: Annotated[Path | None, _output(help="Write a page of the results.", callback=options.home)] = None,
    png: Annotated[Path | None, _output(help="Write a numbered sheet of the results.", callback=options.home)] = None,
    via: Annotated[
        str | None,
        typer.Option(help="Ask the `mm-retriever serve` at this URL. Default: the one that serves --db, if any does."),
    ] = None,
    http_token: Annotated[
        str | None, typer.Option(envvar="MM_RETRIEVER_HTTP_TOKEN", help="With --via: its token.", show_envvar=True)
    ] = None,
    token: options.Token = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    revision: options.Revision = None,
) -> None:
    """Search by words, by image, or by both: `mm-retriever search "phone case with this" --image leopard.jpg`."""
    from mm_retriever.own_keys import ITEM_KEY

    text, images = _words(words, text), image or []
    if not (text and text.strip()) and not images:
        raise QueryError("nothing to search for: give words, --image, or both")
    server = options.served_by(rerank_url, rerank_api, rerank_key, "rerank")
    reranks = bool(rerank or rerank_url or rerank_model)
    if as_json and (paths or null):
        raise QueryError("--json and --paths exclude each other: choose one")
    options.check_places({"--html": html, "--png": png})
    if reranks and (via is not None or len(images) > 1):
        way = "--via" if via is not None else "several --image"
        why = "ranks results on its own page" if via is not None else "sees one image of the query"
        raise QueryError(
            f"{way} goes without --rerank: the {'server' if via is not None else 'model that ranks'} {why}"
        )
    local = {"--paths": paths, "-0": null, "--html": html, "--png": png}
    if via is not None and (given := [option for option, value in local.items() if value]):
        raise QueryError(f"--via goes without {given[0]}: the images are on the server, which tells nobody else where")
    images = _with_stdin(images)
    request: dict[str, Any] = {"text": text, "image": images[0] if images else None, "where": where or []}
    request |= {"top_k": top_k, "min_score": min_score, "hybrid": hybrid, "each_once": each_once}
    request |= {"exclude_query": exclude_query, "group_by": ITEM_KEY if per_item else None}
    if images[1:]:
        request["images"] = images[1:]
    rows = _via(via, request, http_token) if via is not None else None
    if via is None and not reranks and not (device or dtype or backend or revision or model_url):
        rows = _of_running_server(db, collection, model, request)
    shown: dict[str, Any] = {"as_json": as_json, "paths": paths, "null": null, "html": html, "png": png}
    if rows is not None:
        from mm_retriever.terminal import rows_report, show_rows

        show_rows(rows, partial(rows_report, text, request["image"], rows), **shown)
        return

    from mm_retriever.embedders.aside import model_aside

    # a reranker computes in this process, and a server elsewhere
    with nullcontext() if reranks or model_url else model_aside() as aside:
        from mm_retriever.search_tools.rows import RowsQuery, check_rows, find_rows, result_rows
        from mm_retriever.store import check_exists, open_store, open_stored
        from mm_retriever.store.conditions import where_filters
        from mm_retriever.terminal import search_report, show_rows

        query = RowsQuery(**{**request, "where": tuple(request["where"]), "images": tuple(images[1:])})
        where_filters(query.where)  # refuses unreadable conditions before a store is opened
        check_exists(db)
        load_ranker = None
        # open until the end of the search, so that a Milvus Lite file is checked and read only once
        with open_stored(db, collection=collection, token=token) as stored:
            check_rows(stored, query)  # refuses unanswerable searches before a model is loaded
            carried, opened = _opened(images)
            query = replace(query, image=carried[0] if carried else None, images=tuple(carried[1:]))
            wanted = options.model_to_load(
                model, dtype, backend, url=model_url, db=db, collection=collection, token=token
            )
            if reranks:
                load_ranker = options.reranker(wanted.name, rerank_model, server, top_n=top_k, device=device)
            embedding = options.embed_model(
                **wanted._asdict(),
                device=device,
                revision=revision,
                url=model_url,
                key=model_key,
                aside=aside,
            )
            with open_store(db, embedding, collection=collection, token=token, create=False) as store:
                rows_found = find_rows(store, embedding, query, opened=opened)
    _print_notes(rows_found.notes)
    reranking = None
    if load_ranker is not None:
        reranking = load_ranker().rerank(rows_found.nodes, rows_found.query, query_image=opened[0] if opened else None)
    nodes = rows_found.nodes if reranking is None else reranking.nodes
    show_rows(
        result_rows(nodes),
        lambda: search_report(text, rows_found.query.image_path, rows_found.nodes, reranking=reranking),
        **shown,
    )


def _words(words: list[str] | None, text: str | None) -> str | None:
    """The text of the query, from the argument or the option."""
    if not words:
        return text
    if text is not None:
        raise QueryError(f"{' '.join(words)!r} and --text {text!r}: give the words once")
    return " ".join(words)


def _with_stdin(images: list[str]) -> list[str]:
    """The images, with the bytes of stdin as a data URI in place of "-"."""
    if "-" not in images:
        return images
    if images.count("-") > 1:
        raise QueryError("--image - is given twice: stdin holds one image")
    from mm_retriever.images import DEFAULT_POLICY, ImageDataURI, portable_image

    if sys.stdin.isatty():
        raise QueryError("--image -: stdin is a terminal; pipe an image into it")
    data = sys.stdin.buffer.read(DEFAULT_POLICY.max_bytes + 1)
    if not data:
        raise QueryError("--image -: stdin is empty; pipe an image into it")
    uri = ImageDataURI(portable_image(data), "the image on stdin")
    return [uri if image == "-" else image for image in images]


def _opened(images: list[str]) -> tuple[list[str], list[Image.Image]]:
    """Each image as a path or data URI, and decoded once for the model and the reranker."""
    if not images:
        return [], []
    from mm_retriever.images import ImagePolicy, load_image, portable_image

    policy = ImagePolicy(allow_urls=True)  # a URL that the user typed is to be fetched
    carried = [portable_image(image, policy=policy) for image in images]
    return carried, [load_image(image, policy=policy, keep_mode=True) for image in carried]


def _print_notes(notes: Any) -> None:
    for note in notes:
        typer.echo(one_line(note), err=True)


def _of_running_server(
    db: str, collection: str, model: str | None, request: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """The rows from a running server of the same file; None if there is none, or it ended, which is printed."""
    from mm_retriever.running import NoServerError, ask_note, read_note

    note = read_note(Path(options.home(db))) if sys.platform != "win32" else None
    if note is None or not _serves(note, collection, model):
        return None
    try:
        return _rows(ask_note(note, "/v1/rows", _placed(request, _absolute)))
    except NoServerError as error:
        typer.echo(f"searching without a server: {one_line(error)}", err=True)
        return None


def _placed(request: dict[str, Any], place: Callable[[str | None], str | None]) -> dict[str, Any]:
    """The request, with each image in the form of `place`."""
    more = {"images": [place(image) for image in request["images"]]} if "images" in request else {}
    return {**request, "image": place(request["image"]), **more}


def _rows(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a server's answer; prints its notes."""
    _print_notes(answer.get("notes", ()))
    rows: list[dict[str, Any]] = answer["rows"]
    return rows


def _serves(note: Note, collection: str, model: str | None) -> bool:
    return note.collection == collection and model in (note.model, None)


def _absolute(image: str | None) -> str | None:
    """The absolute path of an image, for a server with another working directory; URLs and data URIs stay."""
    # not Path's methods, which raise an error for a data URI, because it is too long for a name
    return os.path.abspath(image) if image and os.path.exists(image) else image  # noqa: PTH100, PTH110


def _via(url: str, request: dict[str, Any], token: str | None) -> list[dict[str, Any]]:
    """The rows from a server at a URL, which does not tell where its files lie."""
    from mm_retriever.running import NoServerError, ask_url

    body = _placed(request, _data_uri)
    try:
        return _rows(ask_url(url, "/v1/rows", body, token))
    except NoServerError as error:
        raise QueryError(f"--via {url!r}: {one_line(error)}") from error


def _data_uri(image: str | None) -> str | None:
    """An image as a data URI, read here: the server cannot read files of this machine, or URLs that only it reaches."""
    if image is None or image[:5].lower() == "data:":
        return image
    from mm_retriever.images import ImagePolicy, portable_image, read_image_bytes

    return str(portable_image(read_image_bytes(image, policy=ImagePolicy(allow_urls=True))))
