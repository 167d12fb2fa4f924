"""The sheet has the published layout, shows every image whole, and takes any count and any text."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mm_retriever.images.sheet import before_after, contact_sheet, with_text

COLOURS = ["teal", "orange", "purple", "olive", "navy", "maroon", "gold", "black", "green"]


def images(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[number % len(COLOURS)]) for number in range(count)]


def is_red(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    return (red > 180) & (green < 60) & (blue < 60)


def is_blue(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    return (blue > 200) & (red < 60) & (green < 100)


def test_nine_candidates_and_a_query_are_laid_out_as_published() -> None:
    """Truth: 3 x 3 cells of 300 pixels, a column for the query image at the left: 1200 x 900."""
    sheet = contact_sheet(images(9), Image.new("RGB", (30, 40), "yellow"))
    assert (sheet.mode, sheet.size) == ("RGB", (1200, 900))
    for number, colour in enumerate(COLOURS):
        row, column = divmod(number, 3)
        middle = (300 + column * 300 + 150, row * 300 + 150)
        assert sheet.getpixel(middle) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert sheet.getpixel((150, 450)) == (255, 255, 0)


def test_every_cell_has_a_red_number_in_its_corner_and_only_there() -> None:
    """Truth: pixels that are red; none of the images is."""
    pixels = np.asarray(contact_sheet([Image.new("RGB", (40, 40), "black")] * 7))
    assert pixels.shape == (900, 900, 3)
    for number in range(7):
        row, column = divmod(number, 3)
        cell = is_red(pixels[row * 300 : row * 300 + 300, column * 300 : column * 300 + 300])
        assert cell[:60, :60].sum() > 50
        assert not cell[60:].any()
        assert not cell[:, 60:].any()
    assert (pixels[600:, 300:] == 255).all()  # no eighth and ninth cell


def test_the_query_image_alone_has_a_blue_border() -> None:
    """Truth: pixels that are blue, all in the left column, all round the image."""
    query = Image.new("RGB", (60, 20), "white")
    blue = is_blue(np.asarray(contact_sheet(images(3), query)))
    assert blue[:, :300].sum() > 2 * 10 * 260
    assert not blue[:, 300:].any()
    rows, columns = np.nonzero(blue)
    assert rows.max() - rows.min() < columns.max() - columns.min()  # the frame follows the image's shape
    assert not blue[150, 30:270].any()
    assert not is_blue(np.asarray(contact_sheet(images(3)))).any()


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [
        (1, 3, (300, 300)),
        (2, 3, (600, 300)),
        (3, 3, (900, 300)),
        (4, 3, (900, 600)),
        (50, 5, (1500, 3000)),
        (2, 1, (300, 600)),
    ],
)
def test_any_count_fits(count: int, columns: int, size: tuple[int, int]) -> None:
    """Truth: rows and columns worked out by hand."""
    assert contact_sheet(images(count), columns=columns).size == size
    assert contact_sheet(images(count), images(1)[0], columns=columns).size == (size[0] + 300, size[1])


def test_a_query_alone_is_one_cell() -> None:
    """Truth: no candidates, no grid."""
    assert contact_sheet([], images(1)[0]).size == (300, 300)


@pytest.mark.parametrize("size", [(100, 100), (400, 100), (100, 400), (3000, 10), (10, 3000), (1, 1), (7, 5)])
def test_images_are_fitted_and_never_distorted(size: tuple[int, int]) -> None:
    """Truth: an image's black rectangle keeps its proportions and lies within the cell."""
    pixels = np.asarray(contact_sheet([Image.new("RGB", size, (0, 0, 0))], labels=[""]))
    rows, columns = np.nonzero(pixels.sum(axis=2) < 60)
    width, height = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
    assert max(width, height) == 288
    assert width == max(1, round(288 * size[0] / max(size)))
    assert height == max(1, round(288 * size[1] / max(size)))


def test_a_missing_image_is_a_grey_cell_that_says_so() -> None:
    """Truth: grey in the middle of the cell's side, dark letters at its centre, its number in the corner."""
    pixels = np.asarray(contact_sheet([None, *images(1)]))
    assert len(set(pixels[200, 20])) <= 2
    assert 200 < pixels[200, 20, 0] < 245
    assert (pixels[130:170, 60:240].max(axis=2) < 150).any()
    assert is_red(pixels[:60, :60]).any()


def test_labels_may_be_anything_short() -> None:
    """Truth: wider labels leave more red; no labels leave none."""
    amounts = [
        is_red(np.asarray(contact_sheet([None], labels=[label]))).sum() for label in ("", "1", "12", "123", "A7", "é")
    ]
    assert amounts[0] == 0
    assert amounts[1] < amounts[2] < amounts[3]
    assert min(amounts[4:]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": []}, "at least one"),
        ({"candidates": [None], "labels": ["1", "2"]}, "2 labels for 1 candidates"),
        ({"candidates": [None], "columns": 0}, "columns=0"),
        ({"candidates": [None], "cell": 5}, "cell=5"),
    ],
)
def test_a_sheet_of_nothing_is_refused(arguments: dict[str, object], message: str) -> None:
    """Truth: the message names the value."""
    with pytest.raises(ValueError, match=message):
        contact_sheet(**arguments)  # type: ignore[arg-type]


