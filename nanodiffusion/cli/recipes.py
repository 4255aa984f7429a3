"""Recipes: YAML files composed by Hydra, changed by key=value in its grammar, read by read_config.

Hydra composes and parses; it instantiates nothing, and a recipe cannot reach the environment or import anything.
"""

import itertools
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from nanodiffusion.config import Component, Config, option_types
from nanodiffusion.errors import UserError, nearest, need

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VARIABLE = "NANO_DIFFUSION_TRAINING_CONFIG"  # of the environment: a configuration's file
Recipe = dict[str, Any]


def flow(value: Any) -> str:
    """A value as YAML's flow style spells it, so that what is printed can be pasted into a recipe."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) or value == "" else str(value)


def component_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Keys whose value is a component, {"name": ..., **options}: data, net, sample.sampler, ..."""
    found = []
    for key, kind in typing.get_type_hints(cls).items():
        if kind == Component:
            found.append(prefix + key)
        if is_dataclass(kind):
            found += component_keys(typing.cast(type, kind), f"{prefix}{key}.")
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def config_file(flag: str | None, named: str | None = None) -> str:
    """What to train by, of which the command line, --config_path and the environment must name exactly one."""
    places = {"the command line": named, "--config_path": flag, VARIABLE: os.environ.get(VARIABLE)}
    given = {place: value for place, value in places.items() if value}
    if len(given) > 1:
        found = ", ".join(f"{value} ({place})" for place, value in given.items())
        fix = f"unset {VARIABLE}" if VARIABLE in given else f"leave {next(iter(given))}'s out"
        raise UserError("several configurations", expected="one", found=found, fix=fix)
    if not given:
        fix = f"train digits, --config_path FILE.yaml, or {VARIABLE}=FILE.yaml"
        raise UserError("which recipe?", expected="nanodiffusion train RECIPE key=value ...", fix=fix)
    ((place, value),) = given.items()
    if value != named and not value.endswith((".yaml", ".yml")):
        raise UserError("a configuration is a .yaml file", key=place, found=value)
    return value


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file as it stands: nothing composed, nothing resolved. UserError: there is none."""
    if not Path(file).is_file():
        raise UserError("there is no such file", file=file)
    with _reading(file):
        return need("omegaconf", "train").OmegaConf.to_container(_opened(file), resolve=False)


def _opened(file: str | Path) -> Any:
    """The file as an OmegaConf node, which is a mapping and refers to nothing but itself."""
    OmegaConf = need("omegaconf", "train").OmegaConf
    raw = OmegaConf.load(file)
    if not OmegaConf.is_dict(raw):
        raise ValueError("a recipe is a mapping of keys to values")
    _refuse_resolvers(OmegaConf.to_container(raw, resolve=False), file)
    return raw


def find_recipe(recipe: str, folder: str | Path | None = None) -> Path:
    """The file of a recipe: a path to a .yaml file, a name in `folder`, or a name of the package's own."""
    if recipe.endswith(".yml"):  # which Hydra does not compose
        raise UserError("a recipe is a .yaml file", file=recipe, fix=f"rename it to {Path(recipe).stem}.yaml")
    if recipe.endswith(".yaml"):
        if not Path(recipe).is_file():
            raise UserError("there is no such recipe", file=recipe, fix="give a file, or a name without .yaml")
        return Path(recipe).resolve()
    if folder is not None and not Path(folder).is_dir():
        raise UserError("there is no such folder of recipes", file=folder, key="--config-dir")
    known = {path.stem: path.resolve() for place in (CONFIGS, folder) if place for path in Path(place).glob("*.yaml")}
    if recipe not in known:
        raise UserError(f"there is no recipe {recipe!r}", fix=nearest(recipe, known))
    return known[recipe]


@contextmanager
def _reading(file: object) -> Iterator[None]:
    """Every failure of Hydra, OmegaConf and YAML becomes one UserError."""
    kinds = (need("hydra.errors", "train").HydraException, need("omegaconf", "train").errors.OmegaConfBaseException)
    try:
        yield
    except (*kinds, need("yaml", "train").YAMLError, UnicodeDecodeError, ValueError, TypeError) as e:
        raise UserError("the recipe cannot be read", file=file, found=" ".join(str(e).split())[:300]) from None


