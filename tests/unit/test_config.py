"""Durations, sizes and the configuration that goes from the CLI to the keeper."""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.config import (
    ConfigError,
    MountConfig,
    format_duration,
    format_size,
    one_line,
    parse_duration,
    parse_size,
    shell_word,
)
from healfs.core.policy import Action, Policy


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("500ms", 0.5), ("5s", 5), ("2m", 120), ("1h", 3600), ("1.5s", 1.5), ("0s", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "5", "00", "-1s", "+1s", "1 s", " 1s", "1s\n", "s", "1S", "1d", "1e3s", "inf", "nan"),
        *(".5s", "1.s", "9" * 400 + "h", "1s1s", "٣s"),
    ],
)
def test_what_is_no_duration_is_told_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match="write 500ms, 5s, 2m, 1h or 0"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1K", 1024), ("64M", 64 << 20), ("10G", 10 << 30), ("2t", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1GB", "1 G", "0x10", "1_000", "٣"])
def test_what_is_no_size_is_told_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size; write"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8E", str(2**63), "9" * 19 + "E"])
def test_sizes_end_where_off_t_does(text: str) -> None:
    with pytest.raises(ConfigError, match="too large"):
        parse_size(text)
    assert parse_size(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (0.0001, "1ms"),
        (0.25, "250ms"),
        (0.9999, "1s"),
        (1.04, "1s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m"),
        (125, "2m 5s"),
        (3600, "1h"),
        (7265, "2h 1m"),
        (90000, "1d 1h"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1 MiB"),
        (64 << 20, "64 MiB"),
        (2**63 - 1, "8 EiB"),
        (2**70, "1024 EiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a  b", "a  b"),  # two spaces are a path's own
        (" a\n\n  b\r\n", "a b"),
        ("a\tb", "a b"),
        ("\x1b[31ma\x07\udcff\u202e", "?[31ma???"),
        ("a\u2028b\x85c", "a b c"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


@pytest.mark.parametrize(
    "name", [b"/a", b"/a  b", b"/a'b", b"/a\nb", b"/\xff\\'\t\x7f$x", "/ä b".encode(), b""]
)
def test_a_word_to_paste_is_one_line_and_names_the_same(name: bytes) -> None:
    word = shell_word(os.fsdecode(name))
    assert one_line(word) == word
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, timeout=30)
    assert (done.stdout, done.stderr) == (name, b"")


@given(st.floats(0, 1e9))
def test_format_duration_never_shows_a_full_larger_unit(seconds: float) -> None:
    assert not {"1000ms", "60s", "60m", "24h"} & set(format_duration(seconds).split())


def test_a_configuration_survives_the_way_to_the_keeper() -> None:
    config = MountConfig(
        source="nbd://h/ä",
        mountpoint="/mnt/a b",
        create=1 << 30,
        policy=Policy().change({"then": Action.STOP, "retry_timeout": 5.0}, {}),
        fault="/f",
        log_size=3 << 20,
        log_entries=2048,
        settle=0.5,
        fence='fence "a b"',
        allow_uid=(107,),
    )
    assert MountConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"policy": 3}', '{"policy": {}}', "null"])
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        MountConfig.from_json(text)


def test_an_unknown_key_is_refused() -> None:
    text = MountConfig("s", "/m").to_json().replace('"device"', '"devise"')
    with pytest.raises(ConfigError, match="devise"):
        MountConfig.from_json(text)
