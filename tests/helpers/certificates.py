"""Temporary certificate authority, for clients that require https."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Certificates(NamedTuple):
    """Paths of PEM files.

    Attributes:
        authority: Certificate of the authority, which clients trust.
        certificate: Certificate of localhost.
        key: Private key of localhost.
    """

    authority: str
    certificate: str
    key: str


def make_certificates(folder: Path) -> Certificates:
    """Write certificates for localhost to a folder, and return their paths."""
    import trustme

    authority = trustme.CA()
    localhost = authority.issue_cert("localhost", "127.0.0.1")
    files = Certificates(*(str(folder / name) for name in ("authority.pem", "localhost.pem", "localhost.key")))
    authority.cert_pem.write_to_path(files.authority)
    localhost.private_key_pem.write_to_path(files.key)
    for i, pem in enumerate(localhost.cert_chain_pems):
        pem.write_to_path(files.certificate, append=i > 0)
    return files
