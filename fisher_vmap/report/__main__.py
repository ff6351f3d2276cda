"""`python -m fisher_vmap.report DIR`."""

import sys

from fisher_vmap.report.command import main

if __name__ == "__main__":
    sys.exit(main())
