"""Find the login of a cloud in the environment: keys, profiles, service accounts, or none for public buckets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from framestream.pipeline.storage.buckets.google_tokens import google_login_kind, google_tokens

S3_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (pip install -e '.[s3]'), "
    "and AWS_REGION to that of the bucket"
)
GS_HINT = (
    "set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account, or use the application default "
    "(pip install -e '.[gs]')"
)
AZ_HINT = "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
LOGIN_HINTS = {"s3": S3_HINT, "gs": GS_HINT, "az": AZ_HINT}
NETWORK_HINTS = {
    "s3": "check the name of the bucket, AWS_REGION, AWS_ENDPOINT_URL and the network",
    "gs": "check GOOGLE_BASE_URL, if it is set, and the network",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT and the network",
}  #: what to do if the server of a cloud cannot be reached

S3_ANY_REGION = "https://{bucket}.s3.amazonaws.com"  #: the name of the host leads to the region of the bucket
AZ_KEYS = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY")
AZ_SAS = ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY")
AZ_TOKENS = (
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_ID",
    "AZURE_CLIENT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_USE_AZURE_CLI",
    "AZURE_IDENTITY_ENDPOINT",
    "AZURE_MSI_ENDPOINT",
)
AWS_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
GS_KEYS = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY")


@dataclass(frozen=True, slots=True)
class BucketLogin:
    """How a cloud is asked.

    ``signs``: addresses are signed. ``anonymous``: they are not. ``token``: they are not, but have ``query`` or are
    asked for with ``headers``. ``unknown``: the machine may have a login of its own, which obstore asks for.
    """

    kind: Literal["signs", "anonymous", "token", "unknown"]
    base: str  #: address of a bucket where it is not signed, with {bucket}
    query: str = ""  #: what addresses end with
    #: of obstore, beside what it reads from the environment; texts may have {bucket}
    config: Mapping[str, Any] = field(default_factory=dict)
    provider: Callable[[], Any] | None = None  #: of credentials, see obstore
    headers: Callable[[], dict[str, str]] | None = None  #: sent with every request for an object

    def anonymous(self) -> BucketLogin:
        return replace(self, kind="anonymous")

    def signing(self) -> BucketLogin:
        return replace(self, kind="signs")


def s3_login() -> BucketLogin:
    """Return the login of Amazon S3 or a compatible service.

    Keys of the environment come first, then what boto3 finds, if it is installed, then the role of the machine.

    Raises:
        PermissionError: half of a login is set, or a profile that cannot be read.
    """
    keys = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if os.environ.get(name)]
    if len(keys) == 1:
        raise PermissionError(f"{keys[0]} is set without its other half; {S3_HINT}")
    region = _first(("AWS_REGION", "AWS_DEFAULT_REGION"))
    endpoint = _first(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    config: dict[str, Any] = {}
    provider = None
    if not keys or not region:
        found = _boto3_settings()
        endpoint, region = endpoint or found.endpoint, region or found.region
        provider = None if keys else found.provider
    if region:
        config["region"] = region
    if endpoint:
        config["endpoint"] = endpoint
    elif not region and not keys:
        config |= {"endpoint": S3_ANY_REGION, "virtual_hosted_style_request": True}
    base = _s3_base(endpoint, region)
    if _is_set("AWS_SKIP_SIGNATURE"):
        return BucketLogin("anonymous", base, config=config)
    if keys or provider or _first(AWS_ROLES):
        return BucketLogin("signs", base, config=config, provider=provider)
    alone = _is_set("AWS_EC2_METADATA_DISABLED")
    return BucketLogin("anonymous" if alone else "unknown", base, config=config)


def gs_login() -> BucketLogin:
    """Return the login of Google Cloud Storage.

    Service accounts with a key sign. Other logins of google-auth, if it is installed, are sent as tokens, and else
    obstore asks the machine.

    Raises:
        PermissionError: a login that cannot be read.
    """
    base = f"{_first(('GOOGLE_BASE_URL',)) or 'https://storage.googleapis.com'}/{{bucket}}"
    if _is_set("GOOGLE_SKIP_SIGNATURE"):
        return BucketLogin("anonymous", base)
    if _first(GS_KEYS):
        return BucketLogin("signs", base)
    kind = google_login_kind(GS_HINT)
    if kind == "service_account":
        return BucketLogin("signs", base)
    tokens = google_tokens(kind, GS_HINT)
    if tokens is None:
        return BucketLogin("unknown", base)
    return BucketLogin("token", base, provider=tokens.credential, headers=tokens.headers)


def az_login() -> BucketLogin:
    """Return the login of Azure Blob Storage: the key of the account, a SAS token, or an identity.

    Raises:
        PermissionError: the account is not named.
    """
    account = _first(("AZURE_STORAGE_ACCOUNT_NAME",))
    endpoint = _first(("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"))
    if not account and not _is_set("AZURE_STORAGE_USE_EMULATOR"):
        raise PermissionError(f"the storage account is not named; {AZ_HINT}")
    base = f"{(endpoint or f'https://{account}.blob.core.windows.net').rstrip('/')}/{{bucket}}"
    if _is_set("AZURE_SKIP_SIGNATURE"):
        return BucketLogin("anonymous", base)
    if _first(AZ_KEYS) or _is_set("AZURE_STORAGE_USE_EMULATOR"):
        return BucketLogin("signs", base)
    if token := _first(AZ_SAS):
        return BucketLogin("token", base, f"?{token.lstrip('?')}")
    return BucketLogin("signs" if _first(AZ_TOKENS) else "unknown", base)


def az_account_key() -> tuple[str, str]:
    """Return the name of the account, and its key or nothing."""
    return _first(("AZURE_STORAGE_ACCOUNT_NAME",)), _first(AZ_KEYS)


@dataclass(frozen=True, slots=True)
class _Boto3Settings:
    """What boto3 finds in profiles and in the machine."""

    provider: Callable[[], Any] | None = None
    region: str = ""
    endpoint: str = ""


def _boto3_settings() -> _Boto3Settings:
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if profile := os.environ.get("AWS_PROFILE"):
            raise PermissionError(f"AWS_PROFILE is {profile}: profiles require boto3: pip install -e '.[s3]'") from None
        return _Boto3Settings()
    try:
        session = boto3.Session()
        provider = Boto3CredentialProvider(session) if session.get_credentials() else None
        endpoint = session._session.get_scoped_config().get("endpoint_url", "")
        return _Boto3Settings(provider, session.region_name or "", endpoint)
    except BotoCoreError as error:
        raise PermissionError(f"{error}; {S3_HINT}") from None


def _s3_base(endpoint: str, region: str) -> str:
    if not endpoint:
        return f"https://s3.{region}.amazonaws.com/{{bucket}}" if region else S3_ANY_REGION
    return endpoint.rstrip("/") + ("" if _is_set("AWS_VIRTUAL_HOSTED_STYLE_REQUEST") else "/{bucket}")


LOGINS: dict[str, Callable[[], BucketLogin]] = {"s3": s3_login, "gs": gs_login, "az": az_login}


def _first(names: tuple[str, ...]) -> str:
    """Return the first of these variables that is set."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "t", "y")
