"""Fail when a given file is larger than 1 MiB: weights and data belong elsewhere."""

import sys
from pathlib import Path

LIMIT = 1 << 20

large = [name for name in sys.argv[1:] if Path(name).stat().st_size > LIMIT]
for name in large:
    print(f"{name} is larger than 1 MiB; keep it out of the repository.")
sys.exit(bool(large))
