"""Locations as users write them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pyarrow import fs

from rollout.errors import SinkError
from rollout.trajectory.storage import Storage
from rollout.uris import child_of, store_cause, with_patience, without_secrets


@pytest.mark.parametrize(
    ("location", "child"),
    [
        ("runs", "runs/x"),
        ("/runs/", "/runs/x"),
        ("s3://bucket", "s3://bucket/x"),
        ("s3://bucket/runs/?region=r&scheme=http", "s3://bucket/runs/x?region=r&scheme=http"),
        ("what?", "what?/x"),
    ],
)
def test_a_child_comes_before_the_query_of_a_uri(location: str, child: str) -> None:
    assert child_of(location, "x") == child


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("s3://key:secret@bucket/runs?region=r", "s3://bucket/runs?region=r"),
        ("s3://key:not/quoted@bucket/runs", "s3://bucket/runs"),
        ("gs://anonymous@bucket/runs", "gs://anonymous@bucket/runs"),
        ("s3://bucket/a:b/c@d", "s3://bucket/a:b/c@d"),
        ("runs/a:b@c", "runs/a:b@c"),
    ],
)
def test_credentials_are_not_shown(location: str, shown: str) -> None:
    assert without_secrets(location) == shown


def test_only_gcs_needs_a_limit_of_its_retries() -> None:
    assert with_patience("s3://bucket/x") == "s3://bucket/x"
    assert with_patience("gs://bucket/x") == "gs://bucket/x?retry_limit_seconds=60"
    assert with_patience("gs://bucket/x?scheme=http") == "gs://bucket/x?scheme=http&retry_limit_seconds=60"
    assert with_patience("gs://b/x?retry_limit_seconds=5") == "gs://b/x?retry_limit_seconds=5"


@pytest.mark.parametrize(
    ("said", "meaning", "may_pass"),
    [
        # As the client of S3 said it to a server.
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation", "no such bucket", False),
        (
            "Bucket 'x' not found. To create buckets, enable the allow_",
            "no such bucket",
            False,
        ),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body", "access is denied", False),
        ("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation", "access is denied", False),
        ("AWS Error NETWORK_CONNECTION during HeadBucket operation: curlCode: 6", "does not answer", True),
        # As that of GCS did.
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted", "does not answer", True),
    ],
)
def test_what_a_client_says_is_said_plainly(said: str, meaning: str, may_pass: bool) -> None:
    cause = store_cause(OSError(said))
    assert cause is not None
    assert meaning in cause[0]
    assert cause[1] is may_pass


def test_what_is_not_known_is_said_as_it_is(tmp_path: Path) -> None:
    assert store_cause(OSError("something else")) is None
    storage = Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")
    assert storage.failure(OSError("odd"), "cannot do it").message == "cannot do it: OSError: odd"


def test_an_open_folder_is_a_location_and_travels(tmp_path: Path) -> None:
    folder = Storage.of(tmp_path.as_uri()).child("a")
    assert Storage.of(folder) is folder
    assert str(folder) == f"{tmp_path.as_uri()}/a"
    assert folder.local == tmp_path / "a"
    assert folder.name == "a"
    again = pickle.loads(pickle.dumps(folder))
    assert (again.root, again.local, str(again)) == (folder.root, folder.local, str(folder))


def test_a_uri_that_cannot_be_read_does_not_show_its_secret() -> None:
    with pytest.raises(SinkError, match="cannot open s3://bucket/runs: ") as caught:
        Storage.of("s3://key:not/quoted@bucket/runs")
    assert "quoted" not in caught.value.message
