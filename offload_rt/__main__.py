"""`python -m offload_rt` is `offload-run`."""

import sys

from offload_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
