"""``python -m tests.torture``: every part in full, with the counts; the same command goes on where it was stopped."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tests.torture
from tests.torture.harness import Part, run


def parts() -> dict[str, Part]:
    """All parts by name."""
    names = [module.name for module in pkgutil.iter_modules(tests.torture.__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"tests.torture.{name}") for name in names]
    return {part.name: part for module in modules for part in getattr(module, "PARTS", ())}


def main() -> int:
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; all where none is named")
    parser.add_argument("--seed", type=int, default=0, help="of what is tried (default 0)")
    parser.add_argument("--small", action="store_true", help="as many trials as the test suite has")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/torture"), help="folder (default %(default)s)")
    given = parser.parse_args()
    if unknown := [name for name in given.parts if name not in known]:
        parser.error(f"no such part as {unknown[0]!r}; there are {', '.join(known)}")
    table = Table("part", "promise", "counts", "seconds", "broken")
    broken = False
    for name in given.parts or known:
        part, started = known[name], time.monotonic()
        folder = given.out / f"seed{given.seed}{'-small' if given.small else ''}"
        outcome = run(part, part.small if given.small else part.trials, given.seed, folder, quiet=False)
        counts = ", ".join(f"{count:,} {what}" for what, count in outcome.counts.items())
        table.add_row(name, part.promise, counts, f"{time.monotonic() - started:.0f}", str(len(outcome.broken)))
        for i, seen in outcome.broken.items():
            print(f"{name}, trial {i}: {seen}")
        broken |= bool(outcome.broken)
    Console(width=160).print(table)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
