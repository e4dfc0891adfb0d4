"""`python -m dino`, for `torchrun -m dino train ...`."""

import sys

from dino.cli import main

if __name__ == "__main__":
    sys.exit(main())