def load_recipe(file: Path, groups: Sequence[str] = ()) -> Any:
    """The recipe with everything its `defaults` name, as an OmegaConf node; a component it names, it defines wholly.

    groups: overrides that choose files, net=big for net/big.yaml beside the recipe.
    """
    OmegaConf = need("omegaconf", "train").OmegaConf
    with _reading(file):
        config: Recipe = {}
        _opened(file)  # no mapping, or a reference to elsewhere: said here in our words
        for part, package in _parts(file, groups):
            raw = OmegaConf.to_container(_opened(part), resolve=False)
            if "hydra" in raw:
                raise UserError("a recipe cannot set Hydra's own options", file=part, key="hydra", fix="remove it")
            raw.pop("defaults", None)
            config = _merged(config, reduce(lambda inner, key: {key: inner}, reversed(package), raw))
        return OmegaConf.create(config)


def _parts(file: Path, groups: Sequence[str]) -> list[tuple[Path, list[str]]]:
    """The files that make up a recipe, a later one stronger, each with the key it fills, as Hydra's defaults list has them."""
    hydra, types = need("hydra", "train"), need("hydra.types", "train")
    singleton = need("hydra.core.global_hydra", "train").GlobalHydra
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(file.parent)):
        words = [f"hydra.searchpath=['file://{CONFIGS}']", *groups]
        found = singleton.instance().config_loader().compute_defaults_list(file.stem, words, types.RunMode.RUN)
    own = [d for d in found.defaults if d.package.split(".")[0] != "hydra"]
    places = [[home / f"{d.config_path}.yaml" for home in (file.parent, CONFIGS)] for d in own]
    return [(next(filter(Path.is_file, at)), d.package.split(".") if d.package else []) for at, d in zip(places, own)]


def _merged(old: Any, new: Recipe, key: str = "") -> Recipe:
    """Recipe `new` over `old`, mapping by mapping; one that names its component leaves nothing of the old one."""
    if isinstance(old, str) and key in component_keys():
        old = {"name": old}
    if not isinstance(old, Mapping) or (key and "name" in new):
        return new
    below = lambda k, v: _merged(old.get(k), v, f"{key}.{k}".lstrip(".")) if isinstance(v, dict) else v
    return {**old, **{k: below(k, v) for k, v in new.items()}}


