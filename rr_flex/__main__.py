"""`python -m rr_flex` is `rr-flex`."""

import sys

from rr_flex.cli import main

sys.exit(main())
