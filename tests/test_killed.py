"""Fine-tuning killed again and again ends bit by bit as if nothing had happened, and loses no checkpoint: every task."""

from pathlib import Path
from typing import Any

import pytest
from tiny import KINDS, harassed
from tuning import prepare, recipe

from nanodiffusion.finetune import FINETUNES

SHARDED = ("text_to_image", "inpaint_by_tokens", "adapter", "distill")
PAIRS = [(task, "fsdp" if task in SHARDED else "ddp") for task in FINETUNES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("killed"))


def total(counts: dict[str, dict[str, int]], *kinds: str) -> int:
    return sum(found[kind] for found in counts.values() for kind in kinds)


@pytest.mark.slow
def test_a_distillation_killed_while_it_is_trained_ends_bit_by_bit_as_undisturbed(place, tmp_path):
    counts = harassed(tmp_path, {"distill": [recipe("distill", place, steps=5), 4, 0]})
    assert total(counts, *KINDS) >= 3


@pytest.mark.slow
def test_every_task_killed_two_hundred_times_ends_bit_by_bit_as_undisturbed(place, tmp_path):
    """By one process, and by two of which one is killed, which share the net or have it in parts."""
    small: dict[str, Any] = {"batch_size": 2, "steps": 24}
    alone = harassed(tmp_path, {task: [recipe(task, place, **small), 18, i] for i, task in enumerate(FINETUNES)})
    kinds = {f"{task}, {kind}": recipe(task, place, steps=6, parallel=kind) for task, kind in PAIRS}
    shared = harassed(tmp_path, {name: [options, 4, i, 2] for i, (name, options) in enumerate(kinds.items())})
    print({kind: total(alone | shared, kind) for kind in alone["lora"]})
    assert total(alone | shared, *KINDS) >= 200 and total(alone | shared, "inside_a_save") >= 40
    assert all(sum(found[k] for k in KINDS) >= 10 and min(found[k] for k in KINDS) >= 3 for found in alone.values())
    assert total(shared, *KINDS) >= 20 and min(total(shared, kind) for kind in KINDS) >= 3
