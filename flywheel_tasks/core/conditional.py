"""Puts with a condition on an object store, which pyarrow.fs does not offer: create if absent, replace if unchanged."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from flywheel_tasks.core.errors import FlywheelError


def connect(uri: str, region: str = "") -> Any:
    """The store behind an s3:// or gs:// URI. `region` is the one in which pyarrow found the bucket of an s3:// one."""
    from obstore.store import from_url

    if not uri.startswith("s3://"):
        return from_url(uri)
    config = {"region": region} if region else {}
    options: dict[str, Any] = {"config": config, **_credentials()}
    if endpoint := s3_endpoint():
        config["endpoint"] = endpoint
        options["client_options"] = {"allow_http": endpoint.startswith("http://")}
    return from_url(uri, **options)


def create(store: Any, path: str, data: bytes) -> bool:
    """Create the object, or return False because it is there."""
    import obstore

    try:
        obstore.put(store, path, data, mode="create")
    except obstore.exceptions.AlreadyExistsError:
        return False
    except FileNotFoundError as error:
        raise FlywheelError(f"store: {path}: there is no such bucket: check store.uri") from error
    return True


def replace(store: Any, path: str, old: bytes, new: bytes) -> bool:
    """Replace the object, or return False because it does not hold `old`."""
    import obstore

    try:
        found = obstore.get(store, path)
        if bytes(found.bytes()) != old:
            return False
        seen = {name: found.meta[name] for name in ("e_tag", "version") if found.meta[name] is not None}
        obstore.put(store, path, new, mode=seen)
    except FileNotFoundError:
        return False
    except obstore.exceptions.PreconditionError:
        # The answer to a put may get lost on the way; the client then tries again, and meets what it wrote.
        return bytes(obstore.get(store, path).bytes()) == new
    return True


def s3_endpoint() -> str:
    """Where S3 is, when it is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _credentials() -> dict[str, Any]:
    """Those that the AWS SDK under pyarrow finds too: obstore's own search passes over ~/.aws."""
    with suppress(ImportError, ValueError):  # without boto3, or where it finds none, obstore searches by itself
        from obstore.auth.boto3 import Boto3CredentialProvider

        return {"credential_provider": Boto3CredentialProvider()}
    return {}
