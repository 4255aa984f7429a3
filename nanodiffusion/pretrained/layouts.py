"""Names of Stable Diffusion weights: the original single-file layout <-> ours, which is diffusers' and transformers'.

Both directions come from the same rows (original name, our name, how the tensor itself differs). A row stands for a
module and all below it; the numbers in it follow from the names of the file, so that any depth and width fits.
`rename` plans the reading of a file, `originals` the writing of one: both touch names only, so that a loader can take
tensor by tensor.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanodiffusion.errors import UserError

Shape = tuple[int, ...]
Row = tuple[str, str, str]  # original name, our name, how
Leaves = tuple[Row, ...]

# ---- the rows ------------------------------------------------------------------------------------

SAME: Leaves = (("", "", "same"),)
RESNET: Leaves = (
    (".in_layers.0", ".norm1", "same"),
    (".in_layers.2", ".conv1", "same"),
    (".emb_layers.1", ".time_emb_proj", "same"),
    (".out_layers.0", ".norm2", "same"),
    (".out_layers.3", ".conv2", "same"),
    (".skip_connection", ".conv_shortcut", "same"),
)
UNET_ONCE = (
    ("time_embed.0", "time_embedding.linear_1", SAME),
    ("time_embed.2", "time_embedding.linear_2", SAME),
    ("label_emb.0.0", "add_embedding.linear_1", SAME),
    ("label_emb.0.2", "add_embedding.linear_2", SAME),
    ("input_blocks.0.0", "conv_in", SAME),
    ("middle_block.0", "mid_block.resnets.0", RESNET),
    ("middle_block.1", "mid_block.attentions.0", SAME),
    ("middle_block.2", "mid_block.resnets.1", RESNET),
    ("out.0", "conv_norm_out", SAME),
    ("out.2", "conv_out", SAME),
)
UNET_DOWN = (
    ("input_blocks.{n}.0", "down_blocks.{level}.resnets.{j}", RESNET),
    ("input_blocks.{n}.1", "down_blocks.{level}.attentions.{j}", SAME),
)
UNET_UP = (
    ("output_blocks.{n}.0", "up_blocks.{level}.resnets.{j}", RESNET),
    ("output_blocks.{n}.1", "up_blocks.{level}.attentions.{j}", SAME),
)
UNET_DOWNSAMPLE = (("input_blocks.{n}.0.op", "down_blocks.{level}.downsamplers.0.conv", SAME),)
UNET_UPSAMPLE = (("output_blocks.{n}.{slot}.conv", "up_blocks.{level}.upsamplers.0.conv", SAME),)

CONTROLNET_ONCE = (
    ("middle_block_out.0", "controlnet_mid_block", SAME),
    ("input_hint_block.0", "controlnet_cond_embedding.conv_in", SAME),
)
CONTROLNET_ZERO = (("zero_convs.{n}.0", "controlnet_down_blocks.{n}", SAME),)
CONTROLNET_HINT = (("input_hint_block.{n}", "controlnet_cond_embedding.blocks.{j}", SAME),)
CONTROLNET_HINT_LAST = (("input_hint_block.{n}", "controlnet_cond_embedding.conv_out", SAME),)

VAE_RESNET: Leaves = (("", "", "same"), (".nin_shortcut", ".conv_shortcut", "same"))
VAE_ATTENTION: Leaves = (
    (".norm", ".group_norm", "same"),
    (".q", ".to_q", "matrix"),
    (".k", ".to_k", "matrix"),
    (".v", ".to_v", "matrix"),
    (".proj_out", ".to_out.0", "matrix"),
)
VAE_HALF = (
    ("{half}.conv_in", "{half}.conv_in", SAME),
    ("{half}.mid.block_1", "{half}.mid_block.resnets.0", SAME),
    ("{half}.mid.attn_1", "{half}.mid_block.attentions.0", VAE_ATTENTION),
    ("{half}.mid.block_2", "{half}.mid_block.resnets.1", SAME),
    ("{half}.norm_out", "{half}.conv_norm_out", SAME),
    ("{half}.conv_out", "{half}.conv_out", SAME),
)
VAE_BLOCK = (
    ("encoder.down.{level}.block.{j}", "encoder.down_blocks.{level}.resnets.{j}", VAE_RESNET),
    ("decoder.up.{mirror}.block.{j}", "decoder.up_blocks.{level}.resnets.{j}", VAE_RESNET),
)
VAE_LEVEL = (
    ("encoder.down.{level}.downsample", "encoder.down_blocks.{level}.downsamplers.0", SAME),
    ("decoder.up.{mirror}.upsample", "decoder.up_blocks.{level}.upsamplers.0", SAME),
)
VAE_ONCE = (("quant_conv", "quant_conv", SAME), ("post_quant_conv", "post_quant_conv", SAME))

OPEN_CLIP_ONCE = (
    ("token_embedding", "text_model.embeddings.token_embedding", SAME),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight", SAME),
    ("ln_final", "text_model.final_layer_norm", SAME),
    ("text_projection.weight", "text_projection.weight", SAME),  # some SDXL files; read only: the next row writes
    ("text_projection", "text_projection.weight", (("", "", "transpose"),)),  # open_clip has x @ P, a Linear x @ W.T
)
OPEN_CLIP_LAYER: Leaves = (
    (".ln_1", ".layer_norm1", "same"),
    (".ln_2", ".layer_norm2", "same"),
    (".mlp.c_fc", ".mlp.fc1", "same"),
    (".mlp.c_proj", ".mlp.fc2", "same"),
    (".attn.out_proj", ".self_attn.out_proj", "same"),
    *(
        (f".attn.in_proj_{kind}", f".self_attn.{name}_proj.{kind}", f"third {k}")
        for kind in ("weight", "bias")
        for k, name in enumerate("qkv")
    ),
)
OPEN_CLIP_LAYERS = (("transformer.resblocks.{n}", "text_model.encoder.layers.{n}", OPEN_CLIP_LAYER),)

ADAPTER_ONCE = (("conv_in", "adapter.conv_in", SAME),)
ADAPTER_LEVEL = (("body.{n}.in_conv", "adapter.body.{level}.in_conv", SAME),)
ADAPTER_BLOCK = (("body.{n}", "adapter.body.{level}.resnets.{j}", SAME),)
ADAPTER_LIGHT = (
    ("body.{level}.in_conv", "adapter.body.{level}.in_conv", SAME),
    ("body.{level}.body", "adapter.body.{level}.resnets", SAME),
    ("body.{level}.out_conv", "adapter.body.{level}.out_conv", SAME),
)
# the original tiny decoder counts its clamp as layer 0
TINY = (("encoder.{j}", "encoder.layers.{j}", SAME), ("decoder.{n}", "decoder.layers.{j}", SAME))

# Where components lie in a single file: prefix, component, rows (None: our names), family (None: each).
# Reading takes the first prefix that fits, writing the first row of component and family.
PLACES: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("model.diffusion_model.", "unet", "unet", None),
    ("first_stage_model.", "vae", "vae", None),
    ("control_model.", "controlnet", "controlnet", None),
    ("cond_stage_model.transformer.", "text", None, "sd1"),
    ("cond_stage_model.model.", "text", "open_clip", "sd2"),
    ("conditioner.embedders.0.transformer.", "text", None, "sdxl"),
    ("conditioner.embedders.1.model.", "text_2", "open_clip", "sdxl"),
    ("conditioner.embedders.0.model.", "text_2", "open_clip", "sdxl"),  # the refiner
    ("diffusion_model.", "unet", "unet", None),
    ("vae.", "vae", "vae", None),
    ("taesd_encoder.", "tiny_vae", "tiny_encoder", None),
    ("taesd_decoder.", "tiny_vae", "tiny_decoder", None),
)

# What a file of one component without prefix is: names of which one is there, component, rows (None: our names).
SIGNS: tuple[tuple[str, str, str | None], ...] = (
    (r"(zero_convs|input_hint_block)\.\d", "controlnet", "controlnet"),
    (r"controlnet_(down_blocks|mid_block|cond_embedding)\.", "controlnet", None),
    (r"(input_blocks|middle_block|output_blocks)\.\d", "unet", "unet"),
    (r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\.", "unet", None),
    (r"(encoder\.down|decoder\.up)\.\d|(en|de)coder\.mid\.", "vae", "vae"),
    (r"(encoder\.down_blocks|decoder\.up_blocks)\.\d", "vae", None),
    (r"transformer\.resblocks\.\d", "text", "open_clip"),
    (r"(transformer\.)?(text_model\.)*encoder\.layers\.\d+\.self_attn\.", "text", None),
    (r"adapter\.body\.\d", "adapter", None),
    (r"body\.\d+\.(block1|body)\.", "adapter", "adapter"),
    (r"(en|de)coder\.layers\.\d+\.(conv\.|weight)", "tiny_vae", None),
    (r"(en|de)coder\.\d+\.(conv\.|weight)", "tiny_vae", "tiny_vae"),
    (r"0\.weight$", "tiny_vae", "tiny_encoder"),
    (r"1\.weight$", "tiny_vae", "tiny_decoder"),
)

# Names that our layout had before: component, pattern, replacement, how.
OLD: tuple[tuple[str, str, str, str], ...] = (
    ("text", r"^(transformer\.)?(text_model\.)*(?=(embeddings|encoder|final_layer_norm)\.)", "text_model.", "same"),
    ("vae", r"(?<=mid_block\.attentions\.0\.)(query|to_q)(?=\.)", "to_q", "matrix"),
    ("vae", r"(?<=mid_block\.attentions\.0\.)(key|to_k)(?=\.)", "to_k", "matrix"),
    ("vae", r"(?<=mid_block\.attentions\.0\.)(value|to_v)(?=\.)", "to_v", "matrix"),
    ("vae", r"(?<=mid_block\.attentions\.0\.)(proj_attn|to_out\.0)(?=\.)", "to_out.0", "matrix"),
)

# Names without use here, and why.
IGNORED: tuple[tuple[str, str], ...] = (
    (r"(\w+\.)?model_ema\.", "moving average of the weights, kept beside them"),
    (r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?$|betas$|denoiser\.sigmas$", "noise schedule"),
    (r"posterior_(variance|log_variance_clipped|mean_coef[12])$|lvlb_weights$|logvar$", "noise schedule"),
    (r"scale_factor$", "latent scale, known by family"),
    (r"v_pred$|ztsnr$", "a mark: v-prediction, zero terminal SNR"),
    (r"(.*\.)?position_ids$", "the positions 0, 1, 2, ..."),
    (r"(.*\.)?attn_mask$", "the causal mask"),
    (r"(.*\.)?logit_scale$", "temperature of CLIP's image-text similarity"),
    (r"(.*\.)?(visual|vision_model|visual_projection)\.", "image half of CLIP"),
    (r"(first_stage_model\.|vae\.)?loss\.", "loss the autoencoder was trained with"),
    (r"cond_stage_model\.model\.transformer\.resblocks\.23\.", "SD 2.x stops before the last layer of OpenCLIP-H"),
    (r"cond_stage_model\.model\.text_projection(\.|$)", "SD 2.x takes no pooled text"),
    (r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection(\.|$)", "CLIP-L's pooled text"),
)
_IGNORED = [(re.compile(pattern), reason) for pattern, reason in IGNORED]


# ---- rows -> names -------------------------------------------------------------------------------


def _fill(rows: Iterable[tuple[str, str, Leaves]], **numbers: object) -> Iterator[Row]:
    for theirs, ours, leaves in rows:
        for their_leaf, our_leaf, how in leaves:
            yield theirs.format(**numbers) + their_leaf, ours.format(**numbers) + our_leaf, how


def _numbers(pattern: str, names: Collection[str]) -> set[int]:
    """The numbers, up to three digits, that the first group of `pattern` takes where a name starts with it."""
    found = (re.match(pattern, name) for name in names)
    return {int(match[1]) for match in found if match and len(match[1]) < 4}


def _size(pattern: str, names: Collection[str]) -> int:
    """How many numbers from 0 on the pattern finds without a gap: a stray one does not shift the others."""
    found = _numbers(pattern, names)
    return next(n for n in itertools.count() if n not in found)


def _blocks(names: Collection[str]) -> list[int]:
    """Residual blocks per level of the encoder half, read off the names of either layout."""
    levels = _size(r"down_blocks\.(\d+)\.", names)
    if levels:
        return [_size(rf"down_blocks\.{level}\.resnets\.(\d+)\.", names) for level in range(levels)]
    size = _size(r"input_blocks\.(\d+)\.", names)
    ends = sorted({n for n in _numbers(r"input_blocks\.(\d+)\.0\.op\.", names) if n < size} | {size})
    return [end - start - 1 for start, end in itertools.pairwise([0, *ends])]


def _encoder(names: Collection[str]) -> Iterator[Row]:
    yield from _fill(UNET_ONCE)
    n = 1  # input_blocks.0 is conv_in
    for level, count in enumerate(_blocks(names)):
        for j in range(count):
            yield from _fill(UNET_DOWN, n=n + j, level=level, j=j)
        yield from _fill(UNET_DOWNSAMPLE, n=n + count, level=level)
        n += count + 1


def _unet(names: Collection[str]) -> Iterator[Row]:
    yield from _encoder(names)
    n = 0
    for level, count in enumerate(reversed(_blocks(names))):
        for j in range(count + 1):
            yield from _fill(UNET_UP, n=n + j, level=level, j=j)
        n += count + 1
        attends = {f"up_blocks.{level}.attentions.0.norm.weight", f"output_blocks.{n - 1}.1.norm.weight"}
        yield from _fill(UNET_UPSAMPLE, n=n - 1, level=level, slot=1 if attends.isdisjoint(names) else 2)


def _controlnet(names: Collection[str]) -> Iterator[Row]:
    yield from _encoder(names)
    yield from _fill(CONTROLNET_ONCE)
    for n in range(sum(_blocks(names)) + len(_blocks(names))):
        yield from _fill(CONTROLNET_ZERO, n=n)
    last = max(_numbers(r"input_hint_block\.(\d+)\.", names), default=0)  # convolutions stand at 0, 2, 4, ...
    count = max(_size(r"controlnet_cond_embedding\.blocks\.(\d+)\.", names), last // 2 - 1)
    for j in range(count):
        yield from _fill(CONTROLNET_HINT, n=2 * j + 2, j=j)
    yield from _fill(CONTROLNET_HINT_LAST, n=2 * count + 2)


def _vae(names: Collection[str]) -> Iterator[Row]:
    yield from _fill(VAE_ONCE)
    for half in ("encoder", "decoder"):
        yield from _fill(VAE_HALF, half=half)
    level_of = r"(?:encoder\.down|decoder\.up)(?:_blocks)?\.(\d+)\."
    levels, blocks = _size(level_of, names), _size(r".*\.(?:block|resnets)\.(\d+)\.", names)
    for level in range(levels):
        yield from _fill(VAE_LEVEL, level=level, mirror=levels - 1 - level)
        for j in range(blocks):
            yield from _fill(VAE_BLOCK, level=level, mirror=levels - 1 - level, j=j)


def _open_clip(names: Collection[str]) -> Iterator[Row]:
    yield from _fill(OPEN_CLIP_ONCE)
    for n in range(_size(r"(?:transformer\.resblocks|text_model\.encoder\.layers)\.(\d+)\.", names)):
        yield from _fill(OPEN_CLIP_LAYERS, n=n)


def _adapter(names: Collection[str]) -> Iterator[Row]:
    light = any(re.match(r"(adapter\.)?body\.\d+\.out_conv\.", name) for name in names)
    yield from _fill(ADAPTER_ONCE)
    bodies = _size(r"body\.(\d+)\.", names)
    levels = _size(r"adapter\.body\.(\d+)\.", names) or (bodies if light else 4)  # the full originals have four
    blocks = _size(r"adapter\.body\.\d+\.resnets\.(\d+)\.", names) or bodies // levels
    for level in range(levels):
        yield from _fill(ADAPTER_LIGHT if light else ADAPTER_LEVEL, level=level, n=level * blocks)
        for j in range(0 if light else blocks):
            yield from _fill(ADAPTER_BLOCK, n=level * blocks + j, level=level, j=j)


def _tiny(names: Collection[str]) -> Iterator[Row]:
    last = max(_numbers(r"(?:encoder\.|decoder\.)?(?:layers\.)?(\d+)\.", names), default=0)
    for j in range(last + 1):
        yield from _fill(TINY, j=j, n=j + 1)


def _tiny_half(half: str) -> Callable[[Collection[str]], Iterator[Row]]:
    """The rows of a file that holds one half of the tiny autoencoder, its names starting with the number."""

    def rows(names: Collection[str]) -> Iterator[Row]:
        return ((t.removeprefix(f"{half}."), o, how) for t, o, how in _tiny(names) if t.startswith(half))

    return rows


ROWS: dict[str, Callable[[Collection[str]], Iterator[Row]]] = {
    "unet": _unet,
    "controlnet": _controlnet,
    "vae": _vae,
    "open_clip": _open_clip,
    "adapter": _adapter,
    "tiny_vae": _tiny,
    "tiny_encoder": _tiny_half("encoder"),
    "tiny_decoder": _tiny_half("decoder"),
}


def _longest(table: Mapping[str, object], name: str) -> str:
    """The longest leading part of `name`, cut at a dot, that the table has; "" if none."""
    while name and name not in table:
        name = name.rpartition(".")[0]
    return name


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One of our tensors inside a file: the tensor `source`, seen as `how` says."""

    source: str
    how: str = "same"

    def read(self, tensor: Tensor) -> Tensor:
        """Our tensor, a view of the file's: (c c 1 1) -> (c c), (d p) -> (p d), or a third of (3d d) or (3d)."""
        kind, _, k = self.how.partition(" ")
        if kind == "third":
            return tensor.chunk(3)[int(k)]
        if kind == "matrix" and tensor.ndim > 2:
            return tensor.flatten(1)
        return tensor.T if kind == "transpose" else tensor

    def shape(self, shape: Shape) -> Shape:
        """Shape of our tensor, from that of the file's; unchanged where `how` does not fit it."""
        if self.how.startswith("third") and shape and shape[0] % 3 == 0:
            return (shape[0] // 3, *shape[1:])
        if self.how == "matrix" and len(shape) > 2:
            return (shape[0], math.prod(shape[1:]))
        return shape[::-1] if self.how == "transpose" else shape


@dataclass(frozen=True)
class Plan:
    """How to read a file: component -> our name -> piece; names without use, with the reason; and names unknown."""

    components: dict[str, dict[str, Piece]]
    ignored: dict[str, str]
    unknown: tuple[str, ...]


def rename(names: Iterable[str]) -> Plan:
    """Plan the reading of any file of this family: original or diffusers layout, whole or one component.

    Components: unet, vae, text, text_2, controlnet, adapter, tiny_vae; a text encoder alone is always "text".
    """
    names = list(names)
    ignored = {name: reason for name in names if (reason := _reason(name))}
    components: dict[str, dict[str, Piece]] = {}
    unknown: set[str] = set()
    for (prefix, component, table), group in groups([n for n in names if n not in ignored]).items():
        pieces = components.setdefault(component, {})
        for name, found in _read_rows(component, table, group).items():
            if not found or any(ours in pieces for ours, _ in found):  # no meaning, or one that an earlier name has
                unknown.add(prefix + name)
            else:
                pieces |= {ours: Piece(prefix + name, how) for ours, how in found}
    filled = {component: pieces for component, pieces in components.items() if pieces}
    return Plan(filled, ignored, tuple(name for name in names if name in unknown))


def _reason(name: str) -> str | None:
    return next((reason for pattern, reason in _IGNORED if pattern.match(name)), None)


Group = tuple[str, str, str | None]  # prefix, component ("" where unknown), rows


def groups(names: list[str]) -> dict[Group, list[str]]:
    """Names without their prefix, by where they lie."""
    groups: dict[Group, list[str]] = {}
    bare: list[str] = []
    for name in names:
        place = next((p for p in PLACES if name.startswith(p[0])), None)
        if place:
            groups.setdefault(place[:3], []).append(name.removeprefix(place[0]))
        else:
            bare.append(name)
    if bare:
        component, table = ("", None) if groups else _sign(bare)
        groups["", component, table] = bare
    return groups


def _sign(names: list[str]) -> tuple[str, str | None]:
    for pattern, component, table in SIGNS:
        if any(map(re.compile(pattern).match, names)):
            return component, table
    return "", None


def _read_rows(component: str, table: str | None, names: list[str]) -> dict[str, list[tuple[str, str]]]:
    """name in the file -> (our name, how), three for fused q, k, v and none for an unknown name."""
    if not component:
        return {name: [] for name in names}
    if table is None:
        return {name: [_renewed(component, name)] for name in names}
    rows: dict[str, list[tuple[str, str]]] = {}
    for theirs, ours, how in ROWS[table](set(names)):
        rows.setdefault(theirs, []).append((ours, how))
    heads = {name: _longest(rows, name) for name in names}
    return {name: [(o + name[len(head) :], how) for o, how in rows.get(head, [])] for name, head in heads.items()}


def _renewed(component: str, name: str) -> tuple[str, str]:
    for where, pattern, new, how in OLD:
        if component == where and re.search(pattern, name):
            return re.sub(pattern, new, name, count=1), how
    return name, "same"


# ---- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """One tensor of an original file: made of our tensors `sources`, one, or the three that it holds fused."""

    sources: tuple[str, ...]
    how: str = "same"

    def write(self, *tensors: Tensor) -> Tensor:
        """The file's tensor: a view of ours, or a copy where three are fused."""
        if self.how == "third":
            return torch.cat(tensors)
        (tensor,) = tensors
        if self.how == "matrix" and tensor.ndim == 2:
            return tensor[:, :, None, None]
        return tensor.T if self.how == "transpose" else tensor


def originals(component: str, names: Iterable[str], family: str) -> dict[str, Whole]:
    """Plan the writing of a component: name in an original file of `family` -> what it is made of.

    UserError: a name of ours without a counterpart, or a fused tensor of which a part is missing.
    """
    names = list(names)
    prefix, table = _place(component, family)
    found: dict[str, list[tuple[int, str]]] = {}
    kinds: dict[str, str] = {}
    for ours, (theirs, how) in _write_rows(table, names).items():
        kind, _, k = how.partition(" ")
        kinds[prefix + theirs] = kind
        found.setdefault(prefix + theirs, []).append((int(k or 0), ours))
    wholes = {theirs: Whole(tuple(ours for _, ours in sorted(found[theirs])), kinds[theirs]) for theirs in found}
    for theirs, whole in wholes.items():
        if whole.how == "third" and len(whole.sources) != 3:
            raise UserError("q, k and v are one tensor in the original layout", key=theirs, found=whole.sources)
    return wholes


def join(
    components: Mapping[str, Mapping[str, Tensor]], family: str, extra: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of an original single file; `extra`: original names to put back, such as a plan's ignored ones.

    What a file of SD 2.x has and we do not (the last text layer) is written only if it comes in `extra`.
    """
    out = dict(extra or {})
    for component, tensors in components.items():
        for theirs, whole in originals(component, tensors, family).items():
            out[theirs] = whole.write(*(tensors[ours] for ours in whole.sources))
    return out


def module_names(component: str, names: Iterable[str], family: str = "sdxl") -> dict[str, str]:
    """Original module name, without prefix -> ours, of every weight with one counterpart (LoRA dialects use them)."""
    weights = [name for name in names if name.endswith(".weight")]
    rows = _write_rows(_place(component, family)[1], weights)
    plain = {theirs: ours for ours, (theirs, _) in rows.items() if theirs.endswith(".weight")}
    return {theirs.removesuffix(".weight"): ours.removesuffix(".weight") for theirs, ours in plain.items()}


def _place(component: str, family: str) -> tuple[str, str | None]:
    for prefix, where, table, of in PLACES:
        if component == where and of in (None, family):
            return ("" if component == "tiny_vae" else prefix), (component if component == "tiny_vae" else table)
    if component == "adapter":
        return "", "adapter"
    raise UserError(f"an original file of family {family!r} has no place for this", key=component)


def _write_rows(table: str | None, names: list[str]) -> dict[str, tuple[str, str]]:
    """our name -> (original name without prefix, how)."""
    if table is None:
        return {name: (name, "same") for name in names}
    rows = {ours: (theirs, how) for theirs, ours, how in ROWS[table](set(names))}
    heads = {name: _longest(rows, name) for name in names}
    for name, head in heads.items():
        if not head:
            raise UserError(
                "this tensor has no name in the original layout", key=name, fix="save as a diffusers folder"
            )
    return {name: (rows[head][0] + name[len(head) :], rows[head][1]) for name, head in heads.items()}