def test_images_of_any_mode_are_taken_and_left_alone() -> None:
    """Truth: what is transparent is white; the caller's images are unchanged."""
    originals = [Image.new(mode, (20, 20)) for mode in ("L", "RGBA", "CMYK", "P", "1", "I;16")]
    copies = [image.copy() for image in originals]
    sheet = contact_sheet(originals, originals[0])
    assert sheet.getpixel((300 + 450, 150)) == (255, 255, 255)
    assert all(before.tobytes() == after.tobytes() for before, after in zip(copies, originals, strict=True))


def test_the_same_input_gives_the_same_sheet() -> None:
    """Truth: a cached caption or ranking depends on it."""
    once, again = (contact_sheet(images(9), images(1)[0]).tobytes() for _ in range(2))
    assert once == again


# ---------------------------------------------------------------------------------------------- before and after


def test_before_and_after_show_every_candidate_on_both_sides() -> None:
    """Truth: each colour appears twice, and the order on the right is the one given."""
    order = [4, 0, 8, 2, 1, 3, 5, 7, 6]
    figure = before_after(images(9), order, Image.new("RGB", (10, 10), "white"), cell=90)
    pixels = np.asarray(figure)
    left, right = pixels[:, :360], pixels[:, 371:]
    for side, wanted in ((left[:, 90:], range(9)), (right, order)):
        for place, number in enumerate(wanted):
            row, column = divmod(place, 3)
            middle = side[18 + row * 90 + 45, column * 90 + 45]
            assert tuple(middle) == Image.new("RGB", (1, 1), COLOURS[number]).getpixel((0, 0))


def test_only_the_first_after_reranking_has_a_green_frame() -> None:
    """Truth: green pixels lie round the first cell at the right."""
    pixels = np.asarray(before_after([None] * 4, [2, 0, 1, 3], cell=90)).astype(int)
    green = (pixels[..., 1] > 120) & (pixels[..., 0] < 60) & (pixels[..., 2] < 100)
    rows, columns = np.nonzero(green)
    assert (columns.min(), rows.min()) == (3 * 90 + 11, 18)
    assert (columns.max() - columns.min(), rows.max() - rows.min()) == (89, 89)


def test_fewer_may_be_kept_than_were_retrieved() -> None:
    """Truth: top_n of three out of nine."""
    assert before_after(images(9), [3, 1, 2], cell=90).height == 18 + 270


@pytest.mark.parametrize("order", [[], [0, 0], [3], [-1], [0, 1, 2, 3]])
def test_an_order_that_is_no_ranking_is_refused(order: list[int]) -> None:
    """Truth: each candidate at most once, none invented."""
    with pytest.raises(ValueError, match=r"order=\["):
        before_after(images(3), order)


def test_words_stand_below_the_figure() -> None:
    """Truth: the figure grows by the words, and only downwards (a title: upwards)."""
    plain = before_after(images(3), [1, 0, 2], cell=120)
    told = before_after(images(3), [1, 0, 2], cell=120, caption="a leopard", reason="spots " * 80)
    titled = before_after(images(3), [1, 0, 2], cell=120, title="phone case with this")
    assert told.width == titled.width == plain.width
    assert told.height > plain.height + 80
    assert told.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    assert titled.crop((0, titled.height - plain.height, *titled.size)).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "a" * 5_000,
        "word " * 5_000,
        "a\x00b\x1b[31m\u202ecba\ud800",
        "日本語 🐆 עברית",
        "\t<b>&amp;</b>",
        "W" * 601,
    ],
)
def test_no_text_breaks_the_figure_or_makes_it_endless(text: str) -> None:
    """Truth: a caption is whatever a model says; 600 characters are shown."""
    figure = before_after(images(2), [1, 0], cell=120, title=text, caption=text, reason=text)
    assert figure.width == 2 * 240 + 15
    assert figure.height < 2_500


def test_lines_of_text_stay_on_the_paper() -> None:
    """Truth: nothing but white in the margins at the left and the right."""
    figure = Image.new("RGB", (400, 50), "white")
    shown = np.asarray(with_text(figure, above="Wm " * 60, below=[("name", "Wm" * 300), ("other", "i" * 599)]))
    assert (shown[:, :8] == 255).all()
    assert (shown[:, -6:] == 255).all()
    assert (shown < 100).any()


def test_without_words_the_image_is_returned() -> None:
    """Truth: nothing to add."""
    image = Image.new("RGB", (10, 10))
    ImageDraw.Draw(image).point((1, 1), fill="red")
    assert with_text(image) is image
