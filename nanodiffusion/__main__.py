"""`python -m nanodiffusion`, which is also what torchrun starts."""

from nanodiffusion.cli import leave, main

if __name__ == "__main__":
    leave(main())
