"""`python -m dynrank_ds.bench`."""

import sys

from dynrank_ds.bench.cli import main

sys.exit(main())
