"""Sign addresses of objects, and list them.

Objects themselves are read from the addresses by ``framestream.pipeline.storage.http``. ``AWS_ENDPOINT_URL`` names a
service that is compatible with S3.

A process forked after obstore was used lacks its threads, and would wait for ever: see
:mod:`framestream.pipeline.storage.buckets.processes`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import obstore
import obstore.store
from obstore.exceptions import BaseError

from framestream.pipeline.storage.buckets.logins import LOGIN_HINTS, LOGINS, NETWORK_HINTS, BucketLogin, az_account_key

BUCKET_URL = re.compile(r"(s3|gs|az)://([A-Za-z0-9$][A-Za-z0-9._-]*)(?:/(.*?))?/*", re.DOTALL)
BUCKET_FORMS = "s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH"
SIGNATURE_LIFETIME = timedelta(hours=6)  #: for which an address is signed, longer than any read may take
CONNECT_TIMEOUT = timedelta(seconds=10)
REQUEST_TIMEOUT = timedelta(seconds=120)  #: of one request, such as a page of a listing or a part of an upload
RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
LOGIN_TIMEOUT = timedelta(seconds=2)  #: in which a machine of the cloud has answered who it is, if it is one


def open_bucket_store(url: str) -> Any:
    """Return the obstore store of ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH`` or ``az://CONTAINER/PATH``.

    Paths of the store are relative to PATH. Login, region and endpoint come from the environment.

    Raises:
        ValueError: the address has another form.
        PermissionError: the login is incomplete, or the account is not named.
    """
    scheme, bucket, path = split_bucket_url(url)
    return _store(scheme, bucket, _login(scheme, url), url, path or None)


def split_bucket_url(url: str) -> tuple[str, str, str]:
    """Return scheme, bucket and path of an address.

    Raises:
        ValueError: it is not one of the :data:`BUCKET_FORMS`.
    """
    found = BUCKET_URL.fullmatch(url)
    if not found or (found[3] and _has_odd_parts(found[3])):
        raise ValueError(f"{url}: not {BUCKET_FORMS}")
    return found[1], found[2], found[3] or ""


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object of a listing."""

    name: str  #: within its folder
    size: int  #: bytes
    etag: str  #: without quotation marks


