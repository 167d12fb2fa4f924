"""The command line: ``mm-retriever index | search | prune | remove | clear | embed | import | ...``.

Owns commands, options and exit codes; every piece of work is a call into the package, imported inside the command,
so that ``--help`` answers at once, and what a command shows is `mm_retriever.terminal`'s. Errors of the package are
one line on stderr and exit code 2.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mm_retriever import __version__
from mm_retriever.errors import FilterError, MMRetrieverError, QueryError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_index.core.vector_stores import MetadataFilters

    from mm_retriever.demo import DemoQuery
    from mm_retriever.embedding import VisualizedBGEEmbedding
    from mm_retriever.rerank.reranker import Reranker
    from mm_retriever.store import ImageStore, Verification

REAL_MODEL = "BAAI/bge-visualized-base-en-v1.5"
VISION_MODEL = "microsoft/Phi-3.5-vision-instruct"
TINY_FUSION = 0.3
"""Weight of the retrieval score beside the small reranker's, chosen on seen compositions (its model card)."""
EXIT_INCOMPLETE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_KEPT = "their files cannot be looked at now, so nobody knows whether they are gone; run it again when they can"


def _home(path: Any) -> Any:
    """A path option, with the "~" that no shell replaced: clients that start commands from JSON have none."""
    if path is None:
        return None
    if isinstance(path, list | tuple):
        return [_home(one) for one in path]
    if isinstance(path, str):
        return os.path.expanduser(path)  # noqa: PTH111 - may be a URL
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise QueryError(f"{str(path)!r}: {error}") from error


