"""Images in: from any source that a caller may have to a safe, upright RGB image.

- `source.py`, `url.py`: what may be read, and fetching.
- `header.py`, `heif.py`: the bytes before a decoder sees them.
- `memory.py`: how much all threads decode at once.
- `pixels.py`: every kind of pixel as 8-bit RGB.
- `loading.py`: `load_image`, which takes these steps; images as bytes, digests and thumbnails.
- `sheet.py`: numbered grids of images.
"""

from mm_retriever.images.header import sniff_format
from mm_retriever.images.loading import (
    IMAGE_SUFFIXES,
    encode_thumbnail,
    file_size,
    first_readable,
    image_thumbnail,
    is_image_path,
    load_image,
    lossless_bytes,
    media_type,
    opened_image,
    pixel_digest,
    portable_image,
    read_image_bytes,
    thumbnail_data_uri,
)
from mm_retriever.images.source import DEFAULT_POLICY, ImageDataURI, ImagePolicy, ImageSource, is_place, source_name

# fmt: off
__all__ = [
    "DEFAULT_POLICY", "IMAGE_SUFFIXES", "ImageDataURI", "ImagePolicy", "ImageSource", "encode_thumbnail", "file_size",
    "first_readable", "image_thumbnail", "is_image_path", "is_place", "load_image", "lossless_bytes", "media_type",
    "opened_image", "pixel_digest", "portable_image", "read_image_bytes", "sniff_format", "source_name",
    "thumbnail_data_uri",
]
# fmt: on
