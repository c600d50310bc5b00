"""The car's own certificate for the owner's page on the car's Wi-Fi.

Decides: for which name and how long a certificate is good. Must not: sign for any other name.
Called by: ``agent.owner.page``, when it is served beyond this computer.

A browser keeps a key, and works offline, for a page over HTTPS alone. The car is its own authority: the phone installs
that once (the page offers it), and it can vouch for this one address only, whoever might get hold of its key.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from motorpool.trust.credentials import write_secret

CA_NAME: Final = "owner-ca.pem"
SERVER_NAME: Final = "owner-page.pem"
CA_DAYS: Final = 3650
SERVER_DAYS: Final = 397  # browsers take no longer ones
RENEW_DAYS: Final = 60
_DAY: Final = dt.timedelta(days=1)


def server_context(agent_dir: Path, host: str, now_ms: int) -> tuple[ssl.SSLContext, str]:
    """The context of the page's server, with certificates made where needed, and the authority's fingerprint."""
    now = dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
    ca_path, server_path = agent_dir / CA_NAME, agent_dir / SERVER_NAME
    authority = _load(ca_path)
    if authority is None or not _serves(authority, host, now):
        key = ec.generate_private_key(ec.SECP256R1())
        ca = _authority(key, host, now)
        write_secret(ca_path, _pem(ca) + _key_pem(key))
        server_path.unlink(missing_ok=True)
    else:
        ca, key = authority, _load_key(ca_path)
    server = _load(server_path)
    if server is None or not _serves(server, host, now):
        server_key = ec.generate_private_key(ec.SECP256R1())
        server = _server(server_key, ca, key, host, now)
        write_secret(server_path, _pem(server) + _pem(ca) + _key_pem(server_key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(server_path)
    return context, ca.fingerprint(hashes.SHA256()).hex()


def authority_pem(agent_dir: Path) -> bytes | None:
    """The authority's certificate alone, for the phone to install."""
    found = _load(agent_dir / CA_NAME)
    return None if found is None else _pem(found)


def _authority(key: ec.EllipticCurvePrivateKey, host: str, now: dt.datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"This car's page at {host}"[:64])])
    return (
        _begun(name, name, now, CA_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.NameConstraints([_constraint(host)], None), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([_name(host)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    host: str,
    now: dt.datetime,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    return (
        _begun(name, ca.subject, now, SERVER_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_name(host)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _begun(subject: x509.Name, issuer: x509.Name, now: dt.datetime, days: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)  # the phone's clock may be behind
        .not_valid_after(now + days * _DAY)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _constraint(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_network(host))
    except ValueError:
        return x509.DNSName(host)


def _serves(certificate: x509.Certificate, host: str, now: dt.datetime) -> bool:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    young = certificate.not_valid_before_utc <= now
    return young and _name(host) in names and now < certificate.not_valid_after_utc - RENEW_DAYS * _DAY


def _load(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
