"""`python -m occbev_training` is the `occbev-train` command."""

import sys

from occbev_training.cli import main

sys.exit(main())
