"""URLs without what is signed, secret or soon over: the same object under a new signature is the same image.

Knows nothing of the network.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, unquote_plus, urlsplit, urlunsplit

# Parameters that are never part of what an object is called.
_SECRET = re.compile(
    r"x-(amz|goog|oss|cos|obs|bce|tos|qs|ms)-.*|q-(sign-.*|ak|signature|header-list|url-param-list)"
    r"|(aws|oss|google|obs)?access_?key_?id|googleaccessid|access-?key|security-?token|sign(ature)?|sig|hmac|jwt"
    r"|(access|auth|id|session|bearer)?[_-]?token|auth([_-]?key)?|authorization|api[_-]?key|secret|password|passwd"
    r"|key-pair-id|hdn(ts|tl|ea)|__token__|sas|wssecret|verify",
    re.IGNORECASE,
)
# Parameters that are part of a signature where one is there, and may mean anything where none is.
_WITH_SIGNATURE = re.compile(
    r"e|expir(es?|y)|exp|policy|x-id|wstime|nonce|timestamp|ts|credential|algorithm|signedheaders"
    r"|s[terpvs]|srt|spr|sip?|sdd|skoid|sktid|sk[test]|skv|scid",
    re.IGNORECASE,
)
_HTTP = re.compile(r"https?://", re.IGNORECASE)
_DISCORD = frozenset(("ex", "is", "hm"))


def stable_url(url: str) -> str:
    """Return a URL of the web without signature, credentials and fragment; any other as it is, letter for letter."""
    if not _HTTP.match(url):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    fields = parts.query.split("&") if parts.query else []
    names = [unquote_plus(field.partition("=")[0]).strip().lower() for field in fields]
    signed = any(map(_SECRET.fullmatch, names))
    drop = {name for name in names if _SECRET.fullmatch(name) or (signed and _WITH_SIGNATURE.fullmatch(name))}
    if names and set(names) >= _DISCORD:
        drop |= _DISCORD
    if not drop and "@" not in parts.netloc and not parts.fragment:
        return url
    kept = "&".join(field for field, name in zip(fields, names, strict=True) if name not in drop and field)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, kept, ""))


def url_file_name(url: str) -> str:
    """Return the last part of a URL's path, readable; its host where the path is empty.

    What is no URL of the web, a file in a bucket, is taken letter for letter.
    """
    if not _HTTP.match(url):
        return url.rstrip("/").rpartition("/")[2]
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.netloc.rpartition("@")[2]
