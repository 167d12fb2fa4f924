"""URLs without signatures, secrets and expiry: the same object under a new signature is the same image."""

from __future__ import annotations

import re
from urllib.parse import unquote, unquote_plus, urlsplit, urlunsplit

# Parameters that never name the object.
_SECRET = re.compile(
    r"x-(amz|goog|oss|cos|obs|bce|tos|qs|ms)-.*|q-(sign-.*|ak|signature|header-list|url-param-list)"
    r"|(aws|oss|google|obs)?access_?key_?id|googleaccessid|access-?key|security-?token|sign(ature)?|sig|hmac|jwt"
    r"|(access|auth|id|session|bearer)?[_-]?token|auth([_-]?key)?|authorization|api[_-]?key|secret|password|passwd"
    r"|key-pair-id|hdn(ts|tl|ea)|__token__|sas|wssecret|verify",
    re.IGNORECASE,
)
# Parameters that belong to a signature if there is one, and may mean anything if there is none.
_WITH_SIGNATURE = re.compile(
    r"e|expir(es?|y)|exp|policy|x-id|wstime|nonce|timestamp|ts|credential|algorithm|signedheaders"
    r"|s[terpvs]|srt|spr|sip?|sdd|skoid|sktid|sk[test]|skv|scid",
    re.IGNORECASE,
)
_HTTP = re.compile(r"https?://", re.IGNORECASE)
_DISCORD = frozenset(("ex", "is", "hm"))


def stable_url(url: str) -> str:
    """Return a URL of the web without signature, credentials and fragment; any other unchanged."""
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
    """Return the last part of a URL's path, decoded, or its host where the path is empty; of a bucket's as it is."""
    if not _HTTP.match(url):
        return url.rstrip("/").rpartition("/")[2]
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.netloc.rpartition("@")[2]
