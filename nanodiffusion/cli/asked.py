"""What `generate` is asked for, as plain data: read from the words of a command or from a picture, and written into one."""

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from nanodiffusion import __version__
from nanodiffusion.cli.words import SHORT, changed, is_known, parse_value
from nanodiffusion.config import check_options, from_dict
from nanodiffusion.errors import UserError
from nanodiffusion.tasks import GenerateConfig, settle

PROMPTS = 1 << 20  # bytes of a file of prompts, at most
CANNY = [100, 200]


@dataclass(frozen=True)
class Named:
    """A file, a folder or a name on the hub, and the SHA-256 it must have; "" = none, and any."""

    file: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Helper:
    """A ControlNet or an adapter, its picture, and when and how strongly it acts."""

    net: str = ""
    net_sha256: str = ""
    file: str = ""  # none: the ControlNet reads the picture and the mask of inpainting
    sha256: str = ""
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and its strength."""

    file: str = ""
    sha256: str = ""
    strength: float = 1.0


@dataclass(frozen=True)
class TokenFile:
    """A textual inversion and the token that stands for it; "" = the one it names itself."""

    file: str = ""
    sha256: str = ""
    token: str = ""


@dataclass(frozen=True)
class Asked:
    """Everything that decides the pixels of a picture beside its GenerateConfig."""

    model: str = ""
    model_sha256: str = ""
    variant: str = ""
    revision: str = ""
    prediction: str = ""
    tokenizer: str = ""
    unet: Named = Named()
    vae: Named = Named()
    tokens: Named = Named()  # of inpainting
    image: Named = Named()
    mask: Named = Named()
    outpaint: list[int] = field(default_factory=list)  # left, top, right, bottom
    overlap: int = 0
    fit: bool = False  # cut and scale pictures to width x height
    controls: list[Helper] = field(default_factory=list)
    guess: bool = False
    canny: list[int] = field(default_factory=list)  # thresholds; [] = the control pictures as they are
    adapters: list[Helper] = field(default_factory=list)
    loras: list[LoraFile] = field(default_factory=list)
    embeddings: list[TokenFile] = field(default_factory=list)
    precision: str = "auto"
    device: str = "auto"
    memory: str = "auto"
    batch: int = 1  # pictures at a time
    place: int = 0  # of this picture in its batch
    frame: int = -1  # of `frames`, which this picture is

    def files(self) -> Iterable[str]:
        """Every path that it names, the model's aside."""
        yield from (getattr(self, key).file for key in NAMED)
        yield from (name for helper in (*self.controls, *self.adapters) for name in (helper.net, helper.file))
        yield from (named.file for named in (*self.loras, *self.embeddings))


class Output(TypedDict, total=False):
    """Where pictures go: options that decide no pixel of them."""

    out: str
    grid: str
    gif: str
    mp4: str
    film: str
    preview: str
    latents: str
    intermediate: bool


class Words(NamedTuple):
    """The words of a command, checked: prompts in order; changes of GenerateConfig and of Asked; Output."""

    prompts: list[str]
    config: dict[str, Any]
    asked: dict[str, Any]
    output: Output


TEXTS = ("prompt", "negative", "prompt_2")  # of the config, given once or several times, never parsed
UNSAID = ("loss_scale", "loss_every")  # a loss is a function, which a command cannot name
OURS = {f.name: f for f in fields(GenerateConfig) if f.name not in UNSAID}
MANY = {"control": "controls", "adapter": "adapters", "lora": "loras", "embedding": "embeddings"}
NAMED = ("unet", "vae", "tokens", "image", "mask")
SET_ALONE = {"model_sha256", "place", "frame"}  # known from the picture only

# -- words -------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?")
KEY = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=")


def keys() -> dict[str, Any]:
    """Every key there is and its type."""
    own = {k: v for k, v in typing.get_type_hints(Asked).items() if k not in {*SET_ALONE, *MANY.values()}}
    config = {k: v for k, v in typing.get_type_hints(GenerateConfig).items() if k in OURS}
    return {**config, **own, **dict.fromkeys(MANY, list), **typing.get_type_hints(Output), "prompts": str}


