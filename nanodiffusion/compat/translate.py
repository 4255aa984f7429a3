"""smalldiffusion's checkpoints in this library's names: the state dict of each of its nets, translated exactly.

    net = build_net("dit", in_size=28, channels_in=1, time_features=2, time_scale=2.0, ...)
    net.load_state_dict(dit_keys(load_file("fashion.safetensors")))        # clock="log", strict

Its embedding of sigma is (sin, cos) of ln(sigma)/2: two features, in the other order than ours, on the log clock
t = ln(sigma)/4 with time_scale = 2. Its class embedding is a table, SiLU and a linear map: a table again.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nanodiffusion.errors import UserError

State = dict[str, Tensor]


def mlp_keys(state: Mapping[str, Tensor]) -> State:
    """TimeInputMLP or ConditionalMLP -> MLP. UserError on a key that neither has."""
    rest, embedders = _embedders(state)
    return embedders | _rename(rest, {r"net\.(\d+)\.(weight|bias)": r"layers.\1.\2"}, "TimeInputMLP")


def dit_keys(state: Mapping[str, Tensor]) -> State:
    """DiT -> DiT; the three modulators of a block become one. UserError on a key that it does not have."""
    rest, embedders = _embedders(state)
    names = {
        r"pos_embed": "pos_embed",
        r"x_embed\.proj\.(\w+)": r"x_embedder.proj.\1",
        r"blocks\.(\d+)\.attn\.(qkv|proj)\.(\w+)": r"blocks.\1.attn.\2.\3",
        r"blocks\.(\d+)\.mlp\.0\.(\w+)": r"blocks.\1.mlp.fc1.\2",
        r"blocks\.(\d+)\.mlp\.2\.(\w+)": r"blocks.\1.mlp.fc2.\2",
        r"final_linear\.(\w+)": r"final_layer.linear.\1",
        r"(blocks\.\d+\.(?:norm[12]\.|scale_)modulation|final_norm\.modulation)\.proj\.1\.(\w+)": r"\1.\2",
    }
    return embedders | _merge_modulators(_rename(rest, names, "DiT"))


def unet_keys(state: Mapping[str, Tensor]) -> State:
    """Unet -> UNet; an attention's two successive outputs become one. UserError on a key that it does not have."""
    rest, embedders = _embedders(state)
    blocks = sum(re.fullmatch(r"downs\.0\.blocks\.\d+\.0\.layer1\.0\.weight", key) is not None for key in rest)
    at = r"((?:down|mid|up)\.\d+)"
    names = {
        r"conv_in\.(\w+)": r"conv_in.\1",
        r"out_layer\.0\.(\w+)": r"norm_out.\1",
        r"out_layer\.2\.(\w+)": r"conv_out.\1",
        at + r"\.0\.layer1\.0\.(\w+)": r"\1.res.norm1.\2",
        at + r"\.0\.layer1\.2\.(\w+)": r"\1.res.conv1.\2",
        at + r"\.0\.temb_proj\.1\.(\w+)": r"\1.res.emb.\2",
        at + r"\.0\.layer2\.0\.(\w+)": r"\1.res.norm2.\2",
        at + r"\.0\.layer2\.3\.(\w+)": r"\1.res.conv2.\2",
        at + r"\.0\.shortcut\.(\w+)": r"\1.res.shortcut.\2",
        at + r"\.1\.(norm|attn\.qkv|attn\.proj|proj_out)\.(\w+)": r"\1.attn.\2.\3",
        r"(down\.\d+)\.downsample\.(\w+)": r"\1.conv.\2",
        r"(up\.\d+)\.upsample\.(\w+)": r"\1.up.conv.\2",
    }
    return embedders | _merge_outputs(_rename({_flat(k, blocks): v for k, v in rest.items()}, names, "Unet"))


