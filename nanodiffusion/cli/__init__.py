"""The command line. This module knows the commands and their help, and no torch: `--help` answers at once.

Exit codes: 0 done, 2 the user's mistake or a disk's, 130 Ctrl-C, 143 SIGTERM (a run saves first).
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from nanodiffusion import __version__
from nanodiffusion.errors import UserError

TRAIN = """\
RECIPE is a name (swissroll, digits, fashion-mnist, fashion-mnist-dit, cifar10, debug, full), a file of your own
(my.yaml), or, with --config-dir, a name there. `full` sets every key there is and says what it means.
Keys follow Hydra's grammar, and every key can be set, whether the recipe mentions it or not:

  nanodiffusion train digits lr=2e-4 net.channels=64 sample.sampler=heun
  nanodiffusion train digits net.name=dit net.depth=6      another component drops the recipe's options of the old one
  nanodiffusion train digits sample.sampler=euler          short for sample.sampler.name=euler
  nanodiffusion train digits -m lr=1e-3,1e-4 seed=0,1      a sweep: four runs, each named after its keys
  torchrun --nproc_per_node 2 -m nanodiffusion train digits

The run lies in out/name (runs/RECIPE). The same command resumes it, whatever interrupted it; Ctrl-C and SIGTERM save.
"""

SAMPLE = """\
RUN is a run's folder or one of its checkpoints (runs/x/checkpoint/best). Keys, with their defaults:

  n=64                   how many
  class=all              a number, a name, a list [0,1,2] taken in turn, all, or null (the class that stands for none)
  seed=0                 image i is drawn from seed + i, alone or in any batch
  batch=64               images at a time; changes the result by rounding only
  weights=ema-0          an average of the weights, or model: the weights themselves
  best=false             the checkpoint of the least validation loss instead of the newest
  device=auto            auto, cpu, cuda, cuda:1, mps
  sampler=  steps=  ladder=  guidance=  rescale=  interval=[lo,hi]      as the run's recipe says; options by a dot:
                         sampler.order=3  ladder.rho=5
  image=FILE strength=0.6                image to image: the last 60 % of the steps, from a picture

What to write (a grid into the run's folder, if nothing is said):

  grid=FILE.png  strip=FILE.png  gif=FILE.gif  mp4=FILE.mp4     pictures, of the first 400 samples at most
  out=DIR                                each image as a file, DIR/000000.png
  npz=FILE.npz                           for evaluation: arr_0 uint8 (n h w c) (points: x float32) and labels.
                                         Batches are kept beside it until all are there: a rerun continues, and under
                                         torchrun the processes share the work.

  nanodiffusion sample runs/digits class=3 guidance=2 grid=threes.png
"""


class Command(NamedTuple):
    """What argparse needs to know."""

    usage: str
    summary: str
    details: str = ""


COMMANDS = {
    "train": Command("RECIPE [key=value ...]", "train a model from a recipe, or go on with it", TRAIN),
    "sample": Command("RUN [key=value ...]", "make pictures with a trained model", SAMPLE),
    "info": Command("RUN | FILE | RECIPE", "what is in a run, a checkpoint, a safetensors file, a picture or a recipe"),
    "report": Command("RUN", "write the run's report.html again"),
    "demo": Command("[key=value ...]", "train on handwritten digits for three minutes, sample, report"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    summary = "Diffusion models on one contract: train, sample, look."
    parser = argparse.ArgumentParser("nanodiffusion", description=summary)
    parser.add_argument("--version", action="version", version=f"nanodiffusion {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            usage=f"nanodiffusion {name} {command.usage}",
            description=command.summary,
            help=command.summary,
            epilog=command.details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("words", nargs="*", metavar=command.usage, help=argparse.SUPPRESS)
        sub.set_defaults(config_name=None, config_dir=None)
        if name in ("train", "demo"):
            _add_train_flags(sub)
        if name == "train":
            sub.add_argument("--config-name", metavar="NAME", help="the recipe, Hydra's way")
            sub.add_argument("--config-dir", metavar="DIR", help="a folder of your own recipes")
    return parser


def _add_train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="key=a,b is a sweep: one run for every combination"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the net's size, and stop")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; flags may stand anywhere among the words, which argparse alone does not allow."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if flags := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    args.words += rest
    return args


def dispatch(args: argparse.Namespace) -> int:
    """Run the command; its module, and torch with it, is imported only here."""
    if args.command == "train":
        from nanodiffusion.cli.train import main
    elif args.command == "sample":
        from nanodiffusion.cli.sample import main
    elif args.command == "info":
        from nanodiffusion.cli.info import main
    elif args.command == "report":
        from nanodiffusion.cli.report import main
    else:
        from nanodiffusion.cli.demo import main
    return main(args)


def one_target(words: Sequence[str], usage: str) -> str:
    """The only word, or a UserError."""
    if len(words) != 1:
        raise UserError("this command takes one argument", expected=usage, found=" ".join(words) or "none")
    return words[0]


def share_the_cpu() -> None:
    """Let OpenMP's waiting threads sleep soon, unless the environment says otherwise; in force only before torch is here.

    libgomp spins for 300,000 turns, which on a busy machine keeps off the very thread that is waited for: training the
    digits beside one other process went from 122 to 432 images/s, and alone from 1,130 to 1,090.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: every mistake becomes a message of a few lines on stderr and an exit code."""
    args = parse(argv)
    share_the_cpu()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return dispatch(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as e:
        return _fail(e)
    except OSError as e:
        return _fail(
            UserError(f"the disk refused: {e.strerror or e}", file=e.filename, fix="free some space, check it")
        )
    except RuntimeError as e:
        if type(e).__name__ != "OutOfMemoryError":
            raise
        fix = "a smaller batch_size, accumulate=2, precision=bf16, or batch= when sampling"
        return _fail(UserError("the device's memory is full", found=str(e).split(". ")[0], fix=fix))


def _fail(error: UserError) -> int:
    lines = str(error).splitlines()[:6]
    print("\n".join(["error: " + line[:500] if not i else line[:500] for i, line in enumerate(lines)]), file=sys.stderr)
    return 2