def _named(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every component that `value` at `key` names, those inside it too (data.control), with its name."""
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _named(v, f"{key}.{k}".lstrip("."))
    elif isinstance(value, str) and key.endswith(".name"):
        yield key.removesuffix(".name"), value
    elif isinstance(value, str) and key in component_keys():
        yield key, value


def _refuse_resolvers(value: Any, file: object, key: str = "") -> None:
    """${a.b} refers to another key of the recipe; ${name:...} would run code or read the environment."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        _refuse_resolvers(v, file, f"{key}.{k}".lstrip("."))
    if isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
        fix = "write the value, or key=value on the command line"
        raise UserError("a recipe refers to its own keys only", file=file, key=key, found=value, fix=fix)


# -- key=value ---------------------------------------------------------------------------------------------------------


def parse_overrides(words: Sequence[str]) -> list[Any]:
    """Hydra's overrides of key=value words; UserError on one that cannot be read, Hydra's own keys, a key twice."""
    hydra = need("hydra.core.override_parser.overrides_parser", "train")
    parser, found = hydra.OverridesParser.create(), []
    for word in words:
        try:
            found.append(parser.parse_override(word))
        except need("hydra.errors", "train").HydraException as e:
            why = str(e).splitlines()[0]
            fix = "\"key='value'\", quoted for the shell and for the grammar, where a value has other characters"
            expected = "key=value, in Hydra's grammar"
            raise UserError(f"cannot read {word!r}", expected=expected, found=why, fix=fix) from None
    keys = [o.key_or_group for o in found]
    for key in keys:
        if key.split(".")[0] == "hydra":
            raise UserError("Hydra's own options are not used here", key=key, fix="remove it")
        if keys.count(key) > 1:
            raise UserError("a key is given twice", key=key, found=" ".join(w for w in words if key in w))
    return found


def expand(overrides: Sequence[Any], multirun: bool) -> list[tuple[list[Any], str]]:
    """Every combination of a sweep with the text that tells it from the others; without a sweep one, and ""."""
    swept = [o for o in overrides if o.is_sweep_override()]
    if swept and not multirun:
        fix = "-m for a sweep, [a,b] for a list, or quotes around a text with a comma"
        raise UserError("several values for one key", key=swept[0].key_or_group, found=swept[0].input_line, fix=fix)
    product = itertools.product(*map(_choices, overrides))
    told = lambda o: o not in overrides and o.key_or_group not in ("name", "out")
    return [(list(chosen), ",".join(o.input_line for o in chosen if told(o))) for chosen in product]


def _choices(override: Any) -> list[Any]:
    if not override.is_sweep_override():
        return [override]
    if not override.is_discrete_sweep():
        raise UserError("a sweep needs a list of values", key=override.key_or_group, found=override.input_line)
    return [parse_overrides([f"{override.key_or_group}={value}"])[0] for value in override.sweep_string_iterator()]


def compose(file: Path, overrides: Sequence[Any], given: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe with the overrides in it, resolved, for read_config. given: keys set before the overrides."""
    omegaconf = need("omegaconf", "train")
    groups = [o for o in overrides if (file.parent / o.key_or_group).is_dir()]
    overrides = [o for o in overrides if o not in groups]
    config = load_recipe(file, [o.input_line for o in groups])
    with _reading(file):
        for key, value in {**({} if "name" in config else {"name": file.stem}), **(given or {})}.items():
            omegaconf.OmegaConf.update(config, key, value)
        _spell_out(config)
        _make_room(config, overrides)
        for override in overrides:
            _apply(config, override)
        _spell_out(config)
        _name_the_rest(config)
        _refuse_resolvers(omegaconf.OmegaConf.to_container(config, resolve=False), file)
        return omegaconf.OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _spell_out(config: Any) -> None:
    """`sampler: euler` is short for `sampler: {name: euler}`."""
    OmegaConf = need("omegaconf", "train").OmegaConf
    for key in component_keys():
        if isinstance(value := OmegaConf.select(config, key), str):
            OmegaConf.update(config, key, {"name": value}, merge=False)
    averages = OmegaConf.select(config, "ema")
    if averages is not None:
        averages = [averages] if isinstance(averages, str) or OmegaConf.is_dict(averages) else averages
        OmegaConf.update(config, "ema", [{"name": a} if isinstance(a, str) else a for a in averages], merge=False)


def _name_the_rest(config: Any) -> None:
    """Options alone, `optimizer.weight_decay=0.1`, are options of the default component."""
    OmegaConf, defaults = need("omegaconf", "train").OmegaConf, asdict(Config())
    for key in component_keys():
        if OmegaConf.is_dict(node := OmegaConf.select(config, key)) and "name" not in node:
            default = reduce(lambda home, part: home[part], key.split("."), defaults)
            OmegaConf.update(config, f"{key}.name", default["name"], force_add=True)


def _make_room(config: Any, overrides: Sequence[Any]) -> None:
    """Forget the recipe's options of components that the overrides replace by others; a task keeps what both take."""
    OmegaConf = need("omegaconf", "train").OmegaConf
    for o in overrides:
        for key, name in _named(None if o.is_delete() else o.value(), o.key_or_group):
            if name != OmegaConf.select(config, f"{key}.name"):
                kept = _taken(config.get("task") or {}, name) if key == "task" else {}
                OmegaConf.update(config, key, kept, merge=False, force_add=True)


def _taken(options: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Those of the options that a task on a checkpoint takes too."""
    from nanodiffusion.finetune import FINETUNES  # slow to import

    known = option_types(FINETUNES[task]) if task in FINETUNES else {}
    return {k: v for k, v in options.items() if k in known}


def _apply(config: Any, override: Any) -> None:
    OmegaConf = need("omegaconf", "train").OmegaConf
    key = override.key_or_group
    if override.is_delete():
        parent, _, last = key.rpartition(".")
        home = OmegaConf.select(config, parent) if parent else config
        if home is None or last not in home:
            raise UserError("the recipe does not set this key", key=key, fix=f"leave ~{key} out")
        del home[last]
        return
    value = override.value()
    if key in component_keys() and isinstance(value, str):
        value = {"name": value}
    if key in ("name", "out") and not isinstance(value, str):  # a run may be called 7
        value = override.get_value_string()
    OmegaConf.update(config, key, value, merge=True, force_add=True)
