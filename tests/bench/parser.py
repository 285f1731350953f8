# SPDX-License-Identifier: Apache-2.0
"""The parser's rate beside grep's on the same file: `python -m tests.bench.parser`."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from emupmem.parser.bootlog import parse_boot_log
from tests.bench.table import READING, Row
from tests.fake import LOG

MEGABYTE = 10**6


def noise(size: int) -> bytes:
    """About `size` bytes of journal lines that hold no map."""
    rnd = random.Random(1)
    words = (
        b"systemd usb audit: type=1400 session opened for root eth0: link is up mode changed to full".split()
    )
    lines = [
        b"Nov 22 10:00:%02d host kernel: [%12.6f] %s\n" % (i % 60, i / 7, b" ".join(rnd.choices(words, k=9)))
        for i in range(20_000)
    ]
    block = b"".join(lines)
    return block * (size // len(block) + 1)


def rate(size: int, what: Callable[[], object]) -> float:
    """Megabytes per second of CPU time, that of programs too; the best of three."""
    best = 0.0
    for _ in range(3):
        start = sum(os.times()[:4])
        what()
        best = max(best, size / max(sum(os.times()[:4]) - start, 0.01) / MEGABYTE)
    return best


def parse(path: Path) -> None:
    """Read a file as `suggest --from` does."""
    with path.open("rb") as stream:
        parse_boot_log(stream, str(path))


def reading() -> Row:
    """Print rates and the memory that it took; the row of the table."""
    with tempfile.TemporaryDirectory() as name:
        log, dense = Path(name, "long.log"), Path(name, "dense.log")
        part = noise(150 * MEGABYTE)
        log.write_bytes(part + LOG.encode() + part)
        size = log.stat().st_size
        argv = ["grep", "-c", "BIOS-e820", str(log)]
        environment = {**os.environ, "LC_ALL": "C"}
        grep = rate(
            size, lambda: subprocess.run(argv, stdout=subprocess.DEVNULL, env=environment, check=True)
        )
        ours = rate(size, lambda: parse(log))
        print(f"parser, {size // MEGABYTE} MB with one boot in the middle: {ours:.0f} MB/s")
        print(f"  grep -c BIOS-e820 on the same file: {grep:.0f} MB/s; ratio {ours / grep:.2f}")
        for count in (2_000, 4_000, 8_000):
            dense.write_bytes(LOG.encode() * count)
            print(
                f"  {count} boots, a map in each: {rate(dense.stat().st_size, lambda: parse(dense)):.1f} MB/s"
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"  largest memory of this process, the file's own making included: {peak} MiB")
    told = f"{ours:.0f} MB/s; `grep -c BIOS-e820` on it {grep:.0f} MB/s (ratio {ours / grep:.2f})"
    return Row(READING, told)


if __name__ == "__main__":
    print(reading().measured)