app = typer.Typer(
    help="Search pictures by text, by picture, or by both at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Db = Annotated[str, typer.Option(help="A Milvus Lite file (photos.db) or the URI of a Milvus server.")]
Collection = Annotated[str, typer.Option(help="The collection in the store.")]
Token = Annotated[
    str | None,
    typer.Option(envvar="MM_RETRIEVER_TOKEN", help="The server's token, or user:password.", show_envvar=True),
]
Model = Annotated[str, typer.Option(help="A published name, a local folder or file, or `tiny` (drawn products only).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: float32.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Prune also where more than a fifth would go, or a drive seems to be missing."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]

Sidecar = Annotated[
    Path | None,
    typer.Option(
        help="JSON, JSONL, CSV or TSV with columns for each image. Default: metadata.jsonl and .csv in the folder.",
        callback=_home,
    ),
]
NoSidecar = Annotated[bool, typer.Option("--no-sidecar", help="Take no columns from files in the folder.")]
NoExif = Annotated[bool, typer.Option("--no-exif", help="Do not store date, camera and place of photographs.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"mm-retriever {__version__}")
        raise typer.Exit


@app.command()
def index(
    source: Annotated[Path, typer.Argument(help="A folder of pictures (read recursively).", callback=_home)],
    db: Db = "photos.db",
    model: Model = REAL_MODEL,
    collection: Collection = "mm_retriever",
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Pictures embedded at a time.")] = 32,
    prune: Annotated[bool, typer.Option("--prune", help="Also remove images whose files are gone.")] = False,
    force: Force = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file, whatever its size and times say.")] = False,
    sidecar: Sidecar = None,
    no_sidecar: NoSidecar = False,
    drop_columns: Annotated[
        bool, typer.Option("--drop-columns", help="Remove the columns and captions that this run does not give.")
    ] = False,
    no_exif: NoExif = False,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Index the words beside pictures too (BM25); in a new collection only.")
    ] = False,
    analyzer: Annotated[
        str | None,
        typer.Option(
            help="With --hybrid: how words are found: mixed (any language; the default of new collections) or standard "
            "(only languages with spaces between words)."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write what was skipped, and why, to this JSON file.", callback=_home)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    token: Token = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Put a folder of pictures into the store. Run it again at any time: only what changed is embedded."""
    from mm_retriever.ingest import ingest_images
    from mm_retriever.terminal import print_ingestion, print_json

    if analyzer is not None and not hybrid:
        raise QueryError(f"--analyzer {analyzer} goes with --hybrid: without it no words are indexed")
    embed_model = _embed_model(model, device=device, dtype=dtype, revision=revision, batch_size=batch_size)
    with _opened(db, embed_model, collection=collection, token=token, hybrid=hybrid, analyzer=analyzer) as store:
        result = ingest_images(
            source,
            store,
            embed_model,
            batch_size=batch_size,
            prune=prune,
            sidecar=_sidecar(sidecar, no_sidecar=no_sidecar),
            drop_columns=drop_columns,
            exif=not no_exif,
            force=force,
            verify=verify,
            report_path=report,
            show_progress=not as_json,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_ingestion(result)
    if result.kept:
        _fail(f"{result.kept} rows were kept: {_KEPT}", EXIT_INCOMPLETE)


@app.command()
def search(
    text: Annotated[str | None, typer.Option("--text", "-t", help="What to look for, or what to change.")] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            "-i",
            help="An image to look for, or to start from: a file, a URL or a data URI.",
            callback=_home,
        ),
    ] = None,
    db: Db = "photos.db",
    model: Model = REAL_MODEL,
    collection: Collection = "mm_retriever",
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
    exclude_query: Annotated[bool, typer.Option("--exclude-query", help="Leave out the query picture itself.")] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Let a vision model rank the results and say why.")] = False,
    rerank_model: Annotated[
        str | None, typer.Option(help="Default: Phi-3.5 Vision; `tiny` if that is the --model.")
    ] = None,
    rerank_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server that runs the vision model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of the results.", callback=_home)] = None,
    png: Annotated[Path | None, typer.Option(help="Write a numbered sheet of the results.", callback=_home)] = None,
    token: Token = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Search by text, by picture, or by both: `--text "phone case with this" --image leopard.jpg`."""
    from mm_retriever.retriever import ComposedRetriever
    from mm_retriever.terminal import print_json, print_search, result_rows, search_report, write_search

    if not (text and text.strip()) and image is None:
        raise QueryError("nothing to search for: give --text, --image, or both")
    filters = _filters(where or [])
    _must_exist(db)  # before a model is loaded
    embed_model = _embed_model(model, device=device, dtype=dtype, revision=revision)
    with _opened(db, embed_model, collection=collection, token=token, must_exist=True) as store:
        if hybrid and not store.hybrid:
            raise QueryError(f"{db!r} has no index of words; make one: mm-retriever index FOLDER --db NEW.db --hybrid")
        _check_filters(store, filters)
        retriever = ComposedRetriever(
            store,
            embed_model,
            top_k=top_k,
            filters=filters,
            min_score=min_score,
            mode="hybrid" if hybrid else "default",
            exclude_query_image=exclude_query,
            unique=each_once,
        )
        # whoever types a URL wants it fetched; addresses in a private network stay closed
        policy = replace(embed_model.image_policy, allow_urls=True)
        query = embed_model.get_query_bundle(text, image, image_policy=policy)
        nodes = retriever.retrieve(query)
        if len(nodes) < top_k:
            why = _why_fewer(store.count(), filters, min_score, each_once=each_once, exclude_query=exclude_query)
            typer.echo(f"{len(nodes)} of the {top_k} results that were asked for: {why}", err=True)
    reranking = None
    if rerank or rerank_url or rerank_model:
        reranker = _reranker(model, rerank_model, rerank_url, top_n=top_k, device=device)
        reranking = reranker.rerank(nodes, query)
    found = search_report(text, query.image_path, nodes, reranking=reranking)
    if as_json:
        print_json(result_rows(nodes if reranking is None else reranking.nodes))
    else:
        print_search(found)
    write_search(found, html=html, png=png, quiet=as_json)


@app.command()
def prune(
    folder: Annotated[Path, typer.Argument(help="A folder that was indexed; it may be gone.", callback=_home)],
    db: Db = "photos.db",
    collection: Collection = "mm_retriever",
    force: Force = False,
    token: Token = None,
) -> None:
    """Remove the rows of images below a folder whose files are gone. Loads no model, touches no file."""
    from mm_retriever.ingest import prune_images
    from mm_retriever.store import open_stored

    with open_stored(db, collection=collection, token=token) as store:
        done = prune_images(folder, store, force=force)
    if not done.rows:
        raise QueryError(f"nothing is stored of {str(folder)!r} in {db!r}")
    typer.echo(str(done))
    if done.kept:
        _fail(f"{done.kept} rows were kept: {_KEPT}; for example {done.kept_paths[0]!r}", EXIT_INCOMPLETE)


@app.command()
def remove(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders (with all below them) or URLs that were indexed.", callback=_home),
    ] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="The id of a row; repeat for more.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="What all rows to remove match, as in `search`.")] = None,
    db: Db = "photos.db",
    collection: Collection = "mm_retriever",
    token: Token = None,
) -> None:
    """Remove rows by path, id or metadata. Loads no model, touches no file."""
    from mm_retriever.ingest import remove_images
    from mm_retriever.store import open_stored

    if not paths and not ids and not where:
        raise QueryError("nothing is named to be removed: give paths, --id or --where; `clear` removes everything")
    filters = _filters(where or [])
    with open_stored(db, collection=collection, token=token) as store:
        _check_filters(store, filters)
        removed = remove_images(store, paths or [], ids=ids or [], filters=filters)
        typer.echo(f"{removed} rows removed, {store.count()} left")


@app.command()
def clear(
    db: Db = "photos.db",
    collection: Collection = "mm_retriever",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Without asking.")] = False,
    token: Token = None,
) -> None:
    """Remove every row of a collection. Loads no model, touches no file."""
    from mm_retriever.store import open_stored

    with open_stored(db, collection=collection, token=token) as store:
        rows = store.count()
        if not yes:
            typer.confirm(f"Remove all {rows} rows of {collection!r} in {db}?", abort=True)
        store.clear()
    typer.echo(f"{rows} rows removed")


@app.command()
def embed(
    out: Annotated[
        Path, typer.Argument(help="A folder for the files; what is done there already stays.", callback=_home)
    ],
    source: Annotated[
        Path | None,
        typer.Argument(help="A folder of pictures. Default: go on with what OUT was begun for.", callback=_home),
    ] = None,
    model: Model = REAL_MODEL,
    rows_per_file: Annotated[int, typer.Option(min=1, help="Pictures in one file.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Pictures embedded at a time.")] = 32,
    sidecar: Sidecar = None,
    no_sidecar: NoSidecar = False,
    no_exif: NoExif = False,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="For a collection that indexes the words too.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="On a Ray cluster (RAY_ADDRESS), or a local Ray: a file to a worker.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray. Default: as many as there is room for.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, with all that was skipped.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Embed millions of pictures into files that a Milvus server imports by itself. Run it again to go on."""
    from mm_retriever.bulk import embed_to_shards, embed_to_shards_on_ray
    from mm_retriever.terminal import print_ingestion, print_json

    if workers is not None and not ray:
        raise QueryError("--workers is taken only with --ray")
    embed_model = _embed_model(model, device=device, dtype=dtype, revision=revision, batch_size=batch_size)
    run = partial(embed_to_shards_on_ray, workers=workers) if ray else embed_to_shards
    with redirect_stdout(sys.stderr):  # where Ray says that a worker died
        result = run(
            source,
            out,
            embed_model,
            rows_per_shard=rows_per_file,
            batch_size=batch_size,
            sidecar=_sidecar(sidecar, no_sidecar=no_sidecar),
            exif=not no_exif,
            hybrid=hybrid,
            show_progress=not as_json,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_ingestion(result, rest="--json lists them all")


@app.command("import")
def import_(
    out: Annotated[Path, typer.Argument(help="The folder that `embed` filled.", callback=_home)],
    db: Annotated[str, typer.Option(help="The URI of a Milvus server.")],
    remote_folder: Annotated[
        str, typer.Option(help="Where the server's object storage has the files of OUT/shards.")
    ] = "",
    collection: Collection = "mm_retriever",
    timeout: Annotated[float, typer.Option(help="Seconds without any progress of the server.")] = 600.0,
    token: Token = None,
) -> None:
    """Have a Milvus server import what `embed` made, each picture exactly once. Run it again to go on."""
    from mm_retriever.bulk import import_shards
    from mm_retriever.bulk.plan import read_plan
    from mm_retriever.store import open_store
    from mm_retriever.store.words import analyzer_of

    _must_exist(db)
    plan = read_plan(out)  # knows the model that it is for: nothing is loaded
    analyzer = analyzer_of(plan.words)
    with open_store(
        db, plan, collection=collection, token=token, hybrid=analyzer is not None, analyzer=analyzer
    ) as store:
        typer.echo(str(import_shards(out, store, remote_folder=remote_folder, timeout=timeout)))


@app.command()
def convert(
    weights: Annotated[str, typer.Argument(help="Official .pth file, folder or published name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", callback=_home)],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with the tokenizer, if it is not beside WEIGHTS.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16. Default: as they are.")
    ] = None,
) -> None:
    """Write the safetensors form of official weights: loads faster, and cannot contain code."""
    from mm_retriever.embedders.visualized_bge.convert import convert_checkpoint

    written = convert_checkpoint(weights, out, tokenizer=tokenizer, dtype=dtype)
    typer.echo(f"wrote {written}; use it with --model {written}")


@app.command()
def info(
    db: Annotated[str | None, typer.Option(help="A store to describe.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read all that the store holds, and check it for damage.")
    ] = False,
    token: Token = None,
) -> None:
    """Versions, devices and bundled models; with --db, what a store holds."""
    from importlib.metadata import version

    import torch

    from mm_retriever.terminal import print_facts

    packages = ("mm-retriever", "torch", "transformers", "llama-index-core", "pymilvus", "pillow")
    facts = {package: version(package) for package in packages}
    devices = ["cpu"]
    devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    facts["devices"] = f"{', '.join(devices)}; {torch.get_num_threads()} threads"
    facts["bundled models"] = "tiny (drawn products only)"
    facts["published models"] = "BAAI/bge-visualized-base-en-v1.5, BAAI/bge-visualized-m3"
    if db is not None:
        from mm_retriever.store import describe_store

        _must_exist(db)
        for name, described in describe_store(db, token=token).items():
            facts[f"collection {name}"] = ", ".join(f"{key} {value}" for key, value in described.items())
    elif verify:
        raise QueryError("--verify needs a store: give --db")
    found = _verified(db, token) if db is not None and verify else {}
    facts |= {f"verified {name}": str(verification) for name, verification in found.items()}
    print_facts(facts)
    for verification in found.values():
        if not isinstance(verification, str):
            verification.raise_damage()


def _verified(db: str, token: str | None) -> dict[str, Verification | str]:
    from mm_retriever.store import verify_store

    return verify_store(db, token=token)


@app.command()
def demo(
    archive: Annotated[
        Path | None, typer.Argument(help="With --amazon: a copy of the published archive.", callback=_home)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, store and results.", callback=_home)] = Path("demo"),
    photos: Annotated[Path | None, typer.Option(help="Run on this folder of your own instead.", callback=_home)] = None,
    amazon: Annotated[bool, typer.Option("--amazon", help="Run on 900 pictures of Amazon Reviews 2023.")] = False,
    text: Annotated[str | None, typer.Option(help="With --photos: the text to search with.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="With --photos: the picture to search with.", callback=_home)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Default: tiny on drawings, BAAI's weights on photographs.")] = None,
    rerank: Annotated[
        bool | None, typer.Option("--rerank/--no-rerank", help="Rank again with a vision model. Default: on drawings.")
    ] = None,
    rerank_model: Annotated[str | None, typer.Option(help="Default: as in `search`.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Download without asking.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Search a drawn catalogue four ways; or your own photos; or the published Amazon pictures."""
    from mm_retriever import demo as scenes

    if photos is not None and amazon:
        raise QueryError("--photos and --amazon exclude each other: choose one")
    if archive is not None and not amazon:
        raise QueryError(f"{str(archive)!r} is taken only with --amazon; for your own folder use --photos {archive}")
    drawn = photos is None and not amazon
    model = model or ("tiny" if drawn else REAL_MODEL)
    embed_model = _embed_model(model, device=device, dtype=dtype)
    out.mkdir(parents=True, exist_ok=True)
    sidecar: Path | None = None
    if amazon:
        source, leopard = scenes.extract_amazon(archive or _download(out, yes=yes), out / "amazon")
        queries = [
            scenes.DemoQuery(name="amazon", title="The published example", text="phone case with this", image=leopard)
        ]
        db = out / "amazon.db"
    elif photos is not None:
        source, db, queries = photos, out / "photos.db", scenes.folder_queries(photos, text=text, image=image)
    else:
        from mm_retriever.demo.catalogue import write_catalogue

        written = write_catalogue(out / "catalogue", show_progress=True)
        source, sidecar, db = written.products, written.labels, out / "catalogue.db"
        queries = scenes.catalogue_queries(out / "queries")
    reranking = drawn if rerank is None else rerank
    reranker = _reranker(model, rerank_model, None, top_n=9, device=device) if reranking or rerank_model else None
    _run_demo(source, db, queries, embed_model, out, sidecar=sidecar, reranker=reranker)
    typer.echo(
        "\nYour own photos, with BAAI's weights (downloaded once, 400 MB):\n"
        "  mm-retriever index ~/Pictures --db photos.db\n"
        '  mm-retriever search --db photos.db --text "the same in red" --image shoe.jpg --html results.html'
    )


@app.command()
def mcp(
    db: Db = "photos.db",
    model: Model = REAL_MODEL,
    collection: Collection = "mm_retriever",
    vision_model: Annotated[
        str | None, typer.Option(help="A Phi-3 Vision model that ranks results and describes pictures. Default: none.")
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder that pictures may be read from; repeat for more. Default: only the indexed ones.",
            callback=_home,
        ),
    ] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Let a client name pictures by URL.")] = False,
    http: Annotated[bool, typer.Option("--http", help="Serve streamable HTTP instead of stdin and stdout.")] = False,
    host: Annotated[str, typer.Option(help="With --http: other than loopback only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="With --http.")] = 8765,
    http_token: Annotated[
        str | None,
        typer.Option(envvar="MM_RETRIEVER_MCP_TOKEN", help="With --http: what clients must send.", show_envvar=True),
    ] = None,
    token: Token = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    r"""Serve image search to an MCP client. Needs: pip install "mm-retriever\[mcp]"."""
    from mcp_server_mm_retriever import check_access, image_search, serve_http, serve_stdio

    if http:
        if http_token is None:
            http_token = os.environ.get("MM_RETRIEVER_MCP_TOKEN")  # an empty one, which typer takes for none
        check_access(host, http_token)
    _must_exist(db)  # before a model is loaded
    with redirect_stdout(sys.stderr):  # stdout belongs to the protocol
        embed_model = _embed_model(model, device=device, dtype=dtype, revision=revision)
        with _opened(db, embed_model, collection=collection, token=token, must_exist=True) as store:
            search = image_search(
                store, embed_model, vision_model=vision_model, roots=root, allow_urls=allow_urls, device=device
            )
            if http:
                serve_http(search, host=host, port=port, token=http_token)
            else:
                with redirect_stdout(sys.__stdout__), _ends_on_interrupt(store):
                    serve_stdio(search)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 for anything the user can mend, 130 when interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal of few letters cannot show is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    try:
        code = command.main(list(sys.argv[1:] if argv is None else argv), "mm-retriever", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; run the same command again to go on", EXIT_INTERRUPTED)
    except MMRetrieverError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}" + (f": {error.filename!r}" if error.filename else ""))
    except Exception as error:
        show = getattr(error, "format_message", None)  # typer's usage errors, under any of its versions
        if show is None:
            raise
        _fail(str(show()))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = EXIT_USAGE) -> NoReturn:
    # a message may repeat untrusted text: a file name, a server's answer
    print(f"mm-retriever: {one_line(message)}", file=sys.stderr)  # noqa: T201 - the command line's own voice
    if code == EXIT_USAGE and os.environ.get("MM_RETRIEVER_DEBUG"):
        traceback.print_exc()
    sys.exit(code)


def _embed_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    batch_size: int = 32,
) -> VisualizedBGEEmbedding:
    from mm_retriever.embedding import VisualizedBGEEmbedding

    return VisualizedBGEEmbedding(name, device=device, dtype=dtype, revision=revision, embed_batch_size=batch_size)


@contextmanager
def _opened(
    db: str | Path,
    embed_model: VisualizedBGEEmbedding,
    *,
    collection: str = "mm_retriever",
    token: str | None = None,
    must_exist: bool = False,
    hybrid: bool = False,
    analyzer: str | None = None,
) -> Iterator[ImageStore]:
    from mm_retriever.store import open_store

    store = open_store(
        db, embed_model, collection=collection, token=token, hybrid=hybrid, create=not must_exist, analyzer=analyzer
    )
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _ends_on_interrupt(store: ImageStore) -> Iterator[None]:
    """Close the store and end the process on Ctrl-C, where a thread that reads stdin would wait for one more line."""
    import signal
    import threading

    def end(*_: object) -> None:
        closing = threading.Thread(target=store.close, daemon=True)
        closing.start()
        closing.join(5)
        os._exit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _must_exist(db: str | Path) -> None:
    from mm_retriever.store import check_exists

    check_exists(db)


def _sidecar(path: Path | None, *, no_sidecar: bool) -> Path | Literal[False] | None:
    if path is not None and no_sidecar:
        raise QueryError("--sidecar and --no-sidecar exclude each other: choose one")
    return False if no_sidecar else path


def _filters(conditions: Sequence[str]) -> MetadataFilters | None:
    from llama_index.core.vector_stores import MetadataFilters

    from mm_retriever.store.conditions import read_condition, second_condition

    if not conditions:
        return None
    try:
        filters = MetadataFilters(filters=[read_condition(condition) for condition in conditions])
    except FilterError as error:
        raise QueryError(f"--where {error}") from None
    for condition in filter(second_condition, conditions):
        typer.echo(f"--where {condition!r} is taken as one condition; repeat --where for each", err=True)
    return filters


def _why_fewer(
    rows: int, filters: MetadataFilters | None, min_score: float | None, *, each_once: bool, exclude_query: bool
) -> str:
    limits = ["--where"] if filters else []
    limits += ["--min-score"] if min_score is not None else []
    limits += ["--each-once"] if each_once else []
    limits += ["--exclude-query"] if exclude_query else []
    held = f"the collection holds {rows} rows"
    verb = "leaves" if len(limits) == 1 else "leave"
    return f"{held}, and {', '.join(limits)} {verb} out others" if limits else held


def _check_filters(store: ImageStore, filters: MetadataFilters | None) -> None:
    if problems := store.filter_problems(filters):
        raise QueryError(f"--where: {'; '.join(problems)}")


def _reranker(model: str, rerank_model: str | None, url: str | None, *, top_n: int, device: str | None) -> Reranker:
    if url is not None:
        from mm_retriever.rerank import VisionLLMRerank

        return VisionLLMRerank(base_url=url, model=rerank_model or VISION_MODEL, top_n=top_n)
    from mm_retriever.rerank import Phi3VisionRerank

    name = rerank_model or ("tiny" if model == "tiny" else VISION_MODEL)
    return Phi3VisionRerank(name, top_n=top_n, device=device, fusion_weight=TINY_FUSION if name == "tiny" else None)


def _download(out: Path, *, yes: bool) -> Path:
    from mm_retriever.demo import AMAZON_URL
    from mm_retriever.terminal import download_archive

    target = out / "amazon_reviews_2023_subset.tar.gz"
    if not target.exists() and not yes:
        typer.confirm(f"Download {AMAZON_URL} (21 MB)?", abort=True)
    return download_archive(target)


def _run_demo(
    source: Path,
    db: Path,
    queries: Sequence[DemoQuery],
    embed_model: VisualizedBGEEmbedding,
    out: Path,
    *,
    sidecar: Path | None,
    reranker: Reranker | None,
) -> None:
    from mm_retriever.ingest import ingest_images
    from mm_retriever.report import write_html, write_png
    from mm_retriever.retriever import ComposedRetriever
    from mm_retriever.terminal import print_search, search_report

    with _opened(db, embed_model) as store:
        typer.echo(str(ingest_images(source, store, embed_model, sidecar=sidecar)))
        retriever = ComposedRetriever(store, embed_model, top_k=9)
        reports = []
        for query in queries:
            bundle = embed_model.get_query_bundle(query.text, query.image)
            nodes = retriever.retrieve(bundle)
            reranking = reranker.rerank(nodes, bundle) if reranker else None
            report = search_report(query.text, query.image, nodes, title=query.title, reranking=reranking)
            typer.echo("")
            print_search(report)
            write_png(out / f"{query.name}.png", report)
            reports.append(report)
    write_html(out / "results.html", reports)
    typer.echo(f"\nLook at {out / 'results.html'} and {out}/*.png")


if __name__ == "__main__":
    main()
