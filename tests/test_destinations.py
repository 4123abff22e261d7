"""Which hosts `propagate_to` lists, and which look as if it did."""

from __future__ import annotations

import pytest

from pgtrack import Config, ConfigError
from pgtrack._destinations import destinations, parse


@pytest.mark.parametrize(
    ("listed", "scheme", "host", "port"),
    [
        ("api.example.com", "https", "api.example.com", None),
        ("api.example.com", "http", "api.example.com", 8080),
        ("api.example.com", "", "api.example.com", None),
        ("API.Example.com", "https", "api.EXAMPLE.com", None),
        ("api.example.com", "https", "api.example.com.", None),
        ("localhost", "http", "localhost", 8000),
        ("under_score", "http", "under_score", None),
        ("*.example.com", "https", "api.example.com", None),
        ("*.example.com", "https", "a.b.example.com.", 8443),
        ("*.example.com:8080", "http", "api.example.com", 8080),
        ("api.example.com:443", "https", "api.example.com", None),
        ("api.example.com:443", "wss", "api.example.com", None),
        ("api.example.com:80", "http", "api.example.com", None),
        ("api.example.com:80", "ws", "api.example.com", None),
        ("api.example.com:443", "http", "api.example.com", 443),
        ("127.0.0.1:8000", "http", "127.0.0.1", 8000),
        ("[::1]", "http", "::1", 8000),
        ("[::1]:8000", "http", "[::1]", 8000),
        ("[0:0:0:0:0:0:0:1]", "http", "::1", None),
        ("[::1]", "http", "0:0:0:0:0:0:0:1", None),
        ("[2001:DB8::1]", "http", "2001:db8:0::1", None),
        ("xn--mnchen-3ya.example", "https", "XN--MNCHEN-3YA.example", None),
    ],
)
def test_listed(listed: str, scheme: str, host: str, port: int | None) -> None:
    """Hosts match exactly, by suffix or with their port, however they are spelt."""
    config = Config.isolated(propagate_to=[listed])

    assert destinations(config.propagate_to)(scheme, host, port)


@pytest.mark.parametrize(
    ("listed", "scheme", "host", "port"),
    [
        ("api.example.com", "https", "example.com", None),
        ("api.example.com", "https", "api.example.com.evil.org", None),
        ("api.example.com", "https", "evil-api.example.com", None),
        ("api.example.com", "https", "x.api.example.com", None),
        ("api.example.com", "https", "api.example.com..", None),
        ("*.example.com", "https", "example.com", None),
        ("*.example.com", "https", ".example.com", None),
        ("*.example.com", "https", "..example.com", None),
        ("*.example.com", "https", "evilexample.com", None),
        ("*.example.com", "https", "evil.org/.example.com", None),
        ("*.example.com", "https", "evil.org#.example.com", None),
        ("*.example.com", "https", "evil.org\\.example.com", None),
        ("*.example.com", "https", "evil.org@x.example.com", None),
        ("*.example.com", "https", "evil.org\x00.example.com", None),
        ("*.example.com", "https", "evil org.example.com", None),
        ("*.example.com", "https", "evil.org\n.example.com", None),
        ("*.example.com", "https", "x.example.com\n", None),
        ("*.example.com", "https", "x%2eexample.com", None),
        ("*.example.com:8080", "http", "api.example.com", None),
        ("api.example.com:80", "https", "api.example.com", None),
        ("api.example.com:443", "", "api.example.com", None),
        ("api.example.com:443", "ftp", "api.example.com", None),
        ("api.example.com:8080", "http", "api.example.com", 8081),
        ("api.example.com", "https", "api.example.com:443", None),
        ("api.example.com", "https", "user@api.example.com", None),
        ("kelvin.example", "https", "\u212aelvin.example", None),
        ("mnchen.example", "https", "münchen.example", None),
        ("a.example", "https", "a\u3002example", None),
        ("127.0.0.1", "http", "127.1", None),
        ("127.0.0.1", "http", "2130706433", None),
        ("127.0.0.1", "http", "0x7f000001", None),
        ("127.0.0.1", "http", "::ffff:127.0.0.1", None),
        ("127.0.0.1", "http", "localhost", None),
        ("[::1]", "http", "::1%eth0", None),
        ("[::1]", "http", "::2", None),
        ("localhost", "http", "", None),
    ],
)
def test_not_listed(listed: str, scheme: str, host: str, port: int | None) -> None:
    """What only looks like a listed host, or is one by a resolver alone, is none."""
    config = Config.isolated(propagate_to=[listed])

    assert not destinations(config.propagate_to)(scheme, host, port)


def test_several() -> None:
    """Any of several entries is enough; none lists nothing."""
    lists = destinations(("a.example", "*.b.example", "[::1]:1"))

    assert [True, True, True, False] == [
        lists("http", "a.example", 5),
        lists("http", "x.b.example", None),
        lists("http", "::1", 1),
        lists("http", "::1", 2),
    ]
    assert not destinations(())("http", "a.example", None)


@pytest.mark.parametrize(
    "text",
    [
        "*",
        "*.",
        "*.*.example",
        "a.*.example",
        "*example.com",
        ".example.com",
        "a..example",
        "a.example:",
        "a.example:0",
        "a.example:65536",
        "a.example:http",
        "[::1",
        "[:::]",
        "[::g]",
        "*.[::1]",
        "::1",
        "https://a.example",
        "a.example/",
        "user@a.example",
        "münchen.example",
        "a.example\n",
    ],
)
def test_wrong_entries(text: str) -> None:
    """What can match no host is no setting either."""
    assert parse(text) is None
    if text == text.strip():
        with pytest.raises(ConfigError, match="propagate_to"):
            Config.isolated(propagate_to=[text])
