"""Measurements against peers: speed (bench.py) and quality (quality.py, digits.py). Results lie in results/."""
