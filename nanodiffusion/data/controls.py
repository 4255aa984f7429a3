"""What training pictures are controlled by, made of the crop that is trained on: edges, holes, the user's own pictures.

A row of CONTROLS is a function of any of crop, uint8 (h w 3); hole, uint8 (h w) with 1 = to be painted anew; pair, uint8
(h w 3), the user's own picture cropped and resized alike; and of options of its own: -> float32 (3 h w) in [0, 1].
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nanodiffusion.config import make, option_types
from nanodiffusion.data.conditioning import MASKS, random_mask
from nanodiffusion.data.conditioning import canny as edges_of
from nanodiffusion.errors import UserError, lookup

GIVEN = ("crop", "hole", "pair")
Control = Callable[[np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]


def canny(crop: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """The crop's edges (Canny 1986), white on black: (h w 3) -> (3 h w); UserError unless 0 <= low <= high."""
    edges = np.asarray(edges_of(crop, low, high), np.float32) / 255
    return np.repeat(edges[None], 3, 0)


def inpainting(crop: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The crop in [0, 1] with -1 in the hole: (h w 3), (h w) -> (3 h w), what an inpainting ControlNet takes."""
    return np.where(hole, np.float32(-1), _unit(crop))


def paired(pair: np.ndarray, member: str = "control.png") -> np.ndarray:
    """The user's own picture, 0007.`member` beside 0007.png: (h w 3) -> (3 h w)."""
    return _unit(pair)


def _unit(crop: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(crop.transpose(2, 0, 1), np.float32) / np.float32(255)


CONTROLS: dict[str, Callable[..., np.ndarray]] = {"canny": canny, "inpainting": inpainting, "paired": paired}


def pair_member(spec: Mapping[str, Any]) -> str:
    """Which picture beside each one the control `spec` needs, "" for none."""
    return (
        spec.get("member", "control.png")
        if "pair" in option_types(lookup(CONTROLS, spec.get("name"), "control"))
        else ""
    )


def make_control(spec: Mapping[str, Any], hole: bool) -> Control:
    """The control {"name": row of CONTROLS, **options}; its results are checked.

    UserError: an unknown name, a wrong option, a hole needed where there is none; later, a result of another shape.
    """
    row = lookup(CONTROLS, spec.get("name"), "control.name")
    takes = [name for name in GIVEN if name in option_types(row)]
    given = dict.fromkeys(takes)
    if mine := [name for name in takes if name in spec]:
        raise UserError(
            "the data gives this by itself", key=f"control.{mine[0]}", found=spec[mine[0]], fix="leave it out"
        )
    call = make(CONTROLS, dict(spec), "control", **given)
    if "hole" in takes and not hole:
        raise UserError(f"{spec['name']} needs holes", key="hole", fix="hole={name: random}")

    def control(crop: np.ndarray, hole: np.ndarray | None, pair: np.ndarray | None) -> np.ndarray:
        parts = {"crop": crop, "hole": hole, "pair": pair}
        made = np.asarray(call(**{name: parts[name] for name in takes}))
        want = (3, *crop.shape[:2])
        if made.shape != want or made.dtype.kind not in "fiub" or not np.isfinite(made).all():
            expected, found = f"finite numbers {want}", f"{made.dtype} {made.shape}"
            raise UserError("the control makes no picture", key="control", expected=expected, found=found)
        return made.astype(np.float32, copy=False)

    return control


def check_hole(spec: Mapping[str, Any]) -> str | None:
    """The kind of {"name": random or a row of MASKS}, None for random. UserError: another name, any option."""
    kinds = {"random": None, **dict.fromkeys(MASKS, "")}
    lookup(kinds, spec.get("name"), "hole.name")
    if odd := sorted(spec.keys() - {"name"}):
        raise UserError(f"unknown key hole.{odd[0]}", key="hole", fix="a hole has no options")
    return None if spec["name"] == "random" else spec["name"]


def draw_hole(u: float | None, row: int, height: int, width: int, kind: str | None = None) -> np.ndarray:
    """The hole, uint8 (h w), that the number u in [0, 1) stands for; without it the one of the row, always the same."""
    key = [int(u * 2**53), 0] if u is not None else [row, 1]
    return random_mask(np.random.Generator(np.random.Philox(key=key)), height, width, kind)
