"""`nanodiffusion report RUN`: the HTML page, again, from what lies in the folder."""

from argparse import Namespace
from pathlib import Path

from nanodiffusion.cli import one_target
from nanodiffusion.cli.runs import refuse_several
from nanodiffusion.errors import UserError
from nanodiffusion.report import write_report


def main(args: Namespace) -> int:
    """Write RUN/report.html and say so. UserError: a folder that is no run's, into which nothing is written."""
    run = Path(one_target(args.words, "RUN"))
    refuse_several(run, "report")
    if not (run / "config.json").is_file():
        raise UserError("there is no such run", file=run, expected="a run's folder, which has a config.json")
    print(write_report(run))
    return 0
