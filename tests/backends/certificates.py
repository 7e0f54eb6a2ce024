"""Certificates by openssl(1), in directories as nbdkit, qemu-nbd and libnbd want them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
LOCAL = "subjectAltName=DNS:localhost,IP:127.0.0.1"


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(("openssl", *arguments), check=True, capture_output=True, timeout=60)


class Authority:
    """A CA in `place`, which must not be there yet."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place = place
        self.certificate, self._key = place / "ca-cert.pem", place / "ca-key.pem"
        out = ("-keyout", self._key, "-out", self.certificate)
        _openssl("req", "-x509", *_EC, *out, "-subj", f"/CN=CA {place.name}", "-days", "3")

    def directory(self, name: str, *roles: str) -> Path:
        """A directory with the CA's certificate, and one and its key for each role."""
        made = self.place / name
        made.mkdir()
        shutil.copy(self.certificate, made)
        for role in roles:
            self.issue(made, role)
        return made

    def issue(self, directory: Path, role: str, names: str = LOCAL, days: int = 3) -> None:
        """ROLE-cert.pem and ROLE-key.pem, over what was there. Negative days: it has expired."""
        new, request = directory / "new.pem", directory / "new.csr"
        extensions = directory / "new.ext"
        extensions.write_text(f"{names}\nextendedKeyUsage={role}Auth\n")
        key = directory / f"{role}-key.pem"
        _openssl("req", "-new", *_EC, "-keyout", key, "-out", request, "-subj", f"/CN=a {role}")
        authority = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial")
        more: Sequence[str | Path] = ("-days", str(days), "-extfile", extensions, "-out", new)
        _openssl("x509", "-req", "-in", request, *authority, *more)
        new.replace(directory / f"{role}-cert.pem")
        request.unlink()
        extensions.unlink()

    def revoke(self, directory: Path, *certificates: Path) -> None:
        """A list of revoked certificates in the directory, over what was there."""
        database, config = self.place / "index.txt", self.place / "ca.conf"
        database.touch()
        config.write_text(f"[ca]\ndefault_ca=x\n[x]\ndatabase={database}\ndefault_md=sha256\n")
        signer = ("-config", config, "-cert", self.certificate, "-keyfile", self._key)
        for certificate in certificates:
            _openssl("ca", *signer, "-revoke", certificate)
        _openssl("ca", *signer, "-gencrl", "-crldays", "3", "-out", directory / "ca-crl.pem")
