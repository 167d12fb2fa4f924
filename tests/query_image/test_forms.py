"""One query image from the first call to the last, in whatever form it comes."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import pickle
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import ImageNode, QueryBundle
from PIL import Image

from mm_retriever.cli import main
from mm_retriever.engine import image_query_engine
from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, load_image, pixel_digest
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.store import open_store
from tests.support.drawn_store import ScriptedLLM, draw_images, images_of, says
from tests.support.query_image import (
    FORMS,
    SIMILAR,
    TEXT,
    TOP_K,
    WAYS,
    PixelOrder,
    World,
    data_uri,
    engine,
    ids,
    langchain,
    mcp,
    others,
    tool,
    upload,
)

_expected: dict[str, list[str]] = {}


@pytest.mark.parametrize(
    ("form", "way"),
    [
        pytest.param(form, way, marks=[pytest.mark.slow] * (form in SIMILAR and way in ("likelihood", "sheet")))
        for form in FORMS
        for way in WAYS
        if form != "path"
    ],
)
def test_every_form_of_the_query_image_gives_the_order_of_its_path(world: World, form: str, way: str) -> None:
    if way not in _expected:
        _expected[way] = WAYS[way](world, str(world.path))
        assert len(set(_expected[way])) >= 3
    assert WAYS[way](world, FORMS[form](world.path)) == _expected[way]


def test_python_engine_agent_langchain_and_mcp_give_one_order(world: World) -> None:
    bundle = world.model.get_query_bundle(TEXT, world.path.read_bytes())
    retriever = ComposedRetriever(world.store, world.model, top_k=9, exclude_query_image=True)
    expected = ids(PixelOrder().postprocess_nodes(retriever.retrieve(bundle)[:TOP_K], query_bundle=bundle))
    assert engine(world, world.path)[:-1] == langchain(world, world.path) == expected
    assert tool(world, world.path) == mcp(world, world.path)  # these choose from more candidates
    assert set(tool(world, world.path)) <= set(ids(retriever.retrieve(bundle)))


def test_a_bundle_carries_the_bytes_that_were_given_and_exactly_the_pixels_of_an_image_without_a_file(
    world: World,
) -> None:
    data = world.path.read_bytes()
    uri = world.model.get_query_bundle(TEXT, io.BytesIO(data)).image_path
    assert base64.b64decode(uri.partition(",")[2]) == data
    assert uri.startswith("data:image/jpeg;base64,")
    photo = Image.open(world.path)
    for image in (photo, photo.convert("L"), photo.convert("CMYK"), photo.convert("RGBA"), photo.convert("P")):
        bundle = world.model.get_query_bundle(None, image)
        assert bundle.query_str == ""
        assert load_image(bundle.image_path).tobytes() == load_image(image).tobytes()
        assert np.allclose(bundle.embedding, world.model.get_image_embedding(image), atol=1e-6)


def test_a_bundle_is_copied_pickled_and_written_as_json_with_its_image(world: World) -> None:
    bundle = world.model.get_query_bundle(TEXT, world.path.read_bytes())
    expected = ids(others(world, world.path))
    retriever = ComposedRetriever(world.store, world.model, top_k=TOP_K, exclude_query_image=True)
    for twin in (
        copy.deepcopy(bundle),
        pickle.loads(pickle.dumps(bundle)),
        replace(bundle),
        QueryBundle.from_json(bundle.to_json()),
        QueryBundle(TEXT, image_path=bundle.image_path),
        QueryBundle(TEXT, image_path=world.path),  # type: ignore[arg-type]
        QueryBundle(TEXT, image_path=world.path.read_bytes()),  # type: ignore[arg-type]
        QueryBundle(TEXT, image_path=Image.open(world.path)),  # type: ignore[arg-type]
    ):
        assert ids(retriever.retrieve(twin)) == expected
        assert ids(asyncio.run(retriever.aretrieve(twin))) == expected
    for twin in (copy.deepcopy(bundle.image_path), pickle.loads(pickle.dumps(bundle.image_path))):
        assert (twin, repr(twin)) == (bundle.image_path, repr(bundle.image_path))


def test_an_engine_asked_from_an_event_loop_shows_the_same_image(world: World) -> None:
    async def ask(image: Any) -> list[str]:
        llm = ScriptedLLM.of(says("The first."))
        asked = image_query_engine(world.store, world.model, rerank=PixelOrder(), llm=llm, top_k=3)
        response = await asked.aquery(await world.model.aget_query_bundle(None, image))
        return [*ids(response.source_nodes), pixel_digest(Image.open(images_of(llm.asked[0])[0].resolve_image()))]

    assert asyncio.run(ask(world.path.read_bytes())) == asyncio.run(ask(world.path))


def test_words_of_white_space_beside_an_image_are_no_words(world: World) -> None:
    blank, alone = (world.model.get_query_bundle(text, world.path.read_bytes()) for text in ("  ", None))
    assert (blank.query_str, blank.embedding) == (alone.query_str, alone.embedding)


def test_an_upload_can_still_be_saved_after_it_was_the_query(world: World) -> None:
    """It stays open, and where it was."""
    file = io.BytesIO(world.path.read_bytes())
    world.model.get_query_bundle(TEXT, file)
    assert file.read() == world.path.read_bytes()
    end = upload(world.path.read_bytes())
    world.model.get_query_bundle(TEXT, end)
    assert end.tell() == len(world.path.read_bytes())


def test_an_upload_that_can_only_be_awaited_is_refused_with_what_to_do() -> None:
    class Awaited:
        async def read(self, size: int = -1) -> bytes:
            return b""

    with pytest.raises(ImageLoadError, match=r"give the bytes: await file.read\(\)"):
        load_image(Awaited())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros(7, np.uint8),
        np.zeros((4, 5), np.int64),
        np.zeros((4, 5, 3), bool),
        np.zeros((0, 5), np.uint8),
        np.zeros((4, 5), object),
    ],
)
def test_an_array_that_can_be_read_in_several_ways_is_refused_with_what_is_taken(array: Any) -> None:
    with pytest.raises(ImageLoadError, match=r"give uint8 of shape|no pixels"):
        load_image(array)


def test_arrays_of_grey_of_transparency_and_of_truth_values_are_images() -> None:
    """Truth: Pillow's own reading of the same arrays."""
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert load_image(grey).tobytes() == load_image(Image.fromarray(grey)).tobytes()
    assert load_image(grey[:, :, None]).tobytes() == load_image(grey).tobytes()
    assert load_image(grey[::-1, ::2]).tobytes() == load_image(Image.fromarray(grey[::-1, ::2].copy())).tobytes()
    assert load_image(grey > 9).tobytes() == load_image(Image.fromarray(grey > 9)).tobytes()
    clear = np.zeros((2, 2, 4), np.uint8)
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


