"""What an image argument may name: attachments, results of the conversation, allowed paths."""

from __future__ import annotations

import base64
import threading
import unicodedata

import pytest
from PIL import Image

from mm_retriever.errors import ImageLoadError, MMRetrieverError, QueryError
from mm_retriever.images import ImagePolicy
from mm_retriever.search_tools import Conversation, ImageSearch


def test_an_image_is_known_by_attachment_result_id_data_uri_and_allowed_path(store, embed_model, leopard, talk):
    """The five ways that the argument's description gives."""
    search = ImageSearch(store, embed_model, image_policy=ImagePolicy(roots=(leopard.parent,)))
    found = search.search("phone case", conversation=talk)
    node_id = found.results[0].id
    uri = "data:image/png;base64," + base64.b64encode(leopard.read_bytes()).decode()
    by_attachment, by_uri, by_path = (
        [one.id for one in search.search(image=image, conversation=talk).results]
        for image in ("PHOTO.png", uri, str(leopard))
    )
    assert by_attachment == by_uri == by_path
    by_result = search.describe("result 1 of search 1", conversation=talk)
    assert by_result.id == search.describe(node_id).id == node_id
    for spelling in ("#1", "1", "Result 1", "picture 1", "no. 1 of search 1", 1, 1.0):
        search.search("phone case", conversation=talk)
        assert search.describe(spelling, conversation=talk).id == node_id


def test_the_latest_attachment_needs_no_name(search, talk, leopard):
    assert search.describe("attachment", conversation=talk).name == "attachment 'photo.png'"


@pytest.mark.parametrize(
    "image",
    ["/etc/passwd", "../../etc/passwd.png", "/etc/hostname.png", "file:///etc/passwd", "http://127.0.0.1/a.png"],
)
def test_by_default_no_path_and_no_url_is_read(search, talk, image):
    with pytest.raises(MMRetrieverError) as refused:
        search.search(image=image, conversation=talk)
    assert "root:" not in str(refused.value)


def test_a_path_outside_the_roots_is_refused_even_through_a_link(store, embed_model, leopard, tmp_path):
    (tmp_path / "link.png").symlink_to(leopard)
    search = ImageSearch(store, embed_model, image_policy=ImagePolicy(roots=(tmp_path,)))
    for image in (str(leopard), str(tmp_path / "link.png")):
        with pytest.raises(ImageLoadError, match="outside the folders"):
            search.search(image=image)


def test_an_unknown_image_is_answered_with_what_is_known(search, talk):
    with pytest.raises(QueryError, match=r"no image is known as 'phone\.png'.*attached are 'photo\.png'"):
        search.search(image="phone.png", conversation=talk)
    with pytest.raises(QueryError, match="nothing was found yet"):
        search.find_similar("result 3", conversation=talk)
    search.search("mug", top_k=2, conversation=talk)
    with pytest.raises(QueryError, match="search 1 found 2"):
        search.find_similar("result 3", conversation=talk)
    with pytest.raises(QueryError, match="there is no search 9"):
        search.find_similar("result 1 of search 9", conversation=talk)


def test_without_a_conversation_results_are_named_by_id(search):
    found = search.search("mug", top_k=1)
    assert "by id" in found.heading
    with pytest.raises(QueryError, match="give the id"):
        search.describe("result 1")


def test_conversations_do_not_see_each_other(search, leopard):
    """ "result 1" of one is nothing in the other, nor is its attachment."""
    one, other = Conversation(), Conversation()
    one.attach("secret.png", leopard)
    search.search("mug", conversation=one)
    for image in ("result 1", "secret.png"):
        with pytest.raises(QueryError) as refused:
            search.describe(image, conversation=other)
        assert "attached are" not in str(refused.value)


def test_many_threads_may_search_in_many_conversations(search):
    """Each keeps its own results in its own order."""
    failures: list[str] = []

    def talk(kind: str) -> None:
        conversation = Conversation()
        for round_ in range(3):
            found = search.search(f"a {kind}", top_k=2, conversation=conversation)
            same = search.describe("result 2", conversation=conversation)
            if found.number != round_ + 1 or same.id != found.results[1].id:
                failures.append(kind)

    threads = [threading.Thread(target=talk, args=(kind,)) for kind in ("mug", "umbrella", "phone case", "mug")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_attachment_is_checked_when_it_is_attached(tmp_path):
    conversation = Conversation()
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(ImageLoadError):
        conversation.attach("no.png", tmp_path / "no.png")
    for wrong in ("result 3", "7", "", "data:x", "http://x/y.png", "two\nlines", "x" * 300):
        with pytest.raises(QueryError, match="attachment name"):
            conversation.attach(wrong, Image.new("RGB", (8, 8)))
    assert conversation.attachments == ()


def test_very_many_attachments_and_searches_are_not_kept():
    conversation = Conversation()
    for number in range(80):
        conversation.attach(f"image {number:03}.png", Image.new("RGB", (2, 2)))
        conversation.remember([str(number)])
    assert len(conversation.attachments) == 64
    assert conversation.attachments[-1] == "image 079.png"
    with pytest.raises(QueryError, match="searches 49 to 80"):
        conversation.result(1, 2)


def test_an_attachment_is_known_in_every_unicode_form_of_its_name(leopard):
    """A Mac uploads names in decomposed letters; models write composed ones."""
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD"))
    conversation = Conversation()
    conversation.attach(decomposed, leopard)
    assert conversation.attachment(composed) is conversation.attachment(decomposed.upper()) is not None
    conversation.attach(composed, leopard)
    assert conversation.attachments == (composed,)
