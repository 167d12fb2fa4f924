"""Servers of models that somebody runs elsewhere: bounded HTTP, repeated requests, what failed and what to do about it.

- `failures.py`: what one answer may cost; errors of any client in plain words; which of them pass, when to ask again.
- `json_server.py`: JSON in, JSON out.

Knows nothing of embedding, reranking and prompts.
"""
