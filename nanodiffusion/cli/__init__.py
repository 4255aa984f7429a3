"""The command line. This module knows the commands and their help, and no torch: `--help` answers at once.

Exit codes: 0 done, 2 the user's mistake or a disk's, 130 Ctrl-C, 141 the reader of a pipe has gone, 143 SIGTERM (a run saves
first).
"""

import argparse
import errno
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from nanodiffusion import __version__
from nanodiffusion.errors import UserError

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs")
RECIPES = sorted(name.removesuffix(".yaml") for name in os.listdir(CONFIGS) if name.endswith(".yaml"))

TRAIN = """\
RECIPE is a file of your own (my.yaml), a name in the folder given by --config-dir, or one of ours:

{recipes}

Those of sd and sdxl, and textual-inversion, train on checkpoints of Stable Diffusion. `full` (nanodiffusion/configs/full.yaml)
sets every key there is and says what it means.
Keys follow Hydra's grammar, and every key can be set, whether the recipe mentions it or not:

  nanodiffusion train digits lr=2e-4 net.channels=64 sample.sampler=heun
  nanodiffusion train digits net.name=dit net.depth=6      another component drops the recipe's options of the old one
  nanodiffusion train digits sample.sampler=euler          short for sample.sampler.name=euler
  nanodiffusion train digits trackers=[tensorboard]        besides metrics.jsonl; mlflow and wandb too
  nanodiffusion train digits -m lr=1e-3,1e-4 seed=0,1      a sweep: four runs, each named after its keys
  torchrun --nproc_per_node 2 -m nanodiffusion train digits
  nanodiffusion train --config_path my.yaml steps=100      or NANO_DIFFUSION_TRAINING_CONFIG=my.yaml; one of the two

The run lies in out/name (runs/RECIPE). The same command resumes it, whatever interrupted it; Ctrl-C and SIGTERM save.
""".format(
    recipes=textwrap.fill(" ".join(RECIPES), 120, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
)

SAMPLE = """\
RUN is a run's folder or one of its checkpoints (runs/x/checkpoint/best). Keys, with their defaults:

  n=64                   how many
  class=all              a number, a name, a list [0,1,2] taken in turn, all, or null (the class that stands for none)
  class=FILE.yaml        a list of numbers and names, [cat, 3], or how many of each, {cat: 500, dog: 20}; n= goes on in turn
  text="a cat"           of a run that learnt from texts: one, a list [a cat,a dog], FILE.yaml as above, FILE.txt with one a
                         line, or null for none
  negative="blurry"      the text to be led away from, by guidance= above 1
  encoder=               what turns texts into vectors, if not what the run says: words, or a CLIP's folder or hub name
  codec=                 what decodes latents, if not what the run says: a VAE's folder or hub name, RUN/codec
  size=256x384           height x width in pixels, other than those of the training
  seed=0                 image i is drawn from seed + i, alone or in any batch
  batch=64               images at a time; changes the result by rounding only
  weights=ema-0          an average of the weights, or model: the weights themselves
  best=false             the checkpoint of the least validation loss instead of the newest
  device=auto            auto, cpu, cuda, cuda:1, mps
  sampler=  steps=  ladder=  guidance=  rescale=  interval=[lo,hi]      as the run's recipe says; options by a dot:
                         sampler.order=3  ladder.rho=5
  sharpness=0 brightness=0               shifts of the last latent, of 4 channels
  image=FILE strength=0.6                image to image: the last 60 % of the steps, from a picture
  frames=30 noise=slerp                  so many images on the way from class to class or text to text, and with noise=slerp
                                         from the noise of seed to that of seed + 1, ...; noise=seed: all from the same
  panorama=4 toward=right                of a run with data.outpaint: so many tiles, each over half of the last; or left,
                                         up, down. image= is the first tile

What to write (a grid into the run's folder, if nothing is said):

  grid=FILE.png  strip=FILE.png  gif=FILE.gif  mp4=FILE.mp4     pictures, of the first 400 samples at most. A film is of the
                                         steps, or of the frames
  trajectories=FILE.png                  a row for each class or text, from noise to image at 11 levels: x, and x0 below
  out=DIR                                each image as a file, DIR/000000.png
  npz=FILE.npz                           for evaluation: arr_0 uint8 (n h w c) (points: x float32) and labels.
                                         Batches are kept beside it until all are there: a rerun continues, and under
                                         torchrun the processes share the work.
  latents=FILE.safetensors               or .npz, in the same way: x (n c h w) float32 as it is before decoding, and labels

  nanodiffusion sample runs/digits class=3 guidance=2 grid=threes.png
  nanodiffusion sample runs/cifar10-latent class=classes.yaml guidance=3 out=images
  nanodiffusion sample runs/tld text="[a red bag,a boot]" frames=40 noise=slerp guidance=5 gif=walk.gif
"""

EVALUATE = """\
SAMPLES is an .npz of `nanodiffusion sample npz=`, a folder of images (sample's out=, or with a folder for each class), or a
RUN, which then draws them. REFERENCE is what they are held against: a data set by name, a folder, an .npz of images or of
statistics; of a RUN it is its own training data.

  nanodiffusion sample runs/cifar10 n=50000 npz=samples.npz
  nanodiffusion evaluate samples.npz reference=cifar10
  nanodiffusion evaluate runs/digits features=small n=1437 force=true
  nanodiffusion evaluate runs/digits features=small force=true curve=guidance values=[1,1.5,2,3]
  nanodiffusion evaluate photos save=photos.npz            statistics, to be a reference later

  features=inception     the published Inception-v3 of 2015, 91 MB, downloaded once; only with these it is called FID.
                         small: a net trained here on the reference's labels, half a minute; random: one that is not
                         trained; pixels; or FILE.safetensors of Inception or of a small net
  resize=clean           how images come to 299 x 299: clean (Pillow's bicubic, clean-fid), tf1 (the original FID),
                         torch (pytorch-fid). Results of different ways do not compare
  metrics=[...]          frechet, kernel, precision, recall, density, coverage, accuracy; all that can be had
  n=  force=false        only the first n; fewer than 2048 images are refused unless force=true
  split=train            part of a data set by name: train, test
  size=0                 cut the images of folders to squares of so many pixels; 0 = they are all alike
  save=FILE.npz          the statistics of the reference; without a reference, of SAMPLES
  out=FILE.json          the result, with hashes, numbers and versions; by default beside SAMPLES
  device=auto batch=64

Of a RUN (weights=, seed= and the keys of `sample`: class=, text=, negative=, encoder=, guidance=, steps=, sampler=, ...):

  curve=guidance values=[1,2]        a measure against guidance or steps: JSON and a picture
  curve=training                     against the checkpoints there are, or values=[steps]
"""

CONVERT = """\
IN is a pickle (.ckpt, .bin, .pt, .pth), a folder with or without such, or a .safetensors, of a checkpoint or of one network.
OUT ends in .safetensors for one file in the original layout, else it is a new folder as diffusers has it. A pickle can run
code: it is read by a process of its own, with limits, and is refused if it holds more than weights.

  nanodiffusion convert model.ckpt model.safetensors             the same names and numbers, without the pickle
  nanodiffusion convert model.safetensors folder                 original layout to diffusers'
  nanodiffusion convert folder model.safetensors dtype=fp16      and back, in half the size
  nanodiffusion convert folder-of-bins folder                    every .bin of a folder
  nanodiffusion convert base folder unet=runs/x/unet             the checkpoint with a U-Net that was trained
  nanodiffusion convert base folder lora=a.safetensors:0.8       with a LoRA fused, at that strength
  nanodiffusion convert runs/x/controlnet net.safetensors        a ControlNet as one file

  unet= vae=        taken in place of the checkpoint's own, as are text_encoder= and text_encoder_2=: a folder, a file, or
                    another checkpoint, which may be a name on the hub
  lora=             FILE or FILE:STRENGTH, fused into these; may be given several times
  dtype=keep        or fp32, fp16, bf16
  prediction=       eps or v, where a file does not say it (SD 2.x)
  tokenizer=        a folder with vocab.json and merges.txt, where none lies beside the file
  family=           sd1, sd2 or sdxl, of a VAE's own file
  memory= seconds=  what the reader of a pickle may take: GiB, time
"""


GENERATE = """\
A word is a prompt unless it starts with a key and "=": one or more, each drawn n times. `(words:1.3)` and `[words]` weigh,
BREAK begins another chunk of 75 tokens. MODEL is a diffusers folder, an original .safetensors, or OWNER/NAME on the hub.

  nanodiffusion generate "a castle by the sea" model=v1-5.safetensors n=4 seed=7
  nanodiffusion generate "a red castle" model=sdxl-folder image=photo.png strength=0.6
  nanodiffusion generate "a room" model=v1-5.safetensors control=canny.safetensors:photo.png:0.8 canny=true

  prompt=  prompts=FILE.txt          a prompt, also an empty one; a file of them, one a line
  negative=  prompt_2=               once, or once per prompt; what SDXL's second encoder reads instead
  n=1 seed=0 seeds=[..]              pictures per prompt; the first one's seed, or everyone's. Picture i is the same alone
  width= height=                     by default the model's own, or the given picture's; multiples of 8
  steps=30 guidance= rescale=0 interval=[lo,hi]      guidance: the model's own (7.5, SDXL 5); 1 = none
  sampler=dpmpp_2m ladder=karras     options by a dot: sampler.order=3 ladder.rho=5
  sigmas=[..] timesteps=[..]         a ladder of your own
  clip_skip=0                        last layers of the text encoder that are left out
  frames=0                           so many pictures on the way from prompt to prompt, and from seed to seed
  original_size= crop= target_size=  SDXL's sizes, [height,width], crop [top,left]; also with negative_ before them:
                                     negative_original_size= negative_crop= negative_target_size=
  sharpness=0 brightness=0           shifts of the last latent

Pictures to start from (PNG, JPEG, WEBP), and networks that help:

  image=FILE strength=0.8            image to image: the last 80 % of the steps
  image=FILE mask=FILE               inpainting: white is drawn anew, black stays as it is, to the bit
  image=FILE outpaint=[left,top,right,bottom] overlap=0      so many pixels more on each side
  fit=true                           cut and scale the pictures to width x height
  control=NET:FILE[:strength[:start[:end]]]   a ControlNet and its picture, several times; guess=true: for the control alone
  canny=true                         the edges of the control pictures instead of them; or canny=[low,high] (100, 200)
  adapter=NET:FILE[:strength]        a T2I-Adapter and its picture, several times
  lora=FILE[:strength]               several times
  embedding=FILE[:token]             textual inversion, several times; the token must be in a prompt
  unet=PATH vae=PATH                 another U-Net, as training leaves it, or VAE in place of the model's
  tokens=FILE                        inpainting tokens, with the U-Net that was trained with them, image= and mask=
  tokenizer=FOLDER                   the vocabulary of a single file

How:

  variant=fp16 revision= prediction=eps|v     of the model's weights; commit or branch on the hub; what the net predicts
  precision=auto                     fp32, bf16, fp16; auto is fp32 on a CPU
  memory=auto                        fast, balanced, low: how much lies on the device at once
  device=auto batch=1                auto, cpu, cuda, cuda:1, mps; pictures at a time, which changes rounding only

What to write. Every PNG carries its settings, for others and for `nanodiffusion regenerate`:

  out=pictures                       a folder (NUMBER-SEED.png, numbers go on), or FILE.png
  grid=FILE.png                      all of them
  gif=FILE.gif mp4=FILE.mp4          a film of the steps: film=x0, x or eps; film=pictures is that of frames
  preview=TAESD                      a tiny decoder that draws the film quickly
  latents=FILE.safetensors           x of every picture; intermediate=true: x and x0 of every step
"""

REGENERATE = """\
Makes the picture of FILE.png again, the same to the bit on the same machine, into FILE-again.png or out=. The model and
every file must be what they were (SHA-256); they are looked for where they were, and beside FILE.png. All keys of
`nanodiffusion generate` change something of it, but for n, seeds, frames and batch. `lora=` leaves the LoRAs out.
Of another program's picture (with A1111's `parameters`) the settings are taken that are known here; it needs model=.

  nanodiffusion regenerate pictures/00004-7.png
  nanodiffusion regenerate pictures/00004-7.png steps=50 guidance=5
  nanodiffusion regenerate theirs.png model=v1-5.safetensors
"""


ENCODE = """\
Training on latents needs no autoencoder: pictures are encoded once and for all, into a folder that `data.name=encoded
data.path=DIR` reads. SOURCE is a set by name (digits, mnist, fashion-mnist, cifar10), a folder of pictures with captions, or
webdataset shards: a folder of .tar files, or data/{00000..00012}.tar. Everything is counted first; what cannot be read is
left out and listed in DIR/faults.txt. A killed call goes on where it was, and under torchrun the processes share the work,
to the same bytes.

  nanodiffusion encode shards out=latents codec=madebyollin/sdxl-vae-fp16-fix text=openai/clip-vit-large-patch14
  nanodiffusion encode cifar10 out=latents/train codec=VAE flip=true sample=posterior
  nanodiffusion encode fashion-mnist out=pixels codec=none text=words:64
  nanodiffusion encode photos out=latents codec=BASE text=BASE                   to fine-tune the checkpoint BASE

  codec=                 an autoencoder's folder, file or name on the hub (RUN/codec too), or none: the pixels themselves
  text=none              a CLIP's folder or name on the hub; words or words:N, a vector of words that needs no download.
                         Samples without a caption get zeros; those of a set by name have their class's name.
                         A whole checkpoint of Stable Diffusion: all that its U-Net is told, dtype=float16 or float32
  size=256               side of the pictures, cut to their central square; sets by name, else whole checkpoints have their own
  split=train            of a set by name; out=DIR/train and out=DIR/test are the two halves of DIR
  n=0                    the first n samples only
  flip=false             the mirrored pictures too: training then takes either
  sample=mean            or posterior: a sample of the autoencoder's distribution, drawn from seed=0 and the sample's number
  quantise=true          a byte per value, 256 levels from -limit to limit; false, and for whole checkpoints unless limit or
                         quantise=true is given: dtype=float16 or float32
  limit=0                0: the largest value there is, so that nothing is cut off
  batch=16 part=1024     at a time, which changes the result by rounding only; samples per part
  device=auto precision=auto         auto, cpu, cuda, cuda:1, mps; fp32, bf16, fp16
"""


PREPARE = """\
SOURCE is one of these; what lies in DIR afterwards is shards of tar (webdataset's layout) and census.json: how many, which
sizes, captions and classes, and exactly what was left out. A killed call goes on, the same command again.

  nanodiffusion prepare table.parquet out=DIR            a table (.csv .tsv .parquet .json .jsonl) of URLs and captions, fetched
                                                         by img2dataset, a program with an environment of its own
  nanodiffusion prepare photos out=DIR                   a captioned folder: x.txt, x.caption or x.json beside x.png;
                                                         metadata.jsonl or .csv (file_name, text); captions.json; class folders
  nanodiffusion prepare fashion-mnist out=DIR n=1000     a published set: fashion-mnist, mnist, cifar10, digits
  nanodiffusion prepare 'DIR/{00000..00012}.tar' census=true     shards or a captioned folder, only counted (out= optional)

  per_shard=10000             pictures in a shard
  size=0 resize=center_crop   the central square at this size; keep_ratio: the short side. 0: as they are (URLs: 256)
  encode=                     png, jpg or webp; by default as they are, png where they change (URLs: jpg)
  threads=0                   that decode ahead; the result does not depend on it (URLs: 64 that fetch, in each process)
  template="a photo of a {}"  the caption by the class's name
  format=shards               or folder: DIR/CLASS/000000000.png with its caption in .txt
  split=train n=0             of a published set; n=0 is all

Of a table: url=COLUMN caption=COLUMN (found by their names otherwise), resize=center_crop, no, border, keep_ratio or
keep_ratio_largest, processes=1, timeout=10 seconds, retries=1, distributor=multiprocessing, pyspark or ray (many machines),
img2dataset=PATH where it is not on PATH, dry=true prints its whole command and how to install it.
"""


class Command(NamedTuple):
    """What argparse needs to know."""

    usage: str
    summary: str
    details: str = ""


COMMANDS = {
    "train": Command("RECIPE [key=value ...]", "train a model from a recipe, or go on with it", TRAIN),
    "sample": Command("RUN [key=value ...]", "make pictures with a trained model", SAMPLE),
    "generate": Command("PROMPT ... model=MODEL [key=value ...]", "make pictures with Stable Diffusion", GENERATE),
    "regenerate": Command("FILE.png [key=value ...]", "make a picture again from the settings in it", REGENERATE),
    "evaluate": Command("SAMPLES [reference=REFERENCE] [key=value ...]", "FID and its kin", EVALUATE),
    "info": Command("RUN | FILE | FOLDER | RECIPE", "what is in a run, a checkpoint, a LoRA, a picture or a recipe"),
    "convert": Command(
        "IN OUT [key=value ...]",
        "pickles to safetensors; one layout to another; trained parts into a checkpoint",
        CONVERT,
    ),
    "encode": Command("SOURCE out=DIR codec=PATH|none [key=value ...]", "pictures and captions to latents", ENCODE),
    "prepare": Command("SOURCE out=DIR [key=value ...]", "URLs, captioned folders and sets to shards", PREPARE),
    "report": Command("RUN", "write the run's report.html again"),
    "demo": Command("[key=value ...]", "train on handwritten digits for two minutes, sample, report"),
}


DRAW_SMALLER = "memory=low, precision=bf16, batch=1, or a smaller width and height"
SMALLER = {  # when the memory is full
    "train": "a smaller batch_size, accumulate=2, precision=bf16",
    "sample": "a smaller batch=",
    "evaluate": "a smaller batch=",
    "encode": "a smaller batch=",
    "generate": DRAW_SMALLER,
    "regenerate": DRAW_SMALLER,
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
        sub.set_defaults(config_name=None, config_dir=None, config_path=None)
        if name in ("train", "demo"):
            _add_train_flags(sub)
        if name == "train":
            sub.add_argument("--config-name", metavar="NAME", help="the recipe, Hydra's way")
            sub.add_argument("--config-dir", metavar="DIR", help="a folder of your own recipes")
            sub.add_argument("--config_path", "--config-path", metavar="FILE", help="the recipe, as a file")
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
    elif args.command == "generate":
        from nanodiffusion.cli.generate import main
    elif args.command == "regenerate":
        from nanodiffusion.cli.regenerate import main
    elif args.command == "evaluate":
        from nanodiffusion.cli.evaluate import main
    elif args.command == "info":
        from nanodiffusion.cli.info import main
    elif args.command == "convert":
        from nanodiffusion.cli.convert import main
    elif args.command == "encode":
        from nanodiffusion.cli.encode import main
    elif args.command == "prepare":
        from nanodiffusion.cli.prepare import main
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
    """The entry point."""
    args = parse(argv)
    share_the_cpu()
    return guarded(lambda: dispatch(args), args.command)


def leave(code: int) -> NoReturn:
    """End the program, also as one of several processes."""
    if "RANK" in os.environ:
        from nanodiffusion.distributed import end

        end(code)
    sys.exit(code)


def guarded(act: Callable[[], int], command: str) -> int:
    """What `act` returns; of every mistake in it a message of a few lines on stderr, and an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {inert(str(message))}", file=sys.stderr)
            return act()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as e:
        return _fail(e)
    except OSError as e:
        return _fail(_refusal(e))
    except (RuntimeError, MemoryError) as e:
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(e), re.IGNORECASE)
        if type(e).__name__ not in ("OutOfMemoryError", "MemoryError") and not asked:
            raise
        return _fail(UserError("the memory is full", found=asked and asked[0], fix=SMALLER.get(command)))


def _refusal(error: OSError) -> UserError:
    """What the network, a full disk or a disk said."""
    said = error.strerror or str(error) or type(error).__name__
    if isinstance(error, ConnectionError | TimeoutError) and error.filename is None:
        return UserError("the connection failed", found=said, fix="check the network, and try again")
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free some space" if full else "check the path, its permissions and the disk"
    return UserError(f"the disk refused: {said}", file=error.filename, fix=fix)


def inert(text: str) -> str:
    """Text of a file or a picture as it may be printed: what steers a terminal, or is not shown, is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _fail(error: UserError) -> int:
    lines = [inert(line) for line in str(error).splitlines()[:6]]
    print("\n".join(["error: " + line[:500] if not i else line[:500] for i, line in enumerate(lines)]), file=sys.stderr)
    return 2
