from types import SimpleNamespace

import pytest
from mitmproxy import connection, tls
from mitmproxy.test import taddons, tflow

from metaclaw_core.proxy.tls import HANG_UP_SECONDS, TunnelUntrusting

DISTRUST = "The client does not trust the proxy's certificate for a.test (OpenSSL Error)"
HANGS_UP = (
    "The client disconnected during the handshake. If this happens consistently for a.test, "
    "this may indicate that the client does not trust the proxy's certificate."
)


@pytest.fixture
def addon():
    tunnel = TunnelUntrusting()
    with taddons.context(tunnel) as tctx:
        tunnel.tctx = tctx
        yield tunnel


def connect(sni: str = "a.test", address: str = "127.0.0.1", error: str | None = None) -> tls.TlsData:
    client = connection.Client(peername=(address, 1234), sockname=("127.0.0.1", 8080))
    client.sni, client.error = sni, error
    server = connection.Server(address=(sni, 443))
    return tls.TlsData(client, SimpleNamespace(client=client, server=server))


def tunnelled(addon: TunnelUntrusting, sni: str = "a.test", address: str = "127.0.0.1") -> bool:
    data = tls.ClientHelloData(connect(sni, address).context, None)
    addon.tls_clienthello(data)
    return data.ignore_connection


def request(addon: TunnelUntrusting, data: tls.TlsData) -> None:
    flow = tflow.tflow(client_conn=data.conn)
    addon.requestheaders(flow)


def test_a_host_is_tunnelled_for_the_client_that_distrusts_us_and_no_other(addon, caplog):
    for _ in range(3):
        addon.tls_failed_client(connect(error=DISTRUST))
    assert tunnelled(addon)
    assert not tunnelled(addon, "b.test")
    assert not tunnelled(addon, address="10.0.0.2")
    assert caplog.text.count("does not trust our CA for a.test") == 1
    assert "NODE_EXTRA_CA_CERTS" in caplog.text


def test_other_failures_change_nothing(addon):
    addon.tls_failed_client(connect(error="Client and mitmproxy cannot agree on a TLS version to use."))
    addon.tls_failed_client(connect(error=None))
    assert not tunnelled(addon)


@pytest.mark.parametrize("option", ["allow_hosts", "ignore_hosts"])
def test_who_set_hosts_has_decided(addon, option):
    addon.tls_failed_client(connect(error=DISTRUST))
    addon.tctx.configure(addon, **{option: ["a"]})
    assert not tunnelled(addon)


def test_hanging_up_in_the_handshake_counts_only_before_the_first_request(addon):
    data = connect()
    addon.tls_established_client(data)
    request(addon, data)
    addon.tls_failed_client(connect(error=HANGS_UP))
    assert not tunnelled(addon)
    addon.tls_failed_client(connect(error=DISTRUST))  # but who says so is believed
    assert tunnelled(addon)


def test_a_connection_that_ends_without_a_request_counts_as_distrust(addon):
    data = connect()
    addon.tls_established_client(data)
    addon.client_disconnected(data.conn)
    assert tunnelled(addon)
    assert addon._silent == {}


def test_one_that_lasted_and_one_of_a_client_that_has_spoken_do_not(addon):
    data = connect()
    addon.tls_established_client(data)
    key, since = addon._silent[data.conn.id]
    addon._silent[data.conn.id] = key, since - HANG_UP_SECONDS - 1
    addon.client_disconnected(data.conn)
    assert not tunnelled(addon)
    first, second = connect(), connect()
    addon.tls_established_client(first)
    addon.tls_established_client(second)
    request(addon, first)
    addon.client_disconnected(second.conn)
    assert not tunnelled(addon)
    addon.client_disconnected(first.conn)
    assert addon._silent == {}


def test_a_plain_connection_that_ends_is_nothing(addon):
    addon.client_disconnected(connect().conn)
    assert not tunnelled(addon)


def test_memory_is_bounded(addon):
    for n in range(2500):
        addon.tls_failed_client(connect(f"{n}.test", error=DISTRUST))
        data = connect(f"{n}.test")
        addon.tls_established_client(data)
        request(addon, data)
    assert len(addon._until) <= 1000
    assert len(addon._warned) <= 1000
    assert len(addon._trusting) <= 1000
