"""What a store holds, for people: collections, rows, models. Knows nothing of nodes and queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm_retriever.store.collection import stored_model, stored_note
from mm_retriever.store.connection import Connection, check_exists


def describe_store(uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> dict[str, dict[str, Any]]:
    """Return, for each collection, its number of ``rows``, ``dimension`` and ``model``, and what it notes of it.

    Nothing is loaded or changed.

    Raises:
        StoreError: there is no such Milvus Lite file, it is locked, or the server does not answer.
    """
    check_exists(uri)
    connection = Connection(uri, token=token, timeout=timeout)
    try:
        with connection.request("describing the collections"):
            client = connection.client
            found: dict[str, dict[str, Any]] = {}
            for name in sorted(client.list_collections(timeout=timeout)):
                facts = client.describe_collection(name, timeout=timeout)
                vectors = [field["params"]["dim"] for field in facts["fields"] if "dim" in field.get("params", {})]
                found[name] = {
                    "rows": client.get_collection_stats(name, timeout=timeout)["row_count"],
                    "dimension": vectors[0] if vectors else None,
                    "model": stored_model(facts) or "not said",
                }
                if note := stored_note(facts):
                    found[name]["model_note"] = note
            return found
    finally:
        connection.close()
