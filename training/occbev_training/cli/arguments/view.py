"""Show training pairs in Rerun, or draw one as a picture: another name of `occbev view`.

occbev-train view out/pairs
occbev-train view out/pairs --save pairs.rrd
occbev-train view out/pairs --pair 0 --picture pair.png       # images, label in slices, visibility, evidence
"""

from __future__ import annotations

from occbev.cli.view import add_arguments as add_arguments
