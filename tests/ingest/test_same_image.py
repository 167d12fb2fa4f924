"""The same contents under another name, time or URL: known by digest, embedded once; and changes that hide are seen."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
from llama_index.core.schema import ImageNode

from mm_retriever.bulk import embed_to_shards
from mm_retriever.bulk.plan import read_plan
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import known, remove_images
from mm_retriever.ingest import nodes as nodes_module
from mm_retriever.ingest.stable_url import stable_url, url_file_name
from mm_retriever.retriever import ComposedRetriever
from tests.support.colour_embedding import COLOURS, paint
from tests.support.ingesting import counts, ingest, nearest, nodes
from tests.support.settled import settle


def extra(report) -> tuple[int, int]:
    return report.moved, report.reused


# ------------------------------------------------------------------------------------------ moves and copies


def test_a_renamed_folder_is_moved_with_its_metadata_and_nothing_is_embedded(folder, store, model):
    """Rows of the old place go, so that nothing is found twice or at a dead path."""
    sidecar = {"red.png": {"price": 9.5}}
    ingest(folder, store, model, sidecar=sidecar)
    new = folder.rename(folder.parent / "renamed")
    report = ingest(new, store, model)
    assert (*extra(report), report.embedded, model.embedded, store.count()) == (3, 0, 0, 3, 3)
    stored = nodes(store)["red.png"]
    assert stored.metadata["price"] == 9.5
    assert stored.metadata["file_path"] == stored.image_path == str(new / "cars" / "fast" / "red.png")
    assert str(report).startswith("0 indexed, 3 moved, ")
    best = nearest(store, model.get_text_embedding("red"))
    assert best.metadata["file_name"] == "red.png"
    assert counts(ingest(new, store, model, sidecar=sidecar)) == {"unchanged": 3}


def test_a_file_moved_and_renamed_inside_the_folder_is_one_move(folder, store, model):
    ingest(folder, store, model)
    (folder / "green.JPEG").rename(folder / "cars" / "renamed.jpeg")
    report = ingest(folder, store, model)
    assert (report.moved, report.unchanged, report.indexed, store.count()) == (1, 2, 0, 3)


def test_copies_are_embedded_once_in_a_run_and_not_at_all_later(tmp_path, store, model):
    """Each copy has its row; one of two copies that are moved takes the place of one."""
    one = paint(tmp_path / "a" / "1.png", "red")
    for name in ("2.png", "3.png"):
        shutil.copy(one, one.with_name(name))
    report = ingest(tmp_path / "a", store, model)
    assert (report.indexed, report.reused, report.embedded, model.embedded) == (3, 2, 1, 1)
    assert str(report).startswith("3 indexed, 2 of them copies of known files in ")
    shutil.copy(one, paint(tmp_path / "b" / "4.png", "blue"))
    report = ingest(tmp_path / "b", store, model, batch_size=1)
    assert (report.indexed, report.reused, model.embedded, store.count()) == (1, 1, 1, 4)
    (tmp_path / "a").rename(tmp_path / "c")
    report = ingest(tmp_path / "c", store, model, batch_size=1)
    assert (report.moved, report.reused, model.embedded, store.count()) == (3, 0, 1, 4)


def test_known_digests_are_found_by_requests_first_and_from_one_list_later(tmp_path, store, model, monkeypatch):
    """Both ways give the same; the list is kept up with what the run writes."""
    names = list(COLOURS)
    for n in range(8):
        paint(tmp_path / "a" / f"{n}.png", names[n])
    ingest(tmp_path / "a", store, model)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for n in range(8):
        shutil.copy(paint(tmp_path / "b" / f"x{n}.png", names[n], size=(9, 9)), tmp_path / "b" / f"y{n}.png")
    monkeypatch.setattr(known, "_REQUESTS", 2)
    report = ingest(tmp_path / "b", store, model, batch_size=2)
    assert (report.indexed, report.reused, model.embedded) == (24, 16, 16)


def test_a_row_whose_file_is_still_there_is_not_taken_for_a_move(folder, store, model):
    ingest(folder, store, model)
    shutil.copytree(folder, folder.parent / "copy")
    report = ingest(folder.parent / "copy", store, model)
    assert (report.moved, report.indexed, report.reused, store.count()) == (0, 3, 3, 6)


# ------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("options", [{}, {"exclude_query_image": True}])
def test_copies_are_found_once_and_the_next_results_take_their_places(tmp_path, store, model, options):
    one = paint(tmp_path / "a" / "0.png", "red")
    for n in range(1, 30):
        shutil.copy(one, one.with_name(f"{n}.png"))
    for colour in ("purple", "black", "white"):
        paint(tmp_path / "a" / f"{colour}.png", colour)
    ingest(tmp_path / "a", store, model)
    bundle = model.get_query_bundle("red", None)
    if options:
        bundle = model.get_query_bundle(None, paint(tmp_path / "query.png", "red", size=(5, 5)))
    assert len({hit.node.metadata["digest"] for hit in ComposedRetriever(store, model, top_k=3).retrieve(bundle)}) == 1
    hits = ComposedRetriever(store, model, top_k=3, unique=True, **options).retrieve(bundle)
    assert len({hit.node.metadata["digest"] for hit in hits}) == len(hits) == 3
    assert hits[0].node.metadata["copies_left_out"] > 0
    assert "copies_left_out" not in nodes(store)["0.png"].metadata, "the stored node stays as it was"
    assert len(ComposedRetriever(store, model, top_k=9, unique=True).retrieve(bundle)) == 4


def test_nodes_without_a_digest_are_never_taken_for_copies(store, model):
    vector = model.get_text_embedding("red")
    store.add([ImageNode(id_=name, image_path="/a.png", embedding=vector) for name in ("a", "b")])
    assert len(ComposedRetriever(store, model, unique=True).retrieve(model.get_query_bundle("red"))) == 2


# ------------------------------------------------------------------------------------------ changes that hide


@pytest.fixture
def quick_clocks(monkeypatch):
    """Stamps settle after 50 ms, so that tests need not wait for the clock of a FAT disk."""
    monkeypatch.setattr(nodes_module, "_SETTLED_NS", 50_000_000)


def keep_times(path: Path, colour: str) -> None:
    """Other contents under the same size and time, as `rsync -t` and `exiftool -P` leave them."""
    status = path.stat()
    paint(path, colour)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_contents_under_the_same_size_and_time_are_seen(tmp_path, store, model, quick_clocks):
    photos = tmp_path / "photos"
    one, two = paint(photos / "a.bmp", "red"), paint(photos / "b.bmp", "blue")
    settle(one, two)
    ingest(photos, store, model)
    assert counts(ingest(photos, store, model)) == {"unchanged": 2}
    keep_times(one, "green")
    assert counts(ingest(photos, store, model)) == {"replaced": 1, "unchanged": 1}
    for path in (one, two):
        os.utime(path, ns=(1, 1))
    settle(one, two)
    ingest(photos, store, model)
    one.rename(photos / "x")
    two.rename(one)
    (photos / "x").rename(two)
    report = ingest(photos, store, model)
    assert (report.replaced, report.reused) == (2, 2), "swapped: seen, and not embedded again"


def test_a_file_that_changed_a_moment_ago_is_read_again(tmp_path, store, model):
    """Within one tick of the clock it may change again under the very same stamp."""
    path = paint(tmp_path / "photos" / "a.bmp", "red")
    ingest(tmp_path / "photos", store, model)
    assert "file_stamp" not in nodes(store)["a.bmp"].metadata
    keep_times(path, "blue")
    assert counts(ingest(tmp_path / "photos", store, model)) == {"replaced": 1}


def test_verify_reads_everything(tmp_path, store, model, quick_clocks, monkeypatch):
    """Bit rot changes neither size nor any time."""
    path = paint(tmp_path / "photos" / "a.bmp", "red")
    settle(path)
    ingest(tmp_path / "photos", store, model)
    now = nodes_module.file_stamp(str(path))
    paint(path, "blue")
    monkeypatch.setattr("mm_retriever.ingest.nodes.file_stamp", lambda path: now)
    assert counts(ingest(tmp_path / "photos", store, model)) == {"unchanged": 1}
    assert counts(ingest(tmp_path / "photos", store, model, verify=True)) == {"replaced": 1}
    assert counts(ingest(tmp_path / "photos", store, model, verify=True)) == {"unchanged": 1}


def test_rows_of_an_earlier_version_get_their_stamp_and_keep_their_vectors(folder, store, model, quick_clocks):
    """Earlier versions stored size and time alone: the digest decides."""
    settle(folder)
    ingest(folder, store, model)
    ids = [row["id"] for page in store.scan() for row in page]
    vectors = store.columns(ids, [store.embedding_field])
    old = store.get_nodes(ids)
    for node in old:
        del node.metadata["file_stamp"]
        node.embedding = list(vectors[node.node_id][store.embedding_field])
    store.clear()
    store.add(old)
    assert counts(ingest(folder, store, model)) == {"unchanged": 3}
    assert model.embedded == 3
    assert all("file_stamp" in node.metadata for node in nodes(store).values())


# ------------------------------------------------------------------------------------------ signed URLs

PLAIN = "https://host/photos/a%20b.jpg"


@pytest.mark.parametrize(
    ("url", "stable"),
    [
        (f"{PLAIN}?X-Amz-Algorithm=AWS4&X-Amz-Date=1&X-Amz-Expires=60&X-Amz-Signature=s&x-id=GetObject", PLAIN),
        (f"{PLAIN}?versionId=3&X-Amz-Signature=s&X-Amz-Security-Token=t", f"{PLAIN}?versionId=3"),
        (f"{PLAIN}?AWSAccessKeyId=k&Signature=s%3D&Expires=1", PLAIN),
        (f"{PLAIN}?X-Goog-Algorithm=a&X-Goog-Credential=c&X-Goog-Signature=s", PLAIN),
        (f"{PLAIN}?GoogleAccessId=k&Expires=1&Signature=s", PLAIN),
        (f"{PLAIN}?sv=2022&st=a&se=b&sr=b&sp=r&sig=s%2F", PLAIN),
        (f"{PLAIN}?Expires=1&Signature=s&Key-Pair-Id=k", PLAIN),
        (f"{PLAIN}?Policy=p&Signature=s&Key-Pair-Id=k&w=200", f"{PLAIN}?w=200"),
        (f"{PLAIN}?OSSAccessKeyId=k&Expires=1&Signature=s", PLAIN),
        (f"{PLAIN}?alt=media&token=t", f"{PLAIN}?alt=media"),
        (f"{PLAIN}?ex=1&is=2&hm=3", PLAIN),
        ("https://user:word@host/a.jpg", "https://host/a.jpg"),
        (f"{PLAIN}#part", PLAIN),
        (f"{PLAIN}?size=large&expires=never&e=1&key=a", f"{PLAIN}?size=large&expires=never&e=1&key=a"),
        (f"{PLAIN}?id=7&", f"{PLAIN}?id=7&"),
        ("https://[broken/a.jpg?token=t", "https://[broken/a.jpg?token=t"),
        ("s3://bucket/a#1.jpg?token=t", "s3://bucket/a#1.jpg?token=t"),
    ],
)
def test_a_url_is_stored_without_what_is_signed_or_secret(url, stable):
    """Source: documents of S3, Cloud Storage, Azure, CloudFront, OSS, Firebase, Discord. Others stay as they are."""
    assert stable_url(url) == stable
    assert stable_url(stable) == stable


def test_the_name_of_a_url_is_that_of_its_file():
    assert url_file_name(f"{PLAIN}?a=b/c.png") == "a b.jpg"
    assert url_file_name("https://host") == "host"
    assert url_file_name("s3://bucket/a%20b#1.jpg") == "a%20b#1.jpg"


@pytest.fixture
def served(tmp_path):
    """A folder over HTTP that answers only under a signature; gives its address and what was asked for."""
    asked: list[str] = []
    root = tmp_path / "served"
    data = paint(root / "a.png", "red").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "X-Amz-Signature=" in self.path else 403)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/a.png", asked
    server.shutdown()
    server.server_close()
    thread.join()


POLICY = ImagePolicy(allow_urls=True, allow_private_addresses=True)


def test_an_object_is_one_image_under_any_signature_and_its_row_knows_none(served, store, model):
    url, asked = served
    signed = [f"{url}?X-Amz-Signature=SECRET{n}" for n in range(2)]
    for one in signed:
        ingest([one], store, model, image_policy=POLICY)
    document = ImageNode(image_url=signed[1], metadata={"link": signed[1], "note": "kept"})
    ingest([document], store, model, image_policy=POLICY)
    (node,) = nodes(store).values()
    assert node.image_url == node.metadata["link"] == url
    assert node.metadata["file_name"] == "a.png"
    assert "SECRET" not in node.to_json()
    assert len(asked) == 2, "fetched under the signature; the second time only for the new metadata"
    assert remove_images(store, [signed[0]]) == 1


def test_a_row_of_an_earlier_version_moves_to_the_url_without_signature(served, store, model):
    url, _ = served
    signed = f"{url}?X-Amz-Signature=SECRET"
    ingest([signed], store, model, image_policy=POLICY)
    (node,) = nodes(store).values()
    vector = list(store.columns([node.node_id], [store.embedding_field])[node.node_id][store.embedding_field])
    earlier = {**node.metadata, "mine": 1, "metadata_digest": "of what is mine"}
    store.clear()
    store.add([ImageNode(id_="old", image_url=signed, metadata=earlier, embedding=vector)])
    report = ingest([signed], store, model, image_policy=POLICY)
    assert (report.moved, model.embedded, store.count()) == (1, 1, 1)
    assert nodes(store)["a.png"].metadata["mine"] == 1


def test_shards_fetch_under_the_signature_and_store_without_it(served, tmp_path, model):
    url, _ = served
    report = embed_to_shards(
        [f"{url}?X-Amz-Signature=SECRET"], tmp_path / "out", model, show_progress=False, image_policy=POLICY
    )
    assert (report.rows, report.skipped) == (1, ())
    (item,) = read_plan(tmp_path / "out").items(0)
    assert (item.url, item.source) == (url, f"{url}?X-Amz-Signature=SECRET")
    assert b"SECRET" not in next((tmp_path / "out" / "shards").iterdir()).read_bytes()
