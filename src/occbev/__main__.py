"""`python -m occbev` is the `occbev` command."""

import sys

from occbev.cli import main

sys.exit(main())
