"""Sites in networks that let nothing out but through a proxy: both ports by CONNECT, and TLS stays end to end."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest

from connect_proxy import ConnectProxy
from foedus_client.link.site_link import LinkState, admission, enrol
from foedus_common.errors import LocalError
from foedus_common.link.transport import check_proxy, proxy_for
from loopback import Federation


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    proxy = ConnectProxy()
    yield proxy
    proxy.close()


@pytest.fixture(params=["setting", "environment"])
def setting(request: pytest.FixtureRequest, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """What site.toml says, where the setting or else the environment names the proxy."""
    url = f"http://ada:secret@{proxy.address}"
    if request.param == "setting":
        return url
    monkeypatch.setenv("https_proxy", url)
    monkeypatch.delenv("no_proxy", raising=False)
    return ""


def test_everything_goes_through_the_proxy(federation: Federation, proxy: ConnectProxy, setting: str) -> None:
    federation.coordinator()
    tls = federation.tls_of("alpha")
    assert enrol(federation.enrol_address, tls.authority, b"body", setting) == b"body"
    admission(federation.address, tls, setting)
    _, states = federation.site("alpha", tls=tls, proxy=setting)
    states.wait_for(LinkState.CONNECTED)
    assert {address for address, _ in proxy.asked} == {federation.enrol_address, federation.address}
    assert {said for _, said in proxy.asked} == {f"Basic {base64.b64encode(b'ada:secret').decode()}"}


def test_a_proxy_that_is_down_is_named(federation: Federation, proxy: ConnectProxy) -> None:
    federation.coordinator()
    proxy.close()
    with pytest.raises(LocalError, match=f"through the proxy {proxy.address}, is down"):
        admission(federation.address, federation.tls_of("alpha"), f"http://{proxy.address}")


def test_a_proxy_that_refuses_is_named(federation: Federation, proxy: ConnectProxy) -> None:
    federation.coordinator()
    proxy.refuses = True
    with pytest.raises(LocalError, match=f"through the proxy {proxy.address}, cannot be reached: the proxy refuses"):
        admission(federation.address, federation.tls_of("alpha"), f"http://{proxy.address}")


def test_an_address_that_no_proxy_names_is_reached_directly(
    federation: Federation, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    federation.coordinator()
    admission(federation.address, federation.tls_of("alpha"))
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("", {}, ""),
        ("http://ada:secret@proxy:3128/", {"https_proxy": "http://other:1"}, "proxy:3128"),
        ("", {"https_proxy": "http://proxy:3128", "http_proxy": "http://other:1"}, "proxy:3128"),
        ("", {"https_proxy": "http://proxy:3128", "no_proxy": ".example.org"}, ""),
        ("", {"https_proxy": "http://proxy:3128", "no_proxy": "example.com"}, "proxy:3128"),
    ],
)
def test_which_proxy_stands_between(setting: str, environment: dict[str, str], expected: str) -> None:
    assert proxy_for("foedus.example.org:8443", setting, environment) == expected


@pytest.mark.parametrize(
    "text", ["proxy:3128", "https://proxy:3128", "socks5://proxy:1080", "http://proxy", "http://a b:1"]
)
def test_what_is_no_proxy_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(LocalError, match="must read http://host:port") as error:
        check_proxy(text)
    assert text not in str(error.value)
