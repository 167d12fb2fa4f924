"""Image search for a model that talks: what it may ask for and name, and what it gets to see, whatever the host.

LlamaIndex's tools, LangChain's and MCP's are thin layers over `ImageSearch`, whose answers are plain dataclasses. The
arguments come from a language model, which repeats untrusted text: paths are read only inside given folders, URLs
only where a policy allows it, filters go through the store's safe translation, and everything that goes out is bounded.
Knows nothing of agents. In this order:

- `arguments.py`: what a model says to what is meant; the descriptions that it reads.
- `results.py`: answers, as text on single lines, thumbnails and JSON.
- `conversation.py`: what one conversation can refer to: its attachments and its earlier results; what an image argument
  names, and its bytes.
- `image_search.py`: `ImageSearch`, on those above.
- `reranking.py`: results that were shown already, in the order of a reranker.
"""

from mm_retriever.search_tools.arguments import (
    ChangeArgument,
    FiltersArgument,
    ImageArgument,
    QuestionArgument,
    ResultArgument,
    TextArgument,
    TopKArgument,
    read_filters,
)
from mm_retriever.search_tools.conversation import ONLY_NAMED, Conversation
from mm_retriever.search_tools.image_search import ImageSearch, Progress
from mm_retriever.search_tools.results import (
    ImageDescription,
    ImageResult,
    Original,
    Part,
    SearchLimits,
    SearchResult,
    without_folders,
)

FoundPicture = ImageResult  # its earlier name
PictureDescription = ImageDescription

__all__ = [
    "ONLY_NAMED",
    "ChangeArgument",
    "Conversation",
    "FiltersArgument",
    "FoundPicture",
    "ImageArgument",
    "ImageDescription",
    "ImageResult",
    "ImageSearch",
    "Original",
    "Part",
    "PictureDescription",
    "Progress",
    "QuestionArgument",
    "ResultArgument",
    "SearchLimits",
    "SearchResult",
    "TextArgument",
    "TopKArgument",
    "read_filters",
    "without_folders",
]
