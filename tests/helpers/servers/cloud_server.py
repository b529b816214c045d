"""Google Cloud Storage and Azure Blob Storage on the loopback interface, as far as obstore and ranged reads need them.

Objects are given out to addresses with the right signature only, which is computed here from the documentation of the
two clouds. Objects are put with their metadata, and asked for it, and folders listed, with any login.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import re
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

ACCOUNT, ACCOUNT_KEY = "me", base64.b64encode(b"secret of the account").decode()
TOKEN = "token-of-the-lab"  #: of logins without a key
EMAIL = "me@lab.iam.gserviceaccount.com"


class Cloud:
    """Objects by ``BUCKET/KEY``, the address, the requests made, and whether reading needs a signature."""

    def __init__(self, kind: str) -> None:
        self.kind, self.objects, self.asked, self.public = kind, {}, [], False
        self.metadata = {}  # headers with the metadata of an object, as they came
        self.url, self.key = "", None

    def environment(self) -> dict[str, str]:
        """Return the variables of a login."""
        if self.kind == "az":
            names = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ENDPOINT")
            return dict(zip(names, (ACCOUNT, ACCOUNT_KEY, f"{self.url}/{ACCOUNT}"), strict=True))
        private = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {"type": "service_account", "client_email": EMAIL, "private_key": private.decode()}
        account |= {"private_key_id": "1", "gcs_base_url": self.url}
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "GOOGLE_BASE_URL": self.url}

    def token_environment(self, folder: Path) -> dict[str, str]:
        """Return the variables of a login of Google without a key, written into ``folder``."""
        (folder / "subject").write_text("subject")
        login = {"type": "external_account", "audience": "//iam.googleapis.com/lab", "token_url": f"{self.url}/token"}
        login |= {"subject_token_type": "urn:ietf:params:oauth:token-type:jwt"}
        login |= {"credential_source": {"file": str(folder / "subject")}}
        (folder / "login.json").write_text(json.dumps(login))
        return {"GOOGLE_APPLICATION_CREDENTIALS": str(folder / "login.json"), "GOOGLE_BASE_URL": self.url}

    def name(self, path: str) -> str:
        """Return BUCKET/KEY of a path. Addresses of Azure begin with the account, as those of its emulator do."""
        return unquote(path).removeprefix(f"/{ACCOUNT}/" if self.kind == "az" else "/")

    def refuses(self, path: str, query: str) -> bool:
        """Return whether an address has no valid signature."""
        fields = dict(parse_qsl(query, keep_blank_values=True))
        return not self.public and not (self._is_sas if self.kind == "az" else self._is_v4)(path, query, fields)

    @staticmethod
    def _is_sas(path: str, query: str, fields: dict[str, str]) -> bool:
        resource = f"/blob{unquote(path)}"
        names = ("sp", "st", "se", resource, "", "", "", "sv", "sr", "", "", "", "", "", "", "")
        text = "\n".join(name if name.startswith("/") else fields.get(name, "") for name in names)
        digest = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return fields.get("se", "") > now and base64.b64encode(digest).decode() == fields.get("sig")

    def _is_v4(self, path: str, query: str, fields: dict[str, str]) -> bool:
        if path != quote(unquote(path)):  # Google wants reserved letters percent-encoded
            return False
        signed = sorted(part for part in query.split("&") if not part.startswith("X-Goog-Signature="))
        request = f"GET\n{path}\n{'&'.join(signed)}\nhost:storage.googleapis.com\n\nhost\nUNSIGNED-PAYLOAD"
        date, credential = fields.get("X-Goog-Date", ""), fields.get("X-Goog-Credential", "")
        scope, digest = credential.removeprefix(f"{EMAIL}/"), hashlib.sha256(request.encode()).hexdigest()
        text = f"GOOG4-RSA-SHA256\n{date}\n{scope}\n{digest}"
        try:
            signature = bytes.fromhex(fields.get("X-Goog-Signature", ""))
            self.key.public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return False
        return int(fields["X-Goog-Expires"]) > 0

    def listing(self, name: str, query: dict[str, list[str]]) -> bytes:
        """Return the XML of the objects below a prefix; with a delimiter, of those directly below it and folders."""
        bucket, prefix = name.strip("/"), query.get("prefix", [""])[0]
        files, folders = "", set()
        for path, data in sorted(self.objects.items()):
            if not path.startswith(f"{bucket}/{prefix}"):
                continue
            key = path.removeprefix(f"{bucket}/")
            inner, deeper, _ = key.removeprefix(prefix).partition("/")
            if deeper and "delimiter" in query:
                folders.add(f"{prefix}{inner}/")
            elif self.kind == "az":
                files += f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{formatdate(usegmt=True)}"
                files += f"</Last-Modified><Content-Length>{len(data)}</Content-Length><Content-Type>x</Content-Type>"
                files += f"<Etag>{etag(data)}</Etag></Properties></Blob>"
            else:
                files += f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                files += f"<ETag>&quot;{etag(data)}&quot;</ETag><Size>{len(data)}</Size></Contents>"
        if self.kind == "az":
            inner = "".join(f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>" for name in sorted(folders))
            return f"<EnumerationResults><Blobs>{files}{inner}</Blobs><NextMarker /></EnumerationResults>".encode()
        inner = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
        return f"<ListBucketResult>{files}{inner}</ListBucketResult>".encode()


def etag(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@contextlib.contextmanager
def cloud_server(kind: str) -> Iterator[Cloud]:
    """Serve an empty cloud, ``gs`` or ``az``, until the end of the block."""
    cloud = Cloud(kind)
    if kind == "gs":
        cloud.key = rsa.generate_private_key(65537, 2048)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def log_message(self, *_: object) -> None:
            pass

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            name = cloud.name(urlsplit(self.path).path)
            cloud.objects[name] = body
            fields = {header.lower(): text for header, text in self.headers.items()}
            cloud.metadata[name] = {header: text for header, text in fields.items() if "-meta-" in header}
            self.answer(201 if kind == "az" else 200, ETag=f'"{etag(body)}"')

        def do_HEAD(self) -> None:
            name = cloud.name(urlsplit(self.path).path)
            if "Authorization" not in self.headers or name not in cloud.objects:
                return self.answer(404 if "Authorization" in self.headers else 403)
            data = cloud.objects[name]
            headers = {"ETag": f'"{etag(data)}"', "Last-Modified": formatdate(usegmt=True), **cloud.metadata[name]}
            return self.answer(200, data, **headers)

        def do_POST(self) -> None:
            """Give out a token for any login."""
            cloud.asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            token = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            token["issued_token_type"] = "urn:ietf:params:oauth:token-type:access_token"
            self.answer(200, json.dumps(token).encode())

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query, name = parse_qs(parts.query), cloud.name(parts.path)
            cloud.asked.append(self.path)
            if "comp" in query or "list-type" in query:
                if not cloud.public and "Authorization" not in self.headers and "sig" not in query:
                    return self.answer(403)
                return self.answer(200, cloud.listing(name, query))
            has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if not has_token and cloud.refuses(parts.path, parts.query):
                return self.answer(403)
            if name not in cloud.objects:
                return self.answer(404)
            data = cloud.objects[name]
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            headers = {"ETag": f'"{etag(data)}"'}
            if not found:
                return self.answer(200, data, **headers)
            part = data[int(found[1]) : int(found[2]) + 1]
            headers["Content-Range"] = f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(data)}"
            return self.answer(206, part, **headers)

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for header, text in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients close connections early
    cloud.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()
