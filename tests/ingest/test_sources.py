"""An object under any signature is one image, and no signature is stored."""

from __future__ import annotations

import http.server
import threading

import pytest
from llama_index.core.schema import ImageNode

from mm_retriever.bulk import embed_to_shards
from mm_retriever.bulk.plan import read_plan
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import remove_images
from mm_retriever.ingest.sources import stable_url, url_file_name
from tests.support.colour_embedding import paint
from tests.support.ingesting import ingest, nodes

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
        ("HTTPS://CDN.Example.COM:443/A.jpg?B=C", "https://cdn.example.com/A.jpg?B=C"),
        ("http://[2001:DB8::1]:80/a.jpg", "http://[2001:db8::1]/a.jpg"),
        ("http://host:443/a.jpg", "http://host:443/a.jpg"),
        (f"{PLAIN}?size=large&expires=never&e=1&key=a", f"{PLAIN}?size=large&expires=never&e=1&key=a"),
        (f"{PLAIN}?id=7&", f"{PLAIN}?id=7&"),
        ("https://[broken/a.jpg?token=t", "https://[broken/a.jpg?token=t"),
        ("s3://bucket/a#1.jpg?token=t", "s3://bucket/a#1.jpg?token=t"),
    ],
)
def test_a_url_is_stored_without_what_is_signed_or_secret(url, stable):
    """Source: documents of S3, Cloud Storage, Azure, CloudFront, OSS, Firebase, Discord. Others stay as they are.

    Of scheme, host and port: RFC 3986, section 6.2.
    """
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
