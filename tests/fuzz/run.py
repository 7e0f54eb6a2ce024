"""`python -m tests.fuzz.run TARGET SECONDS [CORPUS]`: atheris on a target, until it breaks a rule.

Prints what libFuzzer prints. The exit status is 0 when nothing was found.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

os.environ["HEALFS_PLAIN"] = "1"  # atheris sees the branches of Python only
with atheris.instrument_imports(include=["healfs", "json"]):
    from tests.fuzz.targets import TARGETS

SEEDS = {
    "handshake": [bytes([part]) + bytes(40) for part in range(6)],
    "transmission": [bytes(range(start, start + 64)) for start in (0, 64, 128)],
    "control": [
        b'{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": 7}\n',
        b'{"execute": "healfs-set-policy", "arguments": {"read": {"error": "retry", '
        b'"retry_interval": 1.5, "retry_timeout": 0, "then": "report"}, "write": {}}}',
        b'{"execute": "healfs-umount", "arguments": {"force": true}}[]"x"{"\\ud800": null}',
    ],
}


def main(target: str, seconds: str, corpus: str) -> None:
    directory = Path(corpus)
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]):
        (directory / f"seed{number}").write_bytes(seed)
    arguments = (f"-max_total_time={seconds}", "-timeout=60", "-max_len=4096", "-rss_limit_mb=1024")
    atheris.Setup([sys.argv[0], *arguments, f"-artifact_prefix={corpus}/", corpus], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:4])
