"""`nanodiffusion report RUN`: the HTML page, again, from what lies in the folder."""

from argparse import Namespace

from nanodiffusion.cli import one_target
from nanodiffusion.report import write_report


def main(args: Namespace) -> int:
    """Write RUN/report.html and say so."""
    print(write_report(one_target(args.words, "RUN")))
    return 0
