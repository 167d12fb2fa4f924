"""The command line: ``mm-retriever index | search | convert | info | demo``.

Owns options, tables and exit codes; every piece of work is a call into the package, imported inside the command,
so that ``--help`` answers at once. Errors of the package are one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mm_retriever import __version__
from mm_retriever.errors import MMRetrieverError, QueryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_index.core.schema import NodeWithScore
    from llama_index.core.vector_stores import MetadataFilters

    from mm_retriever.demo import DemoQuery
    from mm_retriever.embedding import VisualizedBGEEmbedding
    from mm_retriever.report import Hit, SearchReport
    from mm_retriever.store import ImageStore

REAL_MODEL = "BAAI/bge-visualized-base-en-v1.5"
CONDITION = re.compile(r"(?P<key>[A-Za-z_]\w*)\s*(?P<sign>:=|!=|>=|<=|=|>|<)(?P<value>.*)", re.DOTALL)
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

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
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"mm-retriever {__version__}")
        raise typer.Exit


@app.command()
def index(
    source: Annotated[Path, typer.Argument(help="A folder of pictures (read recursively).")],
    db: Db = "photos.db",
    model: Model = REAL_MODEL,
    collection: Collection = "mm_retriever",
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Pictures embedded at a time.")] = 32,
    prune: Annotated[bool, typer.Option("--prune", help="Also remove pictures that are gone from the folder.")] = False,
    sidecar: Annotated[Path | None, typer.Option(help="JSON or CSV with more columns for each picture.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write what was skipped, and why, to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    token: Token = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Put a folder of pictures into the store. Run it again at any time: only what changed is embedded."""
    from mm_retriever.ingest import ingest_images

    embed_model = _embed_model(model, device=device, dtype=dtype, revision=revision, batch_size=batch_size)
    with _opened(db, embed_model, collection=collection, token=token) as store:
        result = ingest_images(
            source,
            store,
            embed_model,
            batch_size=batch_size,
            prune=prune,
            sidecar=sidecar,
            report_path=report,
            show_progress=not as_json,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
        return
    typer.echo(str(result))
    for skipped in result.skipped[:10]:
        typer.echo(f"  skipped {skipped.path}: {skipped.reason}")
    if len(result.skipped) > 10:
        typer.echo(f"  and {len(result.skipped) - 10} more; --report FILE lists them all")


@app.command()
def search(
    text: Annotated[str | None, typer.Option("--text", "-t", help="What to look for, or what to change.")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", help="A picture to look for, or to start from.")
    ] = None,
    db: Db = "photos.db",
    model: Model = REAL_MODEL,
    collection: Collection = "mm_retriever",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=16_384, help="How many results.")] = 9,
    where: Annotated[
        list[str] | None, typer.Option(help="What a result must be: label=shoes, year>2020; repeat for more.")
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out results below this similarity (-1 to 1).")] = None,
    exclude_query: Annotated[bool, typer.Option("--exclude-query", help="Leave out the query picture itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of the results.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a numbered sheet of the results.")] = None,
    token: Token = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Search by text, by picture, or by both: `--text "phone case with this" --image leopard.jpg`."""
    from mm_retriever.retriever import ComposedRetriever

    if not (text and text.strip()) and image is None:
        raise QueryError("nothing to search for: give --text, --image, or both")
    filters = _filters(where or [])
    embed_model = _embed_model(model, device=device, dtype=dtype, revision=revision)
    with _opened(db, embed_model, collection=collection, token=token, must_exist=True) as store:
        retriever = ComposedRetriever(
            store,
            embed_model,
            top_k=top_k,
            filters=filters,
            min_score=min_score,
            exclude_query_image=exclude_query,
        )
        nodes = retriever.retrieve(embed_model.get_query_bundle(text, image))
    found = _report(text, image, nodes)
    if as_json:
        typer.echo(json.dumps([_row(rank, node) for rank, node in enumerate(nodes, 1)], ensure_ascii=False, indent=2))
    else:
        _print_table(found)
    _write(found, html=html, png=png, quiet=as_json)


@app.command()
def convert(
    weights: Annotated[str, typer.Argument(help="Official .pth file, folder or published name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with the tokenizer, if it is not beside WEIGHTS.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16. Default: as they are.")
    ] = None,
) -> None:
    """Write the safetensors form of official weights: loads faster, and cannot contain code."""
    from mm_retriever.models.visualized_bge import convert_checkpoint

    written = convert_checkpoint(weights, out, tokenizer=tokenizer, dtype=dtype)
    typer.echo(f"wrote {written}; use it with --model {written}")


@app.command()
def info(
    db: Annotated[str | None, typer.Option(help="A store to describe.")] = None,
    token: Token = None,
) -> None:
    """Versions, devices and bundled models; with --db, what a store holds."""
    from importlib.metadata import version

    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for package in ("mm-retriever", "torch", "transformers", "llama-index-core", "pymilvus", "pillow"):
        table.add_row(package, version(package))
    import torch

    devices = ["cpu"]
    devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    table.add_row("devices", f"{', '.join(devices)}; {torch.get_num_threads()} threads")
    table.add_row("bundled models", "tiny (drawn products only)")
    table.add_row("published models", "BAAI/bge-visualized-base-en-v1.5, BAAI/bge-visualized-m3")
    if db is not None:
        from mm_retriever.store import describe_store

        _must_exist(db)

        for name, facts in describe_store(db, token=token).items():
            table.add_row(f"collection {name}", ", ".join(f"{key} {value}" for key, value in facts.items()))
    Console().print(table)


@app.command()
def demo(
    archive: Annotated[Path | None, typer.Argument(help="With --amazon: a copy of the published archive.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, store and results.")] = Path("demo"),
    photos: Annotated[Path | None, typer.Option(help="Run on this folder of your own instead.")] = None,
    amazon: Annotated[bool, typer.Option("--amazon", help="Run on 900 pictures of Amazon Reviews 2023.")] = False,
    text: Annotated[str | None, typer.Option(help="With --photos: the text to search with.")] = None,
    image: Annotated[Path | None, typer.Option(help="With --photos: the picture to search with.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: tiny on drawings, BAAI's weights on photographs.")] = None,
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
    embed_model = _embed_model(
        model or ("tiny" if photos is None and not amazon else REAL_MODEL), device=device, dtype=dtype
    )
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
        from mm_retriever.catalogue import write_catalogue

        written = write_catalogue(out / "catalogue", show_progress=True)
        source, sidecar, db = written.products, written.labels, out / "catalogue.db"
        queries = scenes.catalogue_queries(out / "queries")
    _run_demo(source, db, queries, embed_model, out, sidecar)
    typer.echo(
        "\nYour own photos, with BAAI's weights (downloaded once, 400 MB):\n"
        "  mm-retriever index ~/Pictures --db photos.db\n"
        '  mm-retriever search --db photos.db --text "the same in red" --image shoe.jpg --html results.html'
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 for anything the user can mend, 130 when interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
    print("mm-retriever: " + " ".join(message.split()), file=sys.stderr)  # noqa: T201 - the command line's own voice
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
) -> Iterator[ImageStore]:
    from mm_retriever.store import open_store

    if must_exist:
        _must_exist(db)
    store = open_store(db, embed_model, collection=collection, token=token)
    try:
        yield store
    finally:
        store.close()


def _must_exist(db: str | Path) -> None:
    if str(db).endswith(".db") and "://" not in str(db) and not Path(db).exists():
        raise QueryError(f"there is no store {str(db)!r}; make it with: mm-retriever index FOLDER --db {db}")


def _filters(conditions: Sequence[str]) -> MetadataFilters | None:
    from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters

    filters: list[MetadataFilter | MetadataFilters] = []
    for condition in conditions:
        match = CONDITION.fullmatch(condition)
        if match is None:
            raise QueryError(
                f"--where {condition!r} is not key=value, key!=value, or key>number (also >=, <, <=, :=number)"
            )
        key, sign, value = match["key"], match["sign"], match["value"]
        numeric = sign not in ("=", "!=")
        operator = FilterOperator({"=": "==", ":=": "=="}.get(sign, sign))
        filters.append(
            MetadataFilter(key=key, value=_number(condition, value) if numeric else value, operator=operator)
        )
    return MetadataFilters(filters=filters) if filters else None


def _number(condition: str, value: str) -> int | float:
    try:
        return int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    except ValueError:
        raise QueryError(f"--where {condition!r}: {value!r} is not a number; for text use key=value") from None


def _row(rank: int, node: NodeWithScore) -> dict[str, Any]:
    return {"rank": rank, "id": node.node.node_id, "score": node.score, **node.node.metadata}


def _report(text: str | None, image: Path | None, nodes: Sequence[NodeWithScore], title: str = "") -> SearchReport:
    from mm_retriever.report import SearchReport

    hits = tuple(_hit(rank, node) for rank, node in enumerate(nodes, 1))
    return SearchReport(query_text=text or "", query_image=image, hits=hits, title=title)


def _hit(rank: int, node: NodeWithScore) -> Hit:
    from mm_retriever.report import Hit

    facts = node.node.metadata
    label = facts.get("description") or facts.get("label") or ""
    return Hit(rank, node.node.node_id, score=node.score, path=str(facts.get("file_path", "")), label=str(label))


def _asked(report: SearchReport) -> str:
    picture = f"[{Path(str(report.query_image)).name}]" if report.query_image is not None else ""
    asked = " ".join(part for part in (picture, report.query_text) if part)
    return f"{report.title}: {asked}" if report.title else asked


def _print_table(report: SearchReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("#", "score", "label", title=Text(_asked(report)), title_justify="left", box=None)
    table.add_column("file", overflow="fold")
    for hit in report.hits:
        table.add_row(
            str(hit.rank), "" if hit.score is None else f"{hit.score:.3f}", Text(hit.label), Text(hit.path or hit.id)
        )
    console = Console()
    console.print(table)
    if not report.hits:
        console.print("nothing found")


def _write(report: SearchReport, *, html: Path | None, png: Path | None, quiet: bool = False) -> None:
    from mm_retriever.report import write_html, write_png

    for path, write in ((html, write_html), (png, write_png)):
        if path is not None:
            write(path, report)
            if not quiet:
                typer.echo(f"wrote {path}")


def _download(out: Path, *, yes: bool) -> Path:
    from tqdm import tqdm

    from mm_retriever import demo as scenes

    target = out / "amazon_reviews_2023_subset.tar.gz"
    if not target.exists() and not yes:
        typer.confirm(f"Download {scenes.AMAZON_URL} (21 MB)?", abort=True)
    with tqdm(total=scenes.AMAZON_BYTES, unit="B", unit_scale=True, desc="Downloading") as bar:
        return scenes.download_amazon(target, progress=bar.update)


def _run_demo(
    source: Path,
    db: Path,
    queries: Sequence[DemoQuery],
    embed_model: VisualizedBGEEmbedding,
    out: Path,
    sidecar: Path | None,
) -> None:
    from mm_retriever.ingest import ingest_images
    from mm_retriever.report import write_html, write_png
    from mm_retriever.retriever import ComposedRetriever

    with _opened(db, embed_model) as store:
        typer.echo(str(ingest_images(source, store, embed_model, sidecar=sidecar)))
        retriever = ComposedRetriever(store, embed_model, top_k=9)
        reports = []
        for query in queries:
            nodes = retriever.retrieve(embed_model.get_query_bundle(query.text, query.image))
            report = _report(query.text, query.image, nodes, query.title)
            typer.echo("")
            _print_table(report)
            write_png(out / f"{query.name}.png", report)
            reports.append(report)
    write_html(out / "results.html", reports)
    typer.echo(f"\nLook at {out / 'results.html'} and {out}/*.png")


if __name__ == "__main__":
    main()
