"""``mm-retriever search``: text, image or both, with or without reranking."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_retriever.cli import held_model, options
from mm_retriever.errors import QueryError, one_line

if TYPE_CHECKING:
    from mm_retriever.running import Note


def search(
    text: Annotated[str | None, typer.Option("--text", "-t", help="What to look for, or what to change.")] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            "-i",
            help="An image to look for, or to start from: a file, a URL or a data URI.",
            callback=options.home,
        ),
    ] = None,
    db: options.Db = "photos.db",
    model: options.HeldModel = None,
    model_url: options.ModelUrl = None,
    model_key: options.ModelKey = None,
    collection: options.Collection = "mm_retriever",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=16_384, help="How many results.")] = 9,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="What a result must be: label=shoes, year>2020, taken>=2024-01-31, 'label in mug, cup', "
            "'caption contains red', 'price is empty'; repeat for more."
        ),
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out results below this similarity (-1 to 1).")] = None,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Search by words too, in a store of `index --hybrid`; scores tell ranks.")
    ] = False,
    each_once: Annotated[
        bool, typer.Option("--each-once", help="Show copies of one file once; the next results take their places.")
    ] = False,
    per_item: Annotated[
        bool,
        typer.Option("--per-item", help="Only the best image of each item (column `item`); --top-k counts items."),
    ] = False,
    exclude_query: Annotated[bool, typer.Option("--exclude-query", help="Leave out the query image itself.")] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Let a vision model rank the results and say why.")] = False,
    rerank_model: Annotated[
        str | None,
        typer.Option(
            help="Default: Phi-3.5 Vision; `tiny` if that is the --model.", autocompletion=options.reranker_names
        ),
    ] = None,
    rerank_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server that runs the model that reranks.")
    ] = None,
    rerank_api: Annotated[
        str | None,
        typer.Option(help="What the server is asked: chat (a vision LLM), rerank or score (a reranking model)."),
    ] = None,
    rerank_key: Annotated[
        str | None,
        typer.Option(
            envvar="MM_RETRIEVER_RERANK_KEY", help="The key that the server of --rerank-url wants.", show_envvar=True
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of the results.", callback=options.home)] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write a numbered sheet of the results.", callback=options.home)
    ] = None,
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
    """Search by text, by image, or by both: `--text "phone case with this" --image leopard.jpg`."""
    from mm_retriever.own_keys import ITEM_KEY

    if not (text and text.strip()) and image is None:
        raise QueryError("nothing to search for: give --text, --image, or both")
    asked: dict[str, Any] = {"text": text, "image": image, "where": where or [], "top_k": top_k, "min_score": min_score}
    asked |= {"hybrid": hybrid, "each_once": each_once, "exclude_query": exclude_query}
    asked["group_by"] = ITEM_KEY if per_item else None
    server = options.served_by(rerank_url, rerank_api, rerank_key, "rerank")
    reranks = bool(rerank or rerank_url or rerank_model)
    if via is not None and reranks:
        raise QueryError("--via goes without --rerank: the server ranks results on its own page")
    rows = _via(via, asked, http_token) if via is not None else None
    if via is None and not reranks and not (device or dtype or backend or revision or model_url):
        rows = _of_running_server(db, collection, model, asked)
    if rows is not None:
        from mm_retriever.terminal import print_json, print_search, rows_report, write_search

        if as_json:
            print_json(rows)
        if not as_json or html or png:
            report = rows_report(text, image, rows)
            if not as_json:
                print_search(report)
            write_search(report, html=html, png=png, quiet=as_json)
        return

    from mm_retriever.search_tools.rows import RowsQuery, find_rows, result_rows, where_filters
    from mm_retriever.store import check_exists, open_store
    from mm_retriever.terminal import print_json, print_search, search_report, write_search

    where_filters(asked["where"])  # what cannot be read is refused before a model is loaded
    check_exists(db)
    load_ranker = None
    wanted = held_model.model_to_load(model, dtype, backend, url=model_url, db=db, collection=collection, token=token)
    if reranks:
        load_ranker = options.reranker(wanted.name, rerank_model, server, top_n=top_k, device=device)
    embedding = options.embed_model(
        wanted.name,
        device=device,
        dtype=wanted.dtype,
        backend=wanted.backend,
        revision=revision,
        url=model_url,
        key=model_key,
    )
    with open_store(db, embedding, collection=collection, token=token, create=False) as store:
        found = find_rows(store, embedding, RowsQuery(**{**asked, "where": tuple(asked["where"])}))
    _say(found.notes)
    reranking = None if load_ranker is None else load_ranker().rerank(found.nodes, found.query)
    report = search_report(text, found.query.image_path, found.nodes, reranking=reranking)
    if as_json:
        print_json(result_rows(found.nodes if reranking is None else reranking.nodes))
    else:
        print_search(report)
    write_search(report, html=html, png=png, quiet=as_json)


def _say(notes: Any) -> None:
    for note in notes:
        typer.echo(one_line(note), err=True)


def _of_running_server(
    db: str, collection: str, model: str | None, asked: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """The rows that a running server of the same file finds; None: there is none, or it is gone, which is said."""
    from mm_retriever.running import NoServerError, ask_note, read_note

    note = read_note(Path(db)) if sys.platform != "win32" else None
    if note is None or not _serves(note, collection, model):
        return None
    try:
        answer = ask_note(note, "/v1/rows", {**asked, "image": _absolute(asked["image"])})
    except NoServerError as error:
        typer.echo(f"searching without a server: {one_line(error)}", err=True)
        return None
    _say(answer.get("notes", ()))
    rows: list[dict[str, Any]] = answer["rows"]
    return rows


def _serves(note: Note, collection: str, model: str | None) -> bool:
    return note.collection == collection and model in (note.model, None)


def _absolute(image: str | None) -> str | None:
    """The path of an image as a server understands it, which runs elsewhere; URLs and data URIs stay."""
    return os.path.abspath(image) if image and Path(image).exists() else image  # noqa: PTH100


def _via(url: str, asked: dict[str, Any], token: str | None) -> list[dict[str, Any]]:
    """The rows that a server at a URL finds, which tells nothing about where its files lie."""
    from mm_retriever.running import NoServerError, ask_url

    if asked["min_score"] is not None or asked["where"] or asked["group_by"]:
        raise QueryError("--via goes without --min-score, --where and --per-item")
    image = asked["image"]
    request: dict[str, Any] = {"text": asked["text"] or "", "top_k": asked["top_k"], "hybrid": asked["hybrid"]}
    request |= {"unique": asked["each_once"], "exclude_image": asked["exclude_query"], "image": _data_uri(image)}
    try:
        answer = ask_url(url, "/v1/search", request, token)
    except NoServerError as error:
        raise QueryError(f"--via {url!r}: {one_line(error)}") from error
    _say([answer["note"]] if answer.get("note") else ())
    kept = ("rank", "id", "score", "text", "label")
    return [{key: row[key] for key in kept if row.get(key)} | row["metadata"] for row in answer["results"]]


def _data_uri(image: str | None) -> str | None:
    """The bytes of an image as text, for a server that cannot read this machine's files."""
    if image is None or not Path(image).is_file():
        return image
    import base64

    return f"data:image/unknown;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
