"""``mm-retriever index | reindex | prune | remove | clear``: the rows of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from mm_retriever.cli import options
from mm_retriever.cli.wording import in_cli_words
from mm_retriever.errors import QueryError, one_line

EXAMPLES = (
    "[bold]mm-retriever index ~/Pictures --db photos.db[/bold]\n\n"
    "[bold]mm-retriever index shoes boots one.jpg --db shop.db[/bold]\n\n"
    "[bold]mm-retriever index products --sidecar products.csv --item sku[/bold]\n\n"
    "A sidecar names an image in each row, by its path below the folder or by its file name, and says something about "
    "it; a column text or caption becomes its text:\n\n"
    "  CSV, TSV:  file_name,price,caption / a.jpg,49.5,red boots\n\n"
    '  JSON Lines:  {"file_name": "a.jpg", "price": 49.5, "caption": "red boots"}\n\n'
    '  JSON:  {"a.jpg": {"price": 49.5, "caption": "red boots"}}'
)

Force = Annotated[
    bool,
    typer.Option("--force", help="Prune also where more than a fifth would go, or a drive seems to be missing."),
]


def index(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of images (read recursively), or single images.",
            parser=options.named_path,
            callback=options.home,
        ),
    ],
    db: options.Db = "photos.db",
    model: options.HeldModel = None,
    model_url: options.ModelUrl = None,
    model_key: options.ModelKey = None,
    collection: options.Collection = "mm_retriever",
    batch_size: options.BatchSize = 32,
    prune: Annotated[bool, typer.Option("--prune", help="Also remove images whose files are gone.")] = False,
    force: Force = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file, whatever its size and times say.")] = False,
    sidecar: options.Sidecar = None,
    no_sidecar: options.NoSidecar = False,
    drop_columns: Annotated[
        bool, typer.Option("--drop-columns", help="Remove the columns and captions that this run does not give.")
    ] = False,
    item: Annotated[
        str | None,
        typer.Option(help="The column whose value the images of one item share, like sku: for `search --per-item`."),
    ] = None,
    no_exif: options.NoExif = False,
    exact_pixels: Annotated[
        bool | None,
        typer.Option(
            "--exact-pixels/--reduced-pixels",
            help="Whether large JPEG files are decoded whole, or several times as fast at a part of their size, never "
            "below twice what the model sees. By default reduced where the model computes in int8.",
        ),
    ] = None,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Index the words with the images too (BM25); in a new collection only.")
    ] = False,
    analyzer: Annotated[
        str | None,
        typer.Option(
            help="With --hybrid: how words are found: mixed (any language; the default of new collections) or standard "
            "(only languages with spaces between words)."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write what was skipped, and why, to this JSON file.", callback=options.home)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    token: options.Token = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    revision: options.Revision = None,
) -> None:
    """Put images into the store. Run it again at any time: only what changed is embedded."""
    from mm_retriever.ingest import IngestReport, ingest_images
    from mm_retriever.store import open_store
    from mm_retriever.terminal import print_ingestion, print_json

    if analyzer is not None and not hybrid:
        raise QueryError(f"--analyzer {analyzer} goes with --hybrid: without it no words are indexed")
    if force and not prune:
        raise QueryError("--force goes with --prune: it says that many rows may go")
    options.check_places({"--report": report})
    columns = options.sidecar_of(sidecar, no_sidecar=no_sidecar)
    parts = named_parts(sources, prune=prune)
    if columns and len(parts) > 1:
        raise QueryError("--sidecar goes with one folder: run `index` once for each")
    if columns and not columns.is_file():
        raise QueryError(f"there is no sidecar file {str(columns)!r}")
    wanted = options.model_to_load(model, dtype, backend, url=model_url, db=db, collection=collection, token=token)
    embedding = options.embed_model(
        **wanted._asdict(),
        device=device,
        calibration=sources[0],
        revision=revision,
        url=model_url,
        key=model_key,
        batch_size=batch_size,
    )
    with open_store(db, embedding, collection=collection, token=token, hybrid=hybrid, analyzer=analyzer) as store:
        done = [
            ingest_images(
                part,
                store,
                embedding,
                batch_size=batch_size,
                prune=prune,
                sidecar=columns,
                drop_columns=drop_columns,
                item=item,
                exif=not no_exif,
                exact_pixels=exact_pixels,
                force=force,
                verify=verify,
                show_progress=not as_json,
            )
            for part in parts
        ]
    result = IngestReport.of_parts(done)
    if report is not None:
        result.write(report)
    if as_json:
        print_json(result.to_dict())
    else:
        print_ingestion(result)
    if result.kept:
        options.fail(f"{result.kept} rows were kept: {options.KEPT}", options.EXIT_INCOMPLETE)


def reindex(
    model: options.Model,
    db: options.Db = "photos.db",
    collection: options.Collection = "mm_retriever",
    batch_size: options.BatchSize = 32,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave out rows whose image cannot be read.")
    ] = False,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images that are stored by URL.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, with all that cannot be read.")
    ] = False,
    token: options.Token = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    revision: options.Revision = None,
    model_url: options.ModelUrl = None,
    model_key: options.ModelKey = None,
) -> None:
    """Change the model of a collection, all in one step at the end. Run it again to go on where it was ended."""
    from mm_retriever.errors import ReindexError
    from mm_retriever.images import ImagePolicy
    from mm_retriever.ingest import SkippedImage, reindex
    from mm_retriever.store import check_exists
    from mm_retriever.terminal import print_json, print_skipped

    check_exists(db)  # before a model is loaded
    embedding = options.embed_model(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        revision=revision,
        url=model_url,
        key=model_key,
        batch_size=batch_size,
    )
    try:
        report = reindex(
            db,
            embedding,
            collection=collection,
            token=token,
            batch_size=batch_size,
            drop_missing=drop_missing,
            show_progress=not as_json,
            image_policy=ImagePolicy(allow_urls=allow_urls),
        )
    except ReindexError as error:
        unreadable = [SkippedImage(path, in_cli_words(reason)) for path, reason in error.unreadable]
        if as_json:
            print_json({"error": in_cli_words(str(error)), "unreadable": [asdict(row) for row in unreadable]})
        else:
            print_skipped(unreadable, rest="--json lists them all")
        options.fail(in_cli_words(str(error)), options.EXIT_INCOMPLETE)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
        print_skipped(report.dropped, rest="--json lists them all")


def prune(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder that was indexed; it may be gone.", parser=options.named_path, callback=options.home
        ),
    ],
    db: options.Db = "photos.db",
    collection: options.Collection = "mm_retriever",
    force: Force = False,
    token: options.Token = None,
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
        options.fail(
            f"{done.kept} rows were kept: {options.KEPT}; for example {done.kept_paths[0]!r}", options.EXIT_INCOMPLETE
        )


def remove(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders (with all below them) or URLs that were indexed.", callback=options.home),
    ] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="The id of a row; repeat for more.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Also remove rows by metadata: those that match every condition, as in `search`."),
    ] = None,
    db: options.Db = "photos.db",
    collection: options.Collection = "mm_retriever",
    token: options.Token = None,
) -> None:
    """Remove rows by path, id or metadata. Loads no model, touches no file."""
    from mm_retriever.ingest import remove_images
    from mm_retriever.store import open_stored
    from mm_retriever.store.conditions import where_filters, where_notes

    if not paths and not ids and not where:
        raise QueryError("nothing is named to be removed: give paths, --id or --where; `clear` removes everything")
    filters = where_filters(where or ())
    for note in where_notes(where or ()):
        typer.echo(note, err=True)
    with open_stored(db, collection=collection, token=token) as store:
        if problems := store.filter_problems(filters):
            raise QueryError(f"--where: {'; '.join(problems)}")
        removed = remove_images(store, paths or [], ids=ids or [], filters=filters)
        typer.echo(f"{removed} rows removed, {store.count()} left")


def clear(
    db: options.Db = "photos.db",
    collection: options.Collection = "mm_retriever",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Without asking.")] = False,
    token: options.Token = None,
) -> None:
    """Remove every row of a collection. Loads no model, touches no file."""
    from mm_retriever.store import open_stored

    with open_stored(db, collection=collection, token=token) as store:
        rows = store.count()
        if not yes:
            options.confirm(f"Remove all {rows} rows of {collection!r} in {db}?")
        store.clear()
    typer.echo(f"{rows} rows removed")


_BEGINNING = 512  # bytes of a file, which tell its format
Part: TypeAlias = Path | list[str]
"""A folder, or the single images."""


def named_parts(sources: Sequence[Path], *, prune: bool) -> list[Part]:
    """Return the folders, and the single images together, so that no image is indexed twice.

    An image has the label of the folder that it is found in: in two of them it would change with every run.

    Args:
        sources: as they were given.
        prune: whether a folder may be gone, so that its rows go too.

    Raises:
        QueryError: one that does not exist, that holds or is no image, or that lies in another.
    """
    from mm_retriever.ingest.sources import missing_folder

    folders: list[Path] = []
    files: list[Path] = []
    for source in sources:
        if missing_folder(source) is not None:
            if not prune:
                raise QueryError(f"there is no file or folder {str(source)!r}")
            folders.append(source)
        elif source.is_file():
            files.append(source)
        else:
            folders.append(source)
    if files and prune:
        raise QueryError(f"--prune goes with folders, not with single images such as {str(files[0])!r}")
    _refuse_twice(folders, files)
    for folder in () if prune else folders:
        _refuse_imageless(folder)
    _refuse_no_images(files)
    return [*folders, *([[str(file) for file in files]] if files else [])]


def _refuse_twice(folders: Sequence[Path], files: Sequence[Path]) -> None:
    real = {folder.resolve(): folder for folder in folders}
    places: set[Path] = set()
    for source in (*folders, *files):
        place = source.resolve()
        inside = next((real[parent] for parent in place.parents if parent in real), None)
        if inside is not None:
            raise QueryError(f"{str(source)!r} is in {str(inside)!r}, which is named too: name it once")
        if place in places:
            raise QueryError(f"{str(source)!r} is named twice")
        places.add(place)


def _refuse_imageless(folder: Path) -> None:
    """Say what a folder holds in which there is no image; the walk ends at the first one."""
    from mm_retriever.ingest.folder import IgnoredCounts, walk

    ignored = IgnoredCounts()
    unread: list[str] = []
    if next(walk(str(folder.resolve()), lambda name, reason: unread.append(reason), ignored), None) is not None:
        return
    kinds = [f"{kind.count} {one_line(kind.kind, 40)} ({one_line(kind.reason, 100)})" for kind in ignored.report()[:3]]
    held = "; ".join([*unread[:1], *kinds]) or "it is empty"
    raise QueryError(f"there is no image in {str(folder)!r}: {held}")


def _refuse_no_images(files: Sequence[Path]) -> None:
    """Refuse files of which not one begins as an image does; beside images, the report names what is left out."""
    from mm_retriever.images.header import FORMATS, sniff_format

    for file in files:
        with file.open("rb") as opened:
            if sniff_format(opened.read(_BEGINNING)) is not None:
                return
    if files:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise QueryError(f"{str(files[0])!r}{more}: no image; there are {', '.join(FORMATS)}")
