"""NBD URIs: what they say, and what is none."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.backends.base import SourceError
from healfs.backends.nbd_uri import SCHEMES, NbdUri, Tls, absolute, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://example.com", NbdUri("", "example.com")),
        ("nbd://example.com/", NbdUri("", "example.com")),
        ("nbd://example.com:10810/disk", NbdUri("disk", "example.com", 10810)),
        ("nbd://example.com//disk", NbdUri("/disk", "example.com")),
        ("nbd://example.com/hello%20world%3F", NbdUri("hello world?", "example.com")),
        ("nbd://[::1]:1/d", NbdUri("d", "::1", 1)),
        ("nbd://[fe80::1%25eth0]/d", NbdUri("d", "fe80::1%eth0")),
        ("NBD://h/D", NbdUri("D", "h")),
        ("nbd+unix:///d?socket=/run/a%20b", NbdUri("d", socket="/run/a b")),
        ("nbd+unix:///?socket=rel.sock", NbdUri("", socket="rel.sock")),
        ("nbd+unix:///?socket=/run/a+b.sock", NbdUri("", socket="/run/a+b.sock")),
        ("nbd+unix://?socket=/s", NbdUri("", socket="/s")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri("", socket="\0/abstract")),
        ("nbds://h/d", NbdUri("d", "h", tls=Tls("h"))),
        ("nbds://h./d", NbdUri("d", "h.", tls=Tls("h"))),
        ("nbds://[fe80::1%25eth0]/d", NbdUri("d", "fe80::1%eth0", tls=Tls("fe80::1"))),
        ("nbds://h:1/d?tls-hostname=other", NbdUri("d", "h", 1, tls=Tls("other"))),
        ("nbds://h/?tls-verify-peer=0", NbdUri("", "h", tls=Tls("h", verify=False))),
        ("nbds://h/?tls-verify-peer=1&tls-type=x509", NbdUri("", "h", tls=Tls("h"))),
        ("nbds://h/?tls-certificates=/a+b%20c", NbdUri("", "h", tls=Tls("h", True, "/a+b c"))),
        ("nbds://al%20ice@h/", NbdUri("", "h", tls=Tls("h", username="al ice"))),
        ("nbds://h/?tls-username=bob", NbdUri("", "h", tls=Tls("h", username="bob"))),
        ("nbds+unix:///d?socket=/s", NbdUri("d", socket="/s", tls=Tls())),
        (
            "nbds+unix://alice@/?socket=/s&tls-certificates=certs&tls-hostname=h",
            NbdUri("", socket="/s", tls=Tls("h", True, "certs", username="alice")),
        ),
    ],
)
def test_uris(text: str, expected: NbdUri) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://h/d",
        "nbd:///d",
        "nbd://h:port/d",
        "nbd://h:65536/d",
        "nbd://h:0/d",
        "nbd://[::1/d",
        "nbd://h/%ff",
        "nbd://h/%00",
        "nbd://h/" + "x" * 4097,
        "nbd://h/d?socket=/s",
        "nbd://h/d?tls-type=x509",
        "nbd://h/d#1",
        "nbd://user@h/d",
        "nbd+unix:///d",
        "nbd+unix:///d?socket=",
        "nbd+unix:///d?socket=/a&socket=/b",
        "nbd+unix:///d?socket=/a&x=1",
        "nbd+unix://host/d?socket=/a",
        "nbd+unix:///d?socket=/" + "x" * 107,
        "nbd+unix:///d?socket=/a%00b",
        "nbd+unix://:80/d?socket=/a",
        "nbd+unix://u@/d?socket=/a",
        "nbds:///d",
        "nbds://h/d?socket=/s",
        "nbds://h/d?tls-type=anon",
        "nbds://h/d?tls-type=",
        "nbds://h/d?tls-type=psk",
        "nbds://h/d?tls-verify-peer=yes",
        "nbds://h/d?tls-certificates=",
        "nbds://h/d?tls-certificates=/a&tls-certificates=/b",
        "nbds://h/d?tls-certificates=/a%00b",
        "nbds://h/d?tls-certificates=/a&tls-psk-file=/b",
        "nbds://h/d?tls-type=x509&tls-psk-file=/b",
        "nbd://a..b/d",
        "nbd://.b/d",
        "nbd://a%00b/d",
        "nbd://xn--%C3%BC/d",
        "nbd://" + "a" * 64 + "/d",
        "nbds://" + "ü" * 64 + "/d?tls-hostname=h",
        "nbds://h/d?tls-hostname=a..b",
        "nbds://h/d?tls-hostname=.b",
        "nbds://h/d?tls-hostname=a%00b",
        "nbds://h/d?tls-hostname=%ff",
        "nbds://h/d?tls-priority=NORMAL",
        "nbds://a@h/d?tls-username=b",
        "nbd+unix:///\udcff?socket=/s",
        "nbd+unix:///?socket=/\udcff",
    ],
)
def test_bad_uris_are_wrong_sources(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(SourceError) as caught:
        parse("nbds://alice:secret@h/d")
    assert "secret" not in str(caught.value)


def test_a_key_needs_a_newer_python_and_the_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "nbds://alice@h/d?tls-psk-file=/keys"
    monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    with pytest.raises(SourceError, match=r"needs Python 3\.13 or later, this is 3\."):
        parse(text)
    monkeypatch.setattr(ssl, "HAS_PSK", True, raising=False)
    assert parse(text).tls == Tls("h", psk_file="/keys", username="alice")
    assert parse(text + "&tls-type=psk") == parse(text)


SUN_LEFT = 100  # bytes; see SUN_PATH_MAX
_names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


def _q(text: str) -> str:
    return quote(text, safe="")


@given(
    st.sampled_from(SCHEMES), _names, _paths, _paths, st.integers(1, 65535), st.booleans(), _names
)
def test_what_is_quoted_is_parsed(
    scheme: str, export: str, socket: str, directory: str, port: int, verify: bool, user: str
) -> None:
    socket = socket.encode()[:SUN_LEFT].decode(errors="ignore") or "s"
    unix, secure = scheme.endswith("+unix"), scheme.startswith("nbds")
    query = [f"socket={_q(socket)}"] if unix else []
    if secure:
        query += [f"tls-certificates={_q(directory)}", f"tls-verify-peer={int(verify)}"]
    authority = f"{_q(user)}@" if secure and user else ""
    authority += "" if unix else f"host:{port}"
    uri = parse(f"{scheme}://{authority}/{_q(export)}?" + "&".join(query))
    tls = Tls("" if unix else "host", verify, directory, username=user) if secure else None
    if unix:
        assert uri == NbdUri(export, socket=socket, tls=tls)
    else:
        assert uri == NbdUri(export, "host", port, tls=tls)


@given(
    st.one_of(
        st.text(max_size=60),
        st.builds(
            "{}://{}/{}?{}".format,
            st.sampled_from(SCHEMES),
            st.text("abh:@[]%0.\x00é\udcff", max_size=12),
            st.text("a/%20#é", max_size=8),
            st.lists(
                st.builds(
                    "{}={}".format,
                    st.sampled_from(["socket", "tls-hostname", "tls-type", "tls-certificates"]),
                    st.text("a./%0f é:\udcff", max_size=9),
                ),
                max_size=3,
            ).map("&".join),
        ),
    )
)
def test_any_text_is_a_uri_or_a_wrong_source(text: str) -> None:
    try:
        uri = parse(absolute(text))
    except SourceError as error:
        assert str(error)
        return
    if uri.tls is not None:
        # Not refused later, with a traceback.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = bool(uri.tls.hostname)
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=uri.tls.hostname or None)
    assert absolute(absolute(text)) == absolute(text)


def test_paths_are_the_same_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = quote(str(tmp_path), safe="/")
    for given_, expected in (
        ("nbds://h/d?tls-certificates=c", f"nbds://h/d?tls-certificates={here}/c"),
        (
            "nbds://h/d?tls-psk-file=../k&x=y",
            f"nbds://h/d?tls-psk-file={os.path.dirname(here)}/k&x=y",
        ),
        ("nbd+unix:///?socket=a+b", f"nbd+unix:///?socket={here}/a%2Bb"),
        ("nbd+unix:///?socket=/a+b", "nbd+unix:///?socket=/a+b"),
        ("nbd+unix:///?socket=%00a", "nbd+unix:///?socket=%00a"),
        ("nbd+unix:///?socket=\udcff", f"nbd+unix:///?socket={here}/%FF"),
        ("nbd+unix:///?socket=%ff", f"nbd+unix:///?socket={here}/%FF"),
        ("nbds+unix:///e?socket=s#f", f"nbds+unix:///e?socket={here}/s#f"),
        ("nbd://h/socket=a", "nbd://h/socket=a"),
    ):
        assert absolute(given_) == expected
