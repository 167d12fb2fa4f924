"""Where an image may come from: every kind of source gives the same bytes, and nothing outside the roots is read."""

from __future__ import annotations

import base64
import io
import os
import random
import socket
import threading
import unicodedata
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, load_image, read_image_bytes, source_name
from tests.support.effort import EFFORT
from tests.support.image_files import encoded


def small(kind: str = "PNG", colour: str = "teal") -> bytes:
    return encoded(Image.new("RGB", (6, 4), colour), kind)


PNG = small()
TEAL = (0, 128, 128)


def refusal(source: object, policy: ImagePolicy | None = None) -> str:
    with pytest.raises(ImageLoadError) as caught:
        load_image(source, policy=policy or ImagePolicy())  # type: ignore[arg-type]
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- kinds of source


def test_every_kind_of_source_gives_the_same_image(tmp_path: Path) -> None:
    """Truth: one PNG, offered in every way."""
    path = tmp_path / "an image.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    with path.open("rb") as file:
        for source in [
            path,
            str(path),
            os.path.relpath(path),
            PNG,
            bytearray(PNG),
            memoryview(PNG),
            memoryview(PNG + PNG)[: len(PNG)],
            io.BytesIO(PNG),
            file,
            text,
            "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
            text.replace("+", "-").replace("/", "_").rstrip("="),
            text.encode(),
            "data:image/png;base64," + text,
            "DATA:image/png;charset=x;BASE64," + text,
            "data:;base64," + text,
            "data:image/png;base64," + quote(text, safe=""),
            "data:image/png," + quote(PNG),
            Image.new("RGB", (6, 4), "teal"),
        ]:
            image = load_image(source)
            assert (image.size, image.getpixel((0, 0))) == ((6, 4), TEAL)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_base64_of_every_format_is_known_from_a_path(kind: str) -> None:
    """Truth: base64 of a JPEG starts with /9j/, as a path could."""
    assert load_image(base64.b64encode(small(kind)).decode()).size == (6, 4)


def test_the_smallest_image_is_known_as_base64() -> None:
    """Truth: the well-known GIF of one pixel, 35 bytes."""
    assert load_image("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7").size == (1, 1)


def test_a_file_object_is_read_from_its_beginning_and_stays_open() -> None:
    """Truth: the contract; a writer leaves its position at the end."""
    file = io.BytesIO()
    file.write(PNG)
    assert load_image(file).size == (6, 4)
    assert load_image(file).size == (6, 4)
    assert not file.closed


def test_a_stream_without_end_is_cut_at_the_limit() -> None:
    """Truth: bytes asked for, counted here."""

    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            assert 0 < size <= 2**20
            self.given += size
            return bytes(size)

    stream = Endless()
    assert "max_bytes" in refusal(stream, ImagePolicy(max_bytes=5 * 2**20))
    assert stream.given == 5 * 2**20 + 1


def test_a_stream_that_gives_a_byte_at_a_time_is_read_to_its_end() -> None:
    """Truth: a short read is no end of file."""

    class Slow:
        def __init__(self) -> None:
            self.file = io.BytesIO(PNG)

        def read(self, size: int) -> bytes:
            return self.file.read(min(size, 1))

    assert load_image(Slow()).size == (6, 4)  # type: ignore[arg-type]


def test_a_file_object_that_fails_is_an_image_load_error() -> None:
    """Truth: one error for whatever goes wrong."""

    class Broken:
        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

    assert "input/output error" in refusal(Broken())
    assert "binary mode" in refusal(io.StringIO("text"))
    closed = io.BytesIO(PNG)
    closed.close()
    assert "closed file" in refusal(closed)


@pytest.mark.parametrize("source", [None, 5, 1.5, [], {}, object(), ("a.png",)])
def test_what_is_no_source_is_refused_by_name(source: object) -> None:
    """Truth: the list of accepted kinds in the message."""
    message = refusal(source)
    assert type(source).__name__ in message
    assert "give a path, URL, data URI, base64, bytes, binary file, PIL image or numpy array" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("no-such-file.png", "no such file"),
        ("a\0b.png", "NUL"),
        ("x" * 300, "file name too long"),
        ("x" * 100_000, "neither a path nor base64"),
        ("ftp://host/a.png", "ftp"),
        ("s3://bucket/a.png", "s3"),
        ("file:///etc/hostname", "file: is not a scheme that is read"),
        ("FILE:/etc/hostname", "FILE: is not a scheme that is read"),
        ("http://127.0.0.1/a.png", "allow_urls"),
        ("HTTPS://example.org/a.png", "allow_urls"),
        ("data:text/html;base64,AAAA", "text/html"),
        ("data:image/png;base64,!!!!", "not base64"),
        ("data:image/png;base64,", "zero bytes"),
        ("data:image/png", "data"),
        (base64.b64encode(PNG + bytes(40)).decode() + "ä", "not base64"),
    ],
)
def test_text_that_leads_to_no_image_is_refused(text: str, reason: str) -> None:
    """Truth: the reason each of them is wrong."""
    assert reason in refusal(text)


