"""Image search as tools for language models, in any host: the arguments they give, and the answers they see.

LlamaIndex's tools, LangChain's and MCP's are thin layers over `ImageSearch`, whose answers are plain dataclasses. The
arguments come from a language model, which repeats untrusted text: paths are read only inside given folders, URLs only
if a policy allows them, filters go through the store's safe translation, and everything that goes out is bounded. Knows
nothing of agents. In this order:

- `arguments.py`: reading the arguments of a model; the descriptions of arguments that it sees.
- `results.py`: answers, as text on single lines, thumbnails and JSON.
- `conversation.py`: the attachments and results of one conversation; the image that an argument names, and its bytes.
- `image_search.py`: `ImageSearch`, on those above.
- `reranking.py`: reranking of results that were shown already.
"""

from mm_retriever.search_tools.arguments import (
    ChangeArgument,
    FiltersArgument,
    ImageArgument,
    QuestionArgument,
    ResultArgument,
    TextArgument,
    TopKArgument,
    check_names,
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
    "check_names",
    "read_filters",
    "without_folders",
]
