"""The command line: `ragsr demo | restore | gallery | train | eval | env`.

Each command is a module with `add_parser(subparsers)`; what needs torch is imported when it runs, so that `--help`
answers at once. Wrong input ends with one sentence on stderr and exit status 2, an interrupt with 130;
`RAGSR_DEBUG=1` shows the traceback instead.
"""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from ragsr.cli import demo, env, evaluate, gallery, restore, train
from ragsr.errors import InputError

DESCRIPTION = "Restore low-quality photos with the help of good ones."
EXAMPLES = """\
examples:
  ragsr demo                                            the whole path on photos that ship with scikit-image
  ragsr restore small.jpg --ref good.jpg -o big.png     restore one photo with a reference you name
  ragsr gallery build ~/Photos -o photos.ragsr          hash a folder of good photos
  ragsr restore low/ --gallery photos.ragsr -o out/     restore a folder; references are found by hash
  ragsr env                                             what runs here, and which kernel owns each op
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 a bug or a closed pipe, 2 wrong input, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        if os.environ.get("RAGSR_DEBUG"):
            raise
        print(f"ragsr: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ragsr: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ragsr", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ragsr {importlib.metadata.version('ragsr')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, restore, gallery, train, evaluate, env):
        command.add_parser(commands)
    return parser
