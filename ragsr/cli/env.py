"""`ragsr env`: versions, devices, and which kernel owns each op."""

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "env",
        help="show versions and which kernel owns each op",
        description="Show versions, devices, compiled libraries, and for every op which kernel computes it on which "
        "device, or why none does. Send this along when you report a problem.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ragsr.env import describe

    found = describe()
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """Sections of aligned lines; an op gets one line per device."""
    ops = {f"{name} ({device})": owner for name, owners in found["ops"].items() for device, owner in owners.items()}
    sections = {**found, "cpu kernel": {"hamming": found["cpu kernel"]}, "ops": ops}
    lines = []
    for title, entries in sections.items():
        width = max(map(len, entries))
        lines += [title, *(f"  {key:<{width}}  {value}" for key, value in entries.items()), ""]
    return "\n".join(lines).rstrip()
