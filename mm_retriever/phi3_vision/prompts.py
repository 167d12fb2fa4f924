"""What the reranker says to the model: the words around images, the same for published and bundled weights.

The bundled model was trained on exactly these sentences. Images and control tokens are not in them: they are put in
by position, so that nothing a user or a document says can speak for the model. Knows nothing of models.

A conversation about one query, of which every line is computed once and shared by what follows:

    user       [query image] ASK_COMPOSED                (or ASK_TEXT, or ASK_PICTURE)
    assistant  ANSWER_PICTURE caption ANSWER_WANTED wanted description
    user       [sheet of candidates] RANK_SHEET            then the ranking, under constraint
    user       [the first one] ASK_REASON                  then the reason

A conversation about one candidate, for its likelihood:

    user       DESCRIBE [candidate image]
    assistant  the wanted description, scored and not generated
"""

from __future__ import annotations

ASK_COMPOSED = "Someone shows this picture and asks: {query}\nSay what the picture shows, then what is wanted."
ASK_PICTURE = "Someone shows this picture and asks for more like it.\nSay what the picture shows, then what is wanted."
ASK_TEXT = "Someone asks: {query}\nSay what is wanted."

ANSWER_PICTURE = "Picture:"
ANSWER_WANTED = "\nWanted:"

DESCRIBE = "Describe the picture in a few words.\n"
DESCRIBE_TEXT = "Describe this in a few words: {text}\n"

ASK_FITS = "\nDoes this picture show what is wanted? Answer yes or no."
ASK_REASON = "\nThis was found. Say in one sentence why it fits."

RANK_SHEET = (
    "\nThis sheet shows {count} candidates, each with its number in red, and the query picture in a blue frame if "
    "there is one. Rank all of them by how well they fit what is wanted, the best first. "
    "Answer with their numbers only."
)
ANSWER_RANKING = "Ranking:"
