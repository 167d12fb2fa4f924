"""The old place of `mm_retriever.images`."""

from mm_retriever.images import *  # noqa: F403