def test_limits_hold_before_anything_is_decoded_or_copied() -> None:
    """Truth: limit of 1,000 bytes."""
    policy = ImagePolicy(max_bytes=1_000)
    text = base64.b64encode(PNG + bytes(2_000)).decode()
    for source in [
        text,
        text.encode(),
        "data:image/png;base64," + text,
        "data:image/png," + "%00" * 2_000,
        bytes(9_999),
    ]:
        assert "max_bytes" in refusal(source, policy)


def test_read_image_bytes_gives_the_file_as_it_is(tmp_path: Path) -> None:
    """Truth: the bytes written; a PIL image has none."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    assert read_image_bytes(path) == read_image_bytes(PNG) == PNG
    with pytest.raises(ImageLoadError, match="no file bytes"):
        read_image_bytes(Image.new("RGB", (1, 1)))
    with pytest.raises(ImageLoadError, match="max_bytes"):
        read_image_bytes(path, policy=ImagePolicy(max_bytes=10))


def test_names_hide_what_is_secret_or_long() -> None:
    """Truth: passwords and signatures in URLs do not belong in logs."""
    assert source_name("https://user:word@host.org/a.png?sig=secret#x") == "'https://host.org/a.png'"
    assert (
        source_name("data:image/png;base64," + "A" * 999)
        == "'data:image/png;base64,AAAAAAAAAAAAAAAAAA'... (1021 characters)"
    )
    assert source_name(PNG) == f"<{len(PNG)} bytes>"
    assert source_name(Image.new("L", (3, 4))) == "<L image of 3x4>"
    assert source_name(Path("a\nb.png")) == r"'a\nb.png'"
    assert source_name(io.BytesIO()) == "<BytesIO>"


def test_a_file_of_a_terabyte_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    """A hole of a file: it takes no disk, and would take the memory."""
    path = tmp_path / "hole.png"
    path.touch()
    os.truncate(path, 2**40)
    assert f"{2**40} bytes, more than the limit" in refusal(path)


# ---------------------------------------------------------------------------------------------- what is no file


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/random", "/dev/null", "/dev/tty", "/dev/stdin"])
def test_devices_are_refused(device: str) -> None:
    """Truth: reading /dev/zero never ends."""
    if not Path(device).exists() or Path(device).is_file():
        pytest.skip(f"no device {device} here")
    assert "a device, pipe or socket, not a file" in refusal(device)


def test_pipes_sockets_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    """Truth: opening a pipe without a writer blocks for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    reason = "a device, pipe or socket, not a file"  # not the name, which has the word too
    assert reason in refusal(tmp_path / "pipe.png")
    assert reason in refusal(tmp_path / "pipe.png", ImagePolicy(roots=(tmp_path,)))
    here = Path.cwd()
    os.chdir(tmp_path)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.png")
    finally:
        os.chdir(here)
    assert reason in refusal(tmp_path / "socket.png")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert "a folder" in refusal(tmp_path / "folder.png", ImagePolicy(roots=(tmp_path,)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    """Truth: the system's own reason."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    path.chmod(0)
    assert "permission denied" in refusal(path)


def test_a_name_is_found_in_composed_and_in_decomposed_letters(tmp_path: Path) -> None:
    """A Mac writes letters and their accents apart; people type them as one. The form that was given comes first."""
    composed, decomposed = (unicodedata.normalize(form, "M\u00fcller.png") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).write_bytes(PNG)
    for policy in (ImagePolicy(), ImagePolicy(roots=(tmp_path,))):
        assert read_image_bytes(tmp_path / composed, policy=policy) == PNG
    (tmp_path / composed).write_bytes(small("BMP"))
    assert read_image_bytes(tmp_path / composed) == small("BMP")
    assert read_image_bytes(str(tmp_path / decomposed)) == PNG
    assert "M\u00fcller.jpg': no such file" in refusal(tmp_path / "M\u00fcller.jpg")


def test_a_tilde_is_the_home_folder_for_images_and_for_roots(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for stores, sidecars and folders: programs take paths from settings, where no shell expands it."""
    monkeypatch.setenv("HOME", str(folders))
    for source in ("~/root/a.png", Path("~/root/a.png")):
        assert load_image(source).size == (6, 4)
    within = ImagePolicy(roots=("~/root",))  # type: ignore[arg-type]
    assert load_image(folders / "root/a.png", policy=within).size == (6, 4)
    refusal("~/root/a.png", within)  # whoever is limited to folders names no others


# ---------------------------------------------------------------------------------------------- roots


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """root/a.png, root/sub/b.png and outside/secret.png, with links in every direction."""
    for name in ("root/a.png", "root/sub/b.png", "outside/secret.png", "root-not/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    root = tmp_path / "root"
    (root / "link-in.png").symlink_to(root / "sub" / "b.png")
    (root / "link-out.png").symlink_to(tmp_path / "outside" / "secret.png")
    (root / "link-relative-out.png").symlink_to("../outside/secret.png")
    (root / "folder-out").symlink_to(tmp_path / "outside")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "device.png").symlink_to("/dev/zero")
    (tmp_path / "link-to-root").symlink_to(root)
    return tmp_path


def test_files_inside_the_roots_are_read(folders: Path) -> None:
    """Truth: a path that ends inside is inside, whatever it looks like."""
    policy = ImagePolicy(roots=(folders / "root",))
    inside = [
        folders / "root/a.png",
        folders / "root/sub/b.png",
        folders / "root/link-in.png",
        folders / "link-to-root/a.png",
        "a.png",
        "sub/b.png",
    ]
    for source in inside:
        assert load_image(source, policy=policy).size == (6, 4)
    assert load_image(folders / "root/a.png", policy=ImagePolicy(roots=(folders / "link-to-root",))).size == (6, 4)
    assert load_image("secret.png", policy=ImagePolicy(roots=(folders / "root", folders / "outside"))).size == (6, 4)


@pytest.mark.parametrize(
    "path",
    ["outside/secret.png", "root/../outside/secret.png", "root/sub/../a.png", "root/link-out.png",
     "root/link-relative-out.png", "root/folder-out/secret.png", "root/device.png", "root/loop.png", "root-not/c.png",
     "root", "root/a.png\0", "root/a.png/x", "root/missing.png", "/etc/hostname", "/proc/self/environ", "/dev/zero",
     "~/secret.png"],
)  # fmt: skip
def test_files_outside_the_roots_are_refused(folders: Path, tried: Counter[str], path: str) -> None:
    """Truth: none of these names a regular file inside root without '..'."""
    tried["paths outside the roots"] += 1
    refusal(str(folders / path), ImagePolicy(roots=(folders / "root",)))


def test_the_system_s_own_links_do_not_lead_out(folders: Path, tried: Counter[str]) -> None:
    """Truth: /proc has links that `realpath` cannot see through, also from inside; and a chain of links can be long."""
    root, secret = folders / "root", folders / "outside/secret.png"
    policy = ImagePolicy(roots=(root,))
    for number in range(1_500):
        (root / f"chain {number}.png").symlink_to(f"chain {number + 1}.png")
    (root / "chain 1500.png").symlink_to(secret)
    with secret.open("rb") as file:
        ways = [f"/proc/self/fd/{file.fileno()}", f"/dev/fd/{file.fileno()}", f"/proc/self/root{secret}"]
        for number, way in enumerate(ways):
            (root / f"way {number}.png").symlink_to(way)
        (root / "all").symlink_to("/proc/self/root")
        inside = [f"way {number}.png" for number in range(len(ways))]
        names = [*ways, *inside, f"all{secret}", "chain 0.png", "chain 9.png"]
        for name in names:
            tried["paths outside the roots"] += 1
            refusal(name, policy)
            refusal(root / name, policy)


def test_no_path_of_any_make_leads_out(folders: Path, monkeypatch: pytest.MonkeyPatch, tried: Counter[str]) -> None:
    """Truth: what lies outside is red. Paths of pieces that mean something to a file system, from three folders."""
    for path in ("outside/secret.png", "outside/a.png", "root-not/c.png", "root-not/a.png"):
        (folders / path).write_bytes(small(colour="red"))
    (folders / "root/sub/up").symlink_to("..")
    (folders / "root/sub/upup").symlink_to("../..")
    policy, chance, outcomes = ImagePolicy(roots=(folders / "root",)), random.Random(7), Counter[str]()
    pieces = [
        *("root", "outside", "sub", "up", "upup", "a.png", "b.png", "c.png", "secret.png", "link-in.png"),
        *("link-out.png", "folder-out", "link-to-root", "root-not", "..", ".", "", "~", "file:", "file://"),
        *("/proc/self/cwd", "/proc/self/root", "\\", "%2e%2e", "..%2f", "\u2025", "\uff0e\uff0e", " ", "\n"),
        *("\0", "\udc80", str(folders)),
    ]
    files = ("a.png", "b.png", "c.png", "secret.png") * 9
    starts = ["", "", str(folders / "root"), str(folders)]
    for _ in range(3_000 * EFFORT):
        monkeypatch.chdir(folders / chance.choice(("", "root", "outside")))
        folder, name = chance.choices(pieces, k=chance.randint(0, 3)), chance.choice((*pieces, *files))
        path = "/".join([chance.choice(starts), *folder, name]).removeprefix("/")
        path = path if chance.random() < 0.5 else "/" + path
        tried["paths outside the roots"] += 1
        try:
            assert load_image(path, policy=policy).getpixel((0, 0)) == TEAL, path
            outcomes["read"] += 1
        except ImageLoadError:
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20 * EFFORT


def test_relative_paths_cannot_climb_out(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: '..' is refused as such, from the root and from the working directory."""
    monkeypatch.chdir(folders / "root")
    policy = ImagePolicy(roots=(folders / "root",))
    assert load_image("sub/b.png", policy=policy).size == (6, 4)
    assert "'..' is not allowed" in refusal("../outside/secret.png", policy)
    assert "'..' is not allowed" in refusal("sub/../a.png", policy)
    assert "outside" in refusal("folder-out/secret.png", policy)
    assert "file:" in refusal(f"file://{folders}/root/a.png", policy)


def test_a_relative_root_is_taken_from_the_working_directory(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: what a user types on the command line."""
    monkeypatch.chdir(folders)
    policy = ImagePolicy(roots=("root",))  # type: ignore[arg-type]
    assert load_image("root/a.png", policy=policy).size == (6, 4)
    assert load_image("a.png", policy=policy).size == (6, 4)
    assert ImagePolicy(roots="root").roots == (Path("root"),)  # type: ignore[arg-type]


def test_no_root_means_no_file(folders: Path) -> None:
    """Truth: an empty list of folders allows nothing; bytes need no folder."""
    policy = ImagePolicy(roots=())
    assert "outside" in refusal(folders / "root/a.png", policy)
    assert load_image(PNG, policy=policy).size == (6, 4)


def test_a_refusal_tells_nothing_about_files_outside(folders: Path) -> None:
    """Truth: a file that exists and one that does not must look the same."""
    policy = ImagePolicy(roots=(folders / "root",))
    there = refusal(folders / "outside/secret.png", policy)
    not_there = refusal(folders / "outside/absent.png", policy)
    assert there.replace("secret", "absent") == not_there


@pytest.mark.skipif(os.open not in os.supports_dir_fd, reason="needs openat")
def test_a_folder_swapped_for_a_link_while_opening_never_leads_out(folders: Path, tried: Counter[str]) -> None:
    """Truth: the secret has another colour; a thread swaps folder and link as fast as it can while we read."""
    (folders / "outside/b.png").write_bytes(small(colour="red"))
    policy = ImagePolicy(roots=(folders / "root",))
    real, link, spot = folders / "root/real", folders / "root/link", folders / "root/sub"
    link.symlink_to(folders / "outside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            spot.rename(real)
            link.rename(spot)
            spot.rename(link)
            real.rename(spot)

    def attempt() -> str:
        try:
            assert load_image(spot / "b.png", policy=policy).getpixel((0, 0)) == TEAL
        except ImageLoadError:
            return "refused"
        return "read"

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = {"read": 0, "refused": 0}
    try:
        for _ in range(1_500 * EFFORT):
            outcomes[attempt()] += 1
            tried["paths outside the roots"] += 1
    finally:
        stop.set()
        thread.join()
    assert outcomes["refused"] > 0
