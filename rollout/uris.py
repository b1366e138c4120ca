"""Locations as users write them: a path, or a URI of a file system that `pyarrow.fs` knows.

A URI may carry what its file system needs, as pyarrow documents it: `s3://bucket/runs?region=eu-west-1`,
`?endpoint_override=...` and `?scheme=http` for another server than the provider's, `gs://anonymous@bucket/runs`.
It may carry credentials too (`s3://key:secret@bucket/runs`); those are never written or shown.
"""

from __future__ import annotations

import re

__all__ = ["child_of", "is_uri", "store_cause", "with_patience", "without_secrets"]

_PATIENCE_S = 60
"""For how long a request to GCS is tried again; its client's own limit is a quarter of an hour."""

_SECRETS = re.compile(r"^([a-z][a-z0-9+.-]*://)[^/?#@:]+:[^?#@]*@", re.IGNORECASE)

_CAUSES = (
    (r"NO_SUCH_BUCKET|Bucket '.*' not found", "there is no such bucket: make it first", False),
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|"
        r"PERMISSION_DENIED|UNAUTHENTICATED|HTTP status 40[13]",
        "access is denied: give credentials that may read and write there (S3: AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or a profile; GCS: GOOGLE_APPLICATION_CREDENTIALS)",
        False,
    ),
    (
        r"NETWORK_CONNECTION|CURL error|curlCode|UNAVAILABLE",
        "the store does not answer: check the endpoint, the region and the network",
        True,
    ),
)
"""(what the clients of S3 and GCS say, what it means, whether it may pass)."""


def is_uri(location: str) -> bool:
    """Whether it is a URI, and not a local path."""
    return "://" in location


def child_of(location: str, name: str) -> str:
    """The location of a folder in another one: the query of a URI stays at its end."""
    if not is_uri(location):
        return f"{location.rstrip('/')}/{name}"
    folder, mark, query = location.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def without_secrets(location: str) -> str:
    """The location without a user's name and password, as it may be recorded and shown."""
    return _SECRETS.sub(r"\1", location)


def with_patience(uri: str) -> str:
    """The URI with a limit of the time for which its client tries a request again, if it needs one."""
    if not re.match(r"(gs|gcs)://", uri, re.IGNORECASE) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_PATIENCE_S}"


def store_cause(error: BaseException) -> tuple[str, bool] | None:
    """What an error of a store's client means, and whether it may pass; None where that is not known."""
    return next((cause[1:] for cause in _CAUSES if re.search(cause[0], str(error))), None)
