"""`python -m ragsr` is `ragsr`."""

import sys

from ragsr.cli import main

sys.exit(main())