def test_the_image_of_a_url_is_fetched_once_and_left_out_by_its_url_too(world: World, tmp_path: Path) -> None:
    """Rerankers that may not fetch, and addresses that answer once, are served too."""
    data, asked = world.path.read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/photo.jpg?signature=secret"
        policy = ImagePolicy(allow_urls=True, allow_private_addresses=True)
        bundle = world.model.get_query_bundle(TEXT, url, image_policy=policy)
        with pytest.raises(ImageLoadError, match="fetching URLs is off"):
            world.model.get_query_bundle(TEXT, url)
    finally:
        server.shutdown()
        server.server_close()
    assert "secret" not in repr(bundle)
    nodes = ComposedRetriever(world.store, world.model, top_k=TOP_K, exclude_query_image=True).retrieve(bundle)
    assert ids(nodes) == ids(others(world, world.path))
    by_path = replace(bundle, image_path=str(world.path))
    assert ids(PixelOrder().postprocess_nodes(nodes, bundle)) == ids(PixelOrder().postprocess_nodes(nodes, by_path))
    assert len(asked) == 1
    elsewhere = ImageNode(id_="elsewhere", image_url=url, embedding=bundle.embedding)  # of which no digest is known
    other = ImageNode(id_="other", image_url=url + "&page=2", embedding=bundle.embedding)
    with open_store(tmp_path / "urls.db", world.model) as store:
        store.add([elsewhere, other])
        found = ComposedRetriever(store, world.model, exclude_query_image=True).retrieve(bundle)
    assert ids(found) == ["other"]


def test_the_command_line_takes_a_path_and_a_data_uri_alike(
    tmp_path: Path, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, db = draw_images(tmp_path / "pictures"), tmp_path / "drawn.db"
    path = folder / "phone case" / "natural leopard.jpg"

    def run(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert not ended.value.code, err
        return out

    run("index", folder, "--db", db, "--model", "tiny")
    asked = ("search", "--db", db, "--model", "tiny", "-t", TEXT, "--exclude-query", "-k", 3)
    uri = data_uri(path.read_bytes())
    rows = [json.loads(run(*asked, "--json", "--rerank", "-i", image)) for image in (path, uri)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3
    page = tmp_path / "page.html"
    shown = run(*asked, "-i", uri, "--html", page)
    assert uri[100:150] not in shown
    assert page.read_text(encoding="utf-8").count("data:image/") == 4
