"""`python -m vitailor.cli`, the same as `vitailor`."""

import sys

from . import main

sys.exit(main())
