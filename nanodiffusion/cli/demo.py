"""`nanodiffusion demo`: the digits recipe into runs/demo. It trains within minutes on two CPU cores."""

from argparse import Namespace

from nanodiffusion.cli import train


def main(args: Namespace) -> int:
    """`train digits` under the name demo; key=value as in train."""
    return train.run_command("digits", args.words, args, {"name": "demo", "out": "runs"})