def read_words(words: Sequence[str]) -> Words:
    """Prompts and key=value words, sorted out. A word is a prompt unless it starts with a known key and "=".

    UserError: unknown keys and such that nearly are, one given twice, values of another type.
    """
    known, found = keys(), Words([], {}, {}, {})
    given: dict[str, list[str]] = {}
    for word in words:
        match = KEY.match(word)
        key = SHORT.get(match[1], match[1]) if match else ""
        if match and is_known(key, known):
            given.setdefault(key, []).append(word[match.end() :])
        elif match and (
            close := difflib.get_close_matches(key, {*known, *SHORT}, 1, 0.75) or not re.search(r"\s", word)
        ):
            meant = f"did you mean {close[0]!r}? " if isinstance(close, list) else ""
            fix = f"{meant}all keys: nanodiffusion generate --help; a prompt that begins so: 'prompt={match[0]}...'"
            raise UserError(f"unknown key {match[1]}", fix=fix)
        elif not word.strip():
            raise UserError("an empty prompt", key="prompt", fix="prompt= draws without a prompt")
        else:
            found.prompts.append(word)
    for key, texts in given.items():
        _sort(key, texts, found)
    check_options(found.output, typing.get_type_hints(Output), "")
    return found


def _sort(key: str, texts: list[str], found: Words) -> None:
    """Put the values of a key where they belong."""
    if key == "prompt":
        found.prompts.extend(texts)
    elif key in TEXTS:
        found.config[key] = texts
    elif key in MANY:
        found.asked[MANY[key]] = [READERS[key](text) for text in texts if text]
    elif len(texts) > 1:
        raise UserError("a key is given twice", key=key, found=texts[1])
    elif key == "prompts":
        found.prompts.extend(read_prompts(texts[0]))
    elif key.partition(".")[0] in OURS:
        found.config[key] = _listed(OURS, key, parse_value(texts[0]))
    elif key in Output.__annotations__:
        found.output[key] = texts[0] if key != "intermediate" else parse_value(texts[0])
    else:
        found.asked[key] = _own(key, texts[0])


def _own(key: str, text: str) -> Any:
    kind = typing.get_type_hints(Asked)[key]
    value = text if kind is str else Named(text) if kind is Named else parse_value(text)
    if key == "canny":
        return (list(CANNY) if value else []) if isinstance(value, bool) else value
    return value


