"""nanodiffusion: diffusion models on one contract, D(x, sigma, cond) -> E[x0 | x]."""

__version__ = "0.1.0"
