# SPDX-License-Identifier: Apache-2.0
"""Connections within TLS."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from checkpoint.link import LinkError, LinkOptions, PeerClosed
from checkpoint.wire import FrameType
from tests.unit.link_ends import run
from tests.unit.session_ends import links


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=kemari-test", "-addext", "subjectAltName=DNS:kemari-test"]
    subprocess.run(
        [*command.split(), *names, "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return key, cert


def contexts(certificate: tuple[Path, Path]) -> tuple[LinkOptions, LinkOptions]:
    """Options for a client and a server that require each other's certificate."""
    key, cert = certificate
    client = ssl.create_default_context(cafile=str(cert))
    client.load_cert_chain(cert, key)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(cert))
    server.load_cert_chain(cert, key)
    server.verify_mode = ssl.CERT_REQUIRED
    return LinkOptions(ssl=client, server_hostname="kemari-test"), LinkOptions(ssl=server)


def test_frames_travel_within_tls(certificate: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        options, server_options = contexts(certificate)
        async with links(options=options, server_options=server_options) as (near, far):
            for size in (10, 1 << 20):
                near.put(FrameType.PAGES, bytes(size), epoch=1)
                await near.flush()
                assert len((await far.receive()).payload) == size
            await far.close()
            assert isinstance(await near.wait_closed(), PeerClosed)

    run(scenario)


def test_a_certificate_for_another_name_is_refused(certificate: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        options, server_options = contexts(certificate)
        other = LinkOptions(ssl=options.ssl, server_hostname="somebody-else")
        with pytest.raises(LinkError, match="certificate"):
            async with links(options=other, server_options=server_options):
                pass

    run(scenario)
