"""What a run trains, as the loop's company sees it: a row of `objective.TASKS` or `finetune.FINETUNES` is one of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from nanodiffusion.config import Config, GridConfig
from nanodiffusion.errors import UserError
from nanodiffusion.nets import net_flops


@dataclass(frozen=True)
class Task:
    """How a model is made, fed, validated and pictured, and what it leaves behind; the fields are the options in a recipe.

    A model is a module with `net` (what is trained, averaged and saved), `precision` and `loss`, see `Trainer`.
    """

    spread: ClassVar[bool] = True  # whether several processes may each draw a part of its pictures

    def settled(self, config: Config) -> Config:
        """The config with what the task alone decides."""
        return config

    def known(self, config: Config, shape: tuple[int, ...], classes: int, data: Any = None) -> dict[str, Any]:
        """Options of the net that the data decides: its samples' shape, how many classes it has, and what else it gives."""
        return {}

    def model(self, config: Config) -> Any:
        """The model of a complete config."""
        raise NotImplementedError

    def finished(self, config: Config) -> Any:
        """What the weights of a trained run are read into: the model, without what only training needs."""
        return self.model(config)

    def prepared(self, data: Any, model: Any) -> Any:
        """A data set as the model takes it."""
        return data

    def check(self, model: Any, config: Config, shape: tuple[int, ...]) -> None:
        """UserError for what would be refused only after training on samples of `shape`."""

    def validator(self, trainer: Any, data: Any, density: Any, most: int) -> Any:
        """What measures the model on `most` samples of held-out data: its row() is a row of metrics."""
        raise NotImplementedError

    def fixed(self, config: Config, model: Any, data: Any) -> dict[str, Tensor]:
        """What the run's pictures are always drawn from, each (k ...)."""
        return {}

    def pictures(
        self, model: Any, config: Config, shape: Sequence[int], fixed: dict[str, Tensor], seeds: range
    ) -> Tensor:
        """Samples (n *shape), one a seed, what is fixed in turn."""
        raise NotImplementedError

    def columns(self, classes: int, fixed: dict[str, Tensor], n: int) -> int:
        """Columns of a grid of n of them; 0 = as square as n allows."""
        return 0

    def publish(self, model: Any, data: Any, seed: int, folder: Path) -> None:
        """Write what comes of a run besides checkpoints into its folder."""

    def flops(self, model: Any) -> int | None:
        """FLOPs of one forward pass of one sample, None where it is not known."""
        return net_flops(model.net)


def refuse_images(sample: GridConfig) -> None:
    """UserError for pictures that are given to a task that reads none."""
    if sample.images:
        fix = "leave sample.images out"
        raise UserError("this task reads no picture", key="sample.images", found=sample.images, fix=fix)


def check_net(net: nn.Module, shape: tuple[int, ...]) -> None:
    """UserError unless a net is made for samples of `shape`."""
    if tuple(net.sample_shape) != tuple(shape):  # type: ignore[arg-type]
        raise UserError(
            "the net does not fit the data",
            key="net",
            expected=f"samples of {tuple(shape)}",
            found=f"a net for {tuple(net.sample_shape)}",  # type: ignore[arg-type]
            fix="leave the net's own size out, the data sets it; points want net.name=mlp",
        )
