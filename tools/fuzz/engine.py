# SPDX-License-Identifier: MIT
"""Run one target for some time: guided by coverage with atheris, or by plain chance with what Python brings."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import time
import traceback
import tracemalloc
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tools.fuzz.limits import Watch
    from tools.fuzz.targets import Target

ONE_INPUT_SECONDS: Final = 20
"""An input that takes longer is a crash: an endless loop, or worse than linear time."""
_INTERESTING: Final = (0, 1, 0x7F, 0x80, 0xFF, 0xFFF, 0x1000, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


def have_atheris() -> bool:
    """Tell whether atheris is installed."""
    return find_spec("atheris") is not None


def crash_path(directory: Path, data: bytes) -> Path:
    """Return where an input that crashes is saved: libFuzzer's own form of name."""
    return directory / f"crash-{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"


def mutated(seeds: Sequence[bytes], words: Sequence[bytes], chance: random.Random, max_len: int) -> bytes:
    """Return a seed with one to four changes."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(data))
        end = at + min(chance.randint(0, 16), len(data) - at)
        way = chance.randrange(7)
        if way == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif way == 1 and at < len(data):
            data[at] = chance.randrange(256)
        elif way == 2:  # noqa: PLR2004 -- the ways have no names
            del data[at:end]
        elif way == 3:  # noqa: PLR2004
            data[at:at] = data[at:end] * chance.randint(1, 4)
        elif way == 4:  # noqa: PLR2004
            size = chance.choice((1, 2, 4, 8))
            data[at : at + size] = (chance.choice(_INTERESTING) % (1 << 8 * size)).to_bytes(size, "little")
        elif way == 5 and words:  # noqa: PLR2004
            data[at:at] = chance.choice(words)
        else:
            other = chance.choice(seeds)
            cut = chance.randint(0, len(other))
            data[at:] = other[cut:]
    return bytes(data[:max_len])


def run_plainly(target: Target, seconds: float, crashes: Path, seed: int = 0) -> tuple[Watch, Path | None]:
    """Run every seed, then mutations of them until the time is over or one crashes.

    :returns: what was counted, and the file with the input that crashed.
    """
    from tools.fuzz.limits import Watch

    chance = random.Random(seed)  # noqa: S311 -- no secret
    seeds = target.seeds()
    watch = Watch()
    until = math.inf
    while (start := time.monotonic()) < until:
        left = len(seeds) - watch.runs
        data = seeds[-left] if left > 0 else mutated(seeds, target.words, chance, target.max_len)
        if left == 0:
            until = start + seconds
        try:
            watch.run(target.run, data)
            if time.monotonic() - start > ONE_INPUT_SECONDS:
                raise TimeoutError(f"one input took longer than {ONE_INPUT_SECONDS} s")  # noqa: TRY301 -- a crash
        except Exception:  # noqa: BLE001 -- whatever it is, it is what we are looking for
            traceback.print_exc()
            crashes.mkdir(parents=True, exist_ok=True)
            path = crash_path(crashes, data)
            path.write_bytes(data)
            return watch, path
    return watch, None


def _write_status(path: Path, watch: Watch) -> None:
    path.write_text(json.dumps({"runs": watch.runs, "seconds": watch.seconds, "growth": watch.growth}), "utf-8")


def work_plainly(name: str, seconds: float, crashes: Path, status: Path, seed: int) -> int:
    """Be the process that runs one target without atheris."""
    from tools.fuzz.targets import TARGETS

    watch, crash = run_plainly(TARGETS[name], seconds, crashes, seed)
    _write_status(status, watch)
    return 0 if crash is None else 1


def work_with_atheris(name: str, status: Path, arguments: Sequence[str]) -> None:
    """Be the process that runs one target under libFuzzer, which ends the process.

    :param arguments: libFuzzer's.
    """
    import atheris

    with atheris.instrument_imports(include=["vfio_mig", "tools.gpu"]):
        from tools.fuzz.targets import TARGETS
    from tools.fuzz.limits import Watch

    target = TARGETS[name]
    watch = Watch()
    written = 0.0

    def one(data: bytes) -> None:
        nonlocal written
        watch.run(target.run, data)
        if watch.seconds > written + 1:
            written = watch.seconds
            _write_status(status, watch)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def libfuzzer_arguments(target: Target, seconds: float, scratch: Path, corpus: Path, crashes: Path) -> list[str]:
    """Return libFuzzer's arguments, after writing the seeds and words that it is to start with."""
    seeds = scratch / f"seeds-{target.name}"
    seeds.mkdir()
    for number, data in enumerate(target.seeds()):
        (seeds / f"{number:04d}").write_bytes(data)
    words = scratch / f"words-{target.name}"
    lines = ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words]
    words.write_text("".join(["# an empty file would be refused\n", *lines]), "ascii")
    return [
        f"-max_total_time={max(1, round(seconds))}",
        f"-timeout={ONE_INPUT_SECONDS}",
        f"-max_len={target.max_len}",
        f"-dict={words}",
        f"-artifact_prefix={crashes}/",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        str(corpus),
        str(seeds),
    ]


def repeat(target: Target, data: bytes) -> bool:
    """Run a target once; tells whether it went well."""
    tracemalloc.start()
    try:
        target.run(data)
    except Exception:  # noqa: BLE001 -- as above
        traceback.print_exc()
        return False
    finally:
        tracemalloc.stop()
    return True


def read_status(path: Path) -> dict[str, Any]:
    """Return what a worker has written, nothing when it did not get that far."""
    try:
        status: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {"runs": 0, "seconds": 0.0, "growth": 0}
    return status