class BucketCalls:
    """Sign and list what is in the bucket of ``url``; the path of ``url`` is ignored.

    Without a login, addresses are not signed. Messages name the bucket, never a signature.

    Raises:
        PermissionError: the login is incomplete, or the account is not named.
    """

    def __init__(self, url: str) -> None:
        self._scheme, self._bucket, _ = split_bucket_url(url)
        self._root = f"{self._scheme}://{self._bucket}"
        login = _login(self._scheme, self._root)
        if login.kind == "unknown":
            login = self._ask_machine(login)
        self._login = login
        self._store = _store(self._scheme, self._bucket, login, self._root)

    def sign(self, key: str) -> str:
        """Return the address of an object, which is valid for :data:`SIGNATURE_LIFETIME` at most.

        Raises:
            ValueError: the key cannot be asked for.
            PermissionError: the login cannot be renewed.
        """
        if self._login.kind != "signs":
            return f"{self._login.base.format(bucket=self._bucket)}/{quote(key)}{self._login.query}"
        if _has_odd_parts(key):
            raise ValueError(f"{self._root}/{key}: an object whose key has empty parts, . or .. is not read; rename it")
        # obstore 0.12 puts a key into an address of Google as it is, also its % and ?
        for path in (quote(key), key) if self._scheme == "gs" else (key,):
            try:
                url = obstore.sign(self._store, "GET", path, SIGNATURE_LIFETIME)
            except BaseError as error:
                raise self._os_error(error, key, PermissionError) from None
            if unquote(urlsplit(url).path).endswith(f"/{key}"):
                break
        else:
            raise ValueError(f"{self._root}/{key}: obstore signs the address of another object; rename it")
        if self._scheme == "az" and "%" in urlsplit(url).path:
            return self._sign_azure_again(url, key)
        return url

    def headers(self) -> dict[str, str]:
        """Return what is sent with a request for an object, beside its address.

        Raises:
            PermissionError: the login cannot be renewed.
        """
        if self._login.headers is None:
            return {}
        try:
            return self._login.headers()
        except PermissionError as error:
            raise PermissionError(f"{self._root}: {error}") from None

    def files(self, folder: str) -> list[ListedObject]:
        """Return the objects directly in a folder; ``""`` is the root. Empty if the folder is missing.

        Raises:
            OSError: the bucket is missing, refuses, or cannot be reached.
            ValueError: an object has a key that cannot be read.
        """
        try:
            found = obstore.list_with_delimiter(self._store, folder or None)["objects"]
        except BaseError as error:
            raise self._os_error(error, folder, ConnectionError) from None
        return [
            ListedObject(item["path"].rpartition("/")[2], item["size"], (item["e_tag"] or "").strip('"'))
            for item in found
            if item["path"] != folder  # an empty object that some tools make for the folder itself
        ]

    def _sign_azure_again(self, url: str, key: str) -> str:
        """Sign an address of Azure over the decoded key, as Azure does: obstore 0.12 takes the percent-encoded one."""
        account, account_key = az_account_key()
        if not account_key:
            fix = "set AZURE_STORAGE_ACCOUNT_KEY, or rename the object"
            raise ValueError(
                f"{self._root}/{key}: a key with spaces or other such letters needs the account key; {fix}"
            )
        fields = dict(parse_qsl(urlsplit(url).query))
        resource = f"/blob/{account}/{self._bucket}/{key}"
        signed = [fields["sp"], fields["st"], fields["se"], resource, "", "", "", fields["sv"], fields["sr"], *[""] * 7]
        digest = hmac.new(base64.b64decode(account_key), "\n".join(signed).encode(), hashlib.sha256).digest()
        fields["sig"] = base64.b64encode(digest).decode()
        return urlsplit(url)._replace(query=urlencode(fields)).geturl()

    def _ask_machine(self, login: BucketLogin) -> BucketLogin:
        """Return the login of the machine if it is one of the cloud, or else none."""
        quick = {"connect_timeout": LOGIN_TIMEOUT, "timeout": LOGIN_TIMEOUT}
        store = _store(self._scheme, self._bucket, login, self._root, options=quick, retries={"max_retries": 0})
        try:
            obstore.sign(store, "GET", "x", SIGNATURE_LIFETIME)
        except BaseError:
            return login.anonymous()
        return login.signing()

    def _os_error(self, error: BaseError, key: str, otherwise: type[OSError]) -> OSError | ValueError:
        name, line = f"{self._root}/{key}".rstrip("/"), bucket_error_line(error)
        status = re.search(r"status code: (\d{3})", line)
        if isinstance(error, obstore.exceptions.NotFoundError) or (status and status[1] == "404"):
            return FileNotFoundError(f"{name}: no such bucket or object")
        if "invalid path" in line:
            return ValueError(f"{name}: {line}; rename that object")
        refused = (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError)
        if (
            isinstance(error, refused)
            or (status and status[1] in ("400", "401", "403"))
            or otherwise is PermissionError
        ):
            return PermissionError(f"{name}: {line}; {LOGIN_HINTS[self._scheme]}")
        return otherwise(f"{name}: {line}; {'try again later' if status else NETWORK_HINTS[self._scheme]}")


def works_in_this_process() -> bool:
    """Return whether obstore can be used here: not in a process forked after it was used."""
    return not _forked


def bucket_error_line(error: Exception) -> str:
    """Return the message of an error of obstore in one line without addresses, which may hold credentials."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if "error sending request" in line:  # of any kind; obstore does not say more
        return "the server cannot be reached"
    return re.sub(r"https?://[^\s\"']+|\bREDACTED\b", "the server", line)[:300]


def _login(scheme: str, url: str) -> BucketLogin:
    try:
        return LOGINS[scheme]()
    except PermissionError as error:
        raise PermissionError(f"{url}: {error}") from None


def _store(
    scheme: str,
    bucket: str,
    login: BucketLogin,
    url: str,
    prefix: str | None = None,
    options: dict[str, Any] | None = None,
    retries: Any = None,
) -> Any:
    global _used
    _used = True
    kinds = {"s3": obstore.store.S3Store, "gs": obstore.store.GCSStore, "az": obstore.store.AzureStore}
    client: Any = {"connect_timeout": CONNECT_TIMEOUT, "timeout": REQUEST_TIMEOUT, **(options or {})}
    config: Any = {name: v.format(bucket=bucket) if isinstance(v, str) else v for name, v in login.config.items()}
    if login.kind == "anonymous":
        config["skip_signature"] = True
    if login.base.startswith("http:"):  # the user has named this endpoint
        client["allow_http"] = True
    try:
        return kinds[scheme](
            bucket,
            prefix=prefix,
            config=config,
            client_options=client,
            retry_config=retries or RETRIES,
            credential_provider=login.provider,
        )
    except BaseError as error:
        raise PermissionError(f"{url}: {bucket_error_line(error)}; {LOGIN_HINTS[scheme]}") from None


def _has_odd_parts(key: str) -> bool:
    return any(part in ("", ".", "..") for part in key.split("/"))


_used = _forked = False


def _after_fork() -> None:
    global _forked
    _forked = _forked or _used


os.register_at_fork(after_in_child=_after_fork)