def _listed(known: Mapping[str, Any], key: str, value: Any) -> Any:
    """A single value for a list of one, where a list is wanted."""
    wanted = typing.get_type_hints(GenerateConfig).get(key)
    return [value] if typing.get_origin(wanted) is list and not isinstance(value, list) else value


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that are not empty. UserError: no text, none in it, more than a megabyte."""
    try:
        with open(file, encoding="utf-8-sig") as opened:
            text = opened.read(PROMPTS + 1)
    except (OSError, UnicodeError) as e:
        found = e.strerror if isinstance(e, OSError) else "no UTF-8 text"
        raise UserError("the prompts cannot be read", file=file, key="prompts", found=found) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or len(text) > PROMPTS:
        found = "more than a megabyte" if lines else "no prompt"
        raise UserError("a file of prompts has one a line", file=file, key="prompts", found=found)
    return lines


def _from_the_right(text: str, most: int) -> tuple[str, list[float]]:
    """What stands before the last numbers between colons, at most so many: "a:b:1:0.5" -> "a:b", [1.0, 0.5]."""
    numbers: list[float] = []
    head, colon, tail = text.rpartition(":")
    while colon and len(numbers) < most and NUMBER.fullmatch(tail):
        numbers.insert(0, float(tail))
        text = head
        head, colon, tail = text.rpartition(":")
    return text, numbers


def read_control(text: str) -> Helper:
    """NET:FILE[:strength[:start[:end]]]; NET alone for one that reads the picture and mask of inpainting."""
    rest, numbers = _from_the_right(text, 3)
    net, _, file = rest.rpartition(":")
    return Helper(net or file, file=file if net else "", **dict(zip(("strength", "start", "end"), numbers)))


def read_adapter(text: str) -> Helper:
    """NET:FILE[:strength]."""
    rest, numbers = _from_the_right(text, 1)
    net, _, file = rest.rpartition(":")
    if not net or not file:
        raise UserError("an adapter needs a picture", key="adapter", expected="NET:FILE[:strength]", found=text)
    return Helper(net, file=file, **dict(zip(("strength",), numbers)))


def read_lora_word(text: str) -> LoraFile:
    """FILE[:strength]."""
    file, numbers = _from_the_right(text, 1)
    return LoraFile(file, **dict(zip(("strength",), numbers)))


def read_embedding(text: str) -> TokenFile:
    """FILE[:token]."""
    file, colon, token = text.rpartition(":")
    return TokenFile(file, token=token) if colon else TokenFile(text)


READERS: dict[str, Any] = {
    "control": read_control,
    "adapter": read_adapter,
    "lora": read_lora_word,
    "embedding": read_embedding,
}


def asked_of(words: Words, asked: Asked | None = None) -> Asked:
    """What the words ask for, on top of what was asked before; checked."""
    base = asked or Asked()
    model = {} if "model" not in words.asked else {"model_sha256": "", "revision": "", "variant": "", "prediction": ""}
    values = {f.name: getattr(base, f.name) for f in fields(Asked)} | model | words.asked
    out = from_dict(Asked, values)
    if not out.model:
        raise UserError("which model?", key="model", expected="model=FOLDER, FILE.safetensors or OWNER/NAME")
    if len(out.outpaint) not in (0, 4) or len(out.canny) not in (0, 2):
        key, expected = (
            ("canny", "[low,high]") if len(out.outpaint) in (0, 4) else ("outpaint", "[left,top,right,bottom]")
        )
        raise UserError("not as many numbers as it takes", key=key, expected=expected, found=getattr(out, key))
    if out.batch < 1:
        raise UserError("must be at least 1", key="batch", found=out.batch)
    return out


def config_of(words: Words, config: GenerateConfig | None = None) -> GenerateConfig:
    """The GenerateConfig of the words, on top of an earlier one."""
    prompts = {"prompt": words.prompts} if words.prompts else {}
    return changed(config or GenerateConfig(), {**words.config, **prompts})


# -- what a picture carries --------------------------------------------------------------------------------------------

MARKS = ("nanodiffusion", "family", "model_hash")  # said for people, not needed to make the picture again


def settings_of(asked: Asked, config: GenerateConfig, family: str) -> dict[str, Any]:
    """One picture's settings as JSON: the whole config of its own, and of what was asked what is not left out."""
    own = {k: v for k, v in asdict(config).items() if k in OURS}
    texts = {k: own[k][0] if len(own[k]) == 1 else own[k] or None for k in TEXTS}
    rest = {k: v for k, v in asdict(asked).items() if v != asdict(Asked())[k]}
    marks = {"nanodiffusion": __version__, "family": family, "model_hash": asked.model_sha256[:10]}
    return {**marks, **own, **texts, **rest}


def read_back(settings: Mapping[str, Any]) -> tuple[GenerateConfig, Asked, dict[str, Any]]:
    """The config and what was asked of a picture's settings, and what is not understood. UserError: damaged settings."""
    hints = typing.get_type_hints(Asked)
    config = {k: v for k, v in settings.items() if k in OURS and v is not None}
    asked = {k: _spec(hints[k], v, k) for k, v in settings.items() if k in hints}
    left = {k: v for k, v in settings.items() if k not in OURS and k not in hints and k not in MARKS}
    return settle(GenerateConfig(), **config), from_dict(Asked, asked), left


def _spec(hint: Any, value: Any, key: str) -> Any:
    """A list of mappings as the dataclasses that the field's type wants."""
    inner = typing.get_args(hint)
    if inner and isinstance(inner[0], type) and inner[0] not in (int, str, float) and isinstance(value, list):
        return [from_dict(inner[0], v, key) if isinstance(v, Mapping) else v for v in value]
    return value


def beside(asked: Asked, folder: Path) -> Asked:
    """Paths that lead nowhere from here, but do from the picture's folder, as such."""

    def near(name: str) -> str:
        candidates = [folder / name, folder / Path(name).name] if name and not Path(name).exists() else []
        return next((str(c) for c in candidates if c.exists()), name)

    named = {k: replace(v, file=near(v.file)) for k in NAMED for v in [getattr(asked, k)]}
    helpers = {
        k: [replace(h, net=near(h.net), file=near(h.file)) for h in getattr(asked, k)] for k in ("controls", "adapters")
    }
    files = {k: [replace(f, file=near(f.file)) for f in getattr(asked, k)] for k in ("loras", "embeddings")}
    return replace(asked, model=near(asked.model), **named, **helpers, **files)
