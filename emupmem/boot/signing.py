# SPDX-License-Identifier: Apache-2.0
"""Secure Boot: whether it is on, and the key of this machine's owner that its firmware or shim trusts."""

from __future__ import annotations

import base64
import binascii
import configparser
import re

from emupmem.boot import efi
from emupmem.model import EmupmemError
from emupmem.record import record
from emupmem.system.distribution import install_hint
from emupmem.system.host import Host

UKI_CONFS = ("/etc/kernel/uki.conf", "/run/kernel/uki.conf", "/usr/lib/kernel/uki.conf")
"""The settings that kernel-install gives to ukify, the first one counts (60-ukify.install)."""

# Not the keys that dkms and Ubuntu's shim-signed make: they are for modules only, and shim refuses them otherwise.
KEYS = (
    ("/etc/kernel/secure-boot-private-key.pem", "/etc/kernel/secure-boot-certificate.pem"),
    ("/var/lib/sbctl/keys/db/db.key", "/var/lib/sbctl/keys/db/db.pem"),
    ("/usr/share/secureboot/keys/db/db.key", "/usr/share/secureboot/keys/db/db.pem"),
)
"""Where a private key and its certificate lie: of systemd's own documentation, of sbctl, of older sbctl."""

TOOLS = {"systemd-sbsign": ("/usr/lib/systemd/systemd-sbsign",), "sbsign": ()}
"""What ukify can sign with, given two files, and where it lies beside the usual folders."""

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)


@record
class Key:
    """A private key and its certificate, both by file, and what signs with them."""

    private: str
    certificate: str
    tool: str

    @property
    def words(self) -> tuple[str, ...]:
        """What ukify is told."""
        return (
            f"--signtool={self.tool}",
            f"--secureboot-private-key={self.private}",
            f"--secureboot-certificate={self.certificate}",
        )


def signing_key(machine: Host) -> Key | None:
    """The key that an addon has to be signed with, None where Secure Boot is off or cannot be seen.

    Raises EmupmemError, with the reason, where it is on and no key of the machine's is trusted and usable.
    """
    if not efi.secure_boot(machine):
        return None
    reasons: list[str] = []
    for private, certificate, tool in _candidates(machine):
        why = _unusable(machine, private, certificate)
        if not why:
            return Key(private, certificate, _tool(machine, tool))
        reasons.append(why)
    found = "; ".join(reasons) or f"there is no key of its owner's (sbctl's, or {KEYS[0][0]})"
    raise EmupmemError(f"Secure Boot is on, and an addon must be signed with a key that it trusts: {found}")


def _candidates(machine: Host) -> list[tuple[str, str, str]]:
    """(private key, certificate, signing tool) of those that are set up; the tool may be empty."""
    found = []
    conf = next((c for c in UKI_CONFS if machine.exists(c)), "")
    parser = configparser.ConfigParser(
        comment_prefixes="#", inline_comment_prefixes="#", delimiters="=", interpolation=None, strict=False
    )
    try:
        parser.read_string(machine.text(conf) if conf else "")
        section = parser["UKI"]
        private, certificate = section.get("SecureBootPrivateKey"), section.get("SecureBootCertificate")
        if private and certificate:
            found.append((private, certificate, section.get("SecureBootSigningTool", "")))
    except (configparser.Error, KeyError):
        pass  # ukify could not read it either, or it does not set a key
    return found + [(p, c, "") for p, c in KEYS if machine.exists(p) and machine.exists(c)]


def _unusable(machine: Host, private: str, certificate: str) -> str:
    """Why a key is of no use here, empty where it is."""
    try:
        if not private.startswith("/") or not machine.read(private):
            return f"{private} is no file that can be read"
        data = machine.read(certificate) if certificate.startswith("/") else None
        trusted = (machine.read(efi.TRUSTED) or b"") + (machine.read(efi.TRUSTED_BY_SHIM) or b"")
    except EmupmemError as exc:
        return exc.message
    text = _PEM.search((data or b"").decode("ascii", "replace"))
    try:
        known = text is not None and base64.b64decode(text[1]) in trusted
    except binascii.Error:
        known = False
    if text is None or not known:
        return f"{certificate} is not enrolled"
    return ""


def _tool(machine: Host, wanted: str) -> str:
    """What signs: as the machine's own settings say, else what is there. Raises EmupmemError."""
    for name in (wanted,) if wanted else TOOLS:
        if machine.find(name) is not None or any(machine.exists(p) for p in TOOLS.get(name, ())):
            return name
    raise EmupmemError(
        f"Secure Boot is on, and {wanted or 'neither systemd-sbsign nor sbsign'} is "
        f"{'not ' if wanted else ''}installed to sign an addon",
        install_hint(machine, "sbsign"),
    )