def _rename(state: Mapping[str, Tensor], names: Mapping[str, str], model: str) -> State:
    """Each key by the one pattern that it matches in full."""
    renamed = {}
    for key, value in state.items():
        found = next(((p, to) for p, to in names.items() if re.fullmatch(p, key)), None)
        if found is None:
            raise UserError(f"this is not a state dict of smalldiffusion's {model}", key=key)
        renamed[re.sub(*found, key)] = value
    return renamed


def _embedders(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """The keys of no embedder; and those of both embedders, translated."""
    rest, embedders = dict(state), {}
    for key in [key for key in rest if key.startswith("sig_embed.mlp.")]:
        embedders[key.replace("sig_embed", "t_embedder", 1)] = rest.pop(key)
    first = embedders.get("t_embedder.mlp.0.weight")
    if first is not None and first.shape[1] == 2:
        embedders["t_embedder.mlp.0.weight"] = first.flip(1)
    if "cond_embed.embeddings.weight" in rest:
        table, weight, bias = (rest.pop(f"cond_embed.{k}") for k in ("embeddings.weight", "mlp.1.weight", "mlp.1.bias"))
        embedders["y_embedder.embedding_table.weight"] = F.linear(F.silu(table), weight, bias)
    return rest, embedders


def _merge_modulators(state: State) -> State:
    """(scale, shift), (gate, gate), (scale, shift) of a block -> shift, scale, gate of attention, then of the MLP."""
    merged = {key: value for key, value in state.items() if "modulation" not in key}
    for key in state.keys() - merged.keys():
        match = re.fullmatch(r"(.*?)(norm1|norm2|scale|final_norm)[._]modulation\.(\w+)", key)
        assert match  # it is one of dit_keys' patterns
        at, layer, kind = match.groups()
        if layer == "final_norm":
            scale, shift = state[key].chunk(2)
            merged[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        elif layer == "scale":
            halves = [state[f"{at}{name}modulation.{kind}"].chunk(2) for name in ("norm1.", "scale_", "norm2.")]
            (scale1, shift1), (gate1, gate2), (scale2, shift2) = halves
            parts = [shift1, scale1, gate1, shift2, scale2, gate2]
            merged[f"{at}adaLN_modulation.1.{kind}"] = torch.cat(parts)
    return merged


def _merge_outputs(state: State) -> State:
    """proj_out(proj(y)) = (W V) y + (W b + c) for W, c of proj_out and V, b of proj; q, k and v get a zero bias."""
    merged = {key: value for key, value in state.items() if ".attn.proj_out." not in key}
    for key in [key for key in state if key.endswith(".attn.proj_out.weight")]:
        at = key.removesuffix("proj_out.weight")
        outer, inner = state[key].flatten(1).double(), state[f"{at}attn.proj.weight"].double()
        bias = outer @ state[f"{at}attn.proj.bias"].double() + state[f"{at}proj_out.bias"].double()
        merged[f"{at}attn.proj.weight"] = (outer @ inner).to(state[key].dtype)
        merged[f"{at}attn.proj.bias"] = bias.to(state[key].dtype)
        merged[f"{at}attn.qkv.bias"] = torch.zeros_like(state[f"{at}attn.qkv.weight"][:, 0])
    return merged


def _flat(key: str, blocks: int) -> str:
    """Levels of blocks as one list: level.block becomes level * (blocks + 1) + block; the middle is two blocks."""
    middle = {"mid.0.": "mid.0.0.", "mid.1.": "mid.0.1.", "mid.2.": "mid.1.0."}
    if key[:6] in middle:
        return middle[key[:6]] + key[6:]
    parts = re.fullmatch(r"(down|up)s\.(\d+)\.(?:blocks\.(\d+)|(\w+sample)\.1)\.(.+)", key)
    if parts is None:
        return key
    way, level, block, sample, rest = parts.groups()
    last = f"{way}.{int(level) * (blocks + 1) + int(block or blocks)}."
    return last + (f"{sample}.{rest}" if sample else rest)
