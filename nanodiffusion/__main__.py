"""`python -m nanodiffusion`, which is also what torchrun starts."""

import sys

from nanodiffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
