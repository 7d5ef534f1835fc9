"""A throw-away certificate authority, for clients that insist on https."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Certificates(NamedTuple):
    """Paths of PEM files: the authority's certificate, which clients trust, and localhost's certificate and key."""

    authority: str
    certificate: str
    key: str


def make_certificates(folder: Path) -> Certificates:
    """Write certificates that are valid for localhost into a folder."""
    import trustme

    authority = trustme.CA()
    localhost = authority.issue_cert("localhost", "127.0.0.1")
    files = Certificates(*(str(folder / name) for name in ("authority.pem", "localhost.pem", "localhost.key")))
    authority.cert_pem.write_to_path(files.authority)
    localhost.private_key_pem.write_to_path(files.key)
    for i, pem in enumerate(localhost.cert_chain_pems):
        pem.write_to_path(files.certificate, append=i > 0)
    return files
