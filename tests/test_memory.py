"""The expected peak is what the allocations add up to; moving a component changes none of its numbers."""

import mmap
from contextlib import contextmanager
from pathlib import Path

import pytest
import sd_files
import torch
from torch import nn

from nanodiffusion.errors import UserError
from nanodiffusion.memory import (
    GIB,
    PLANS,
    Peak,
    Stage,
    allocated,
    at_work,
    choose,
    expected_peak,
    free_memory,
    on_meta,
)
from nanodiffusion.pretrained import load_pretrained
from nanodiffusion.tasks import GenerateConfig, Inputs, complete, generate, pictures, plan, settle
from nanodiffusion.tasks.plan import stages

CPU, META = torch.device("cpu"), torch.device("meta")


class Doubling(nn.Module):
    """1 MiB in, twice doubled in size: alive together are at most 2 MiB and 4 MiB."""

    def forward(self, x):
        x = torch.cat([x, x])
        return torch.cat([x, x])


def stage(n: int = 2**18) -> Stage:
    return Stage(Doubling(), lambda m: m(torch.empty(n)))


def test_the_ledger_counts_what_lives_together():
    mib = 2**20
    assert allocated(stage()) == (1 + 2 + 4) * mib  # the caller's own tensor lives on while its doubles are made
    chain = Stage(nn.Sequential(*[nn.ReLU() for _ in range(9)]), lambda m: m(torch.empty(2**18)))
    assert allocated(chain) == 3 * mib  # the argument, and the last two of the chain


def test_weights_are_not_counted_as_allocations():
    net = nn.Linear(1000, 1000, bias=False)
    assert allocated(Stage(net, lambda m: m(torch.empty(1, 1000)))) == 2 * 4000
    assert Stage(net, lambda m: None).weights == 4_000_000


def test_attention_is_counted_without_its_scores():
    attend = torch.nn.functional.scaled_dot_product_attention
    n = 4096
    heads = Stage(nn.Identity(), lambda m: attend(*[m(torch.empty(1, 8, n, 8))] * 3))
    assert allocated(heads) == 2 * 8 * n * 8 * 4


def test_offloading_counts_one_component_at_a_time_where_there_is_somewhere_to_go():
    a, b = (Stage(nn.Linear(n, n, bias=False), lambda m: m(torch.empty(1, m.in_features))) for n in (500, 1000))
    both = 4 * (500**2 + 1000**2)
    assert expected_peak({"a": a, "b": b}, False, torch.device("cuda")) == both + 8000
    assert expected_peak({"a": a, "b": b}, True, torch.device("cuda")) == 4 * 1000**2 + 8000
    assert expected_peak({"a": a, "b": b}, True, CPU) == both + 8000


def test_auto_takes_the_first_plan_that_fits():
    free = free_memory(CPU)
    needs = {"fast": free, "balanced": free // 2, "low": free // 4}
    stages = lambda plan: {"x": Stage(nn.Identity(), lambda m: torch.empty(needs[plan.name] // 4))}
    assert choose("auto", stages, CPU).name == "balanced"
    assert choose("fast", stages, CPU).name == "fast"
    assert choose("auto", lambda plan: {"x": stage(2**50)}, CPU).name == "low"


def test_a_module_at_work_comes_back_bit_for_bit():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    with at_work(net, CPU, offload=True):
        pass
    assert [p.data_ptr() for p in net.parameters()] == pointers
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


class Numbers:
    """Of a tensor what `at_work` uses; there is no second device here."""

    def __init__(self, device):
        self.device = device

    def to(self, device):
        return Numbers(device)

    def data_ptr(self):
        return id(self)


class Weight:
    """The same of a parameter."""

    def __init__(self, device):
        self.data = Numbers(device)

    device = property(lambda self: self.data.device)
    data_ptr = property(lambda self: self.data.data_ptr)


@pytest.mark.parametrize("offload", [True, False])
def test_what_overlapping_blocks_share_comes_home_with_the_last_of_them(monkeypatch, offload):
    weight = Weight("home")
    monkeypatch.setattr("nanodiffusion.memory.tensors_of", lambda module: [weight])
    outer, inner, other = (at_work(nn.Identity(), "there", offload=o) for o in (True, True, offload))
    outer.__enter__()
    inner.__enter__()
    inner.__exit__(None, None, None)
    assert weight.device == "there"
    other.__enter__()
    outer.__exit__(None, None, None)
    assert weight.device == "there"  # the other run is not done
    other.__exit__(None, None, None)
    assert weight.device == "home"


def test_a_weight_that_is_replaced_at_work_is_brought_home(monkeypatch):
    weight = Weight("home")
    monkeypatch.setattr("nanodiffusion.memory.tensors_of", lambda module: [weight])
    before = weight.data
    with at_work(nn.Identity(), "there", offload=True):
        pass
    assert weight.data is before
    with at_work(nn.Identity(), "there", offload=True):
        weight.data = Numbers("there")  # as a LoRA does that is fused in the middle of a run
    assert weight.device == "home" and weight.data is not before


def test_weights_that_are_there_already_do_not_count_against_what_is_free(monkeypatch):
    monkeypatch.setattr("nanodiffusion.memory.free_memory", lambda device: 0)
    there = Stage(nn.Linear(2**10, 2**8, bias=False, device=META), lambda m: None)
    assert choose("auto", lambda plan: {"a": there, "again": there}, META).free == 2**20
    assert choose("auto", lambda plan: {"a": stage()}, CPU).free == 0


def test_a_ghost_has_shapes_and_no_numbers():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ghost = on_meta(net)
    assert {k: (v.shape, v.device) for k, v in ghost.state_dict().items()} == {
        k: (v.shape, META) for k, v in net.state_dict().items()
    }
    assert all(v.device == CPU for v in net.state_dict().values())


def test_the_measured_peak_contains_what_was_allocated():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system tells no high-water mark")
    block = mmap.mmap(-1, 2**28)  # 256 MiB; an allocator may have as much left over
    with Peak(CPU) as peak:
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    assert 0.9 * GIB / 4 < peak.bytes < 1.3 * GIB / 4


def test_an_unknown_plan_names_the_valid_ones():
    with pytest.raises(UserError, match="balanced"):
        choose("turbo", lambda plan: {}, CPU)


def test_a_plan_says_what_it_does():
    assert "tiles of 64" in str(PLANS["low"]) and "everything at once" in str(PLANS["fast"])


# -- plans of a whole run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["fast", "balanced", "low", "auto"])
@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_a_memory_plan_changes_where_the_work_is_done_and_not_its_result(family, memory):
    bundle = load_pretrained(sd_files.tree(family), device="cpu", offload=True)
    wanted = list(generate(bundle, "a cat", steps=2, width=64, height=64))[-1].x
    chosen = plan(bundle, settle(GenerateConfig(), prompt="a cat", width=64, height=64, n=2), memory=memory)
    assert memory in ("auto", chosen.name) and chosen.expected > 0
    made = list(generate(bundle, "a cat", steps=2, width=64, height=64))[-1].x
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)
    assert (bundle.codec.tile, bundle.codec.slices) == (chosen.tile, chosen.slices)


def test_only_what_works_is_on_the_device(monkeypatch):
    bundle = load_pretrained(sd_files.tree("sdxl"), device="cpu", offload=True)
    bundle.plan = PLANS["balanced"]
    held, most = [], []

    @contextmanager
    def watched(net, device, offload):
        held.append(net)
        most.append(len(held))
        yield
        held.remove(net)

    monkeypatch.setattr("nanodiffusion.pretrained.load.at_work", watched)
    *_, last = generate(bundle, "a cat", steps=2, width=64, height=64)
    pictures(bundle, last.x)
    assert not held and max(most) == 2  # both text encoders; then the U-Net, then the codec


def test_the_codec_stays_until_the_gradient_of_a_loss_has_gone_through_it(monkeypatch):
    """Away from work its weights are NaN here, which a gradient that comes too late would meet."""
    bundle = load_pretrained(sd_files.tree("sd1"), device="cpu")
    asked = {"prompt": "a cat", "steps": 2, "loss": lambda image: image.square().flatten(1).mean(1)}
    wanted = list(generate(bundle, **asked))[-1].x
    homes = {name: p.data for name, p in bundle.codec.named_parameters()}
    depth = []

    @contextmanager
    def watched(net, device, offload):
        if net is bundle.codec:
            depth.append(net)
            put(homes.get)
        yield
        if net is bundle.codec and not (depth.pop() and depth):
            put(lambda name: torch.full_like(homes[name], torch.nan))

    def put(values):
        for name, p in bundle.codec.named_parameters():
            p.data = values(name)

    monkeypatch.setattr("nanodiffusion.pretrained.load.at_work", watched)
    torch.testing.assert_close(list(generate(bundle, **asked))[-1].x, wanted, rtol=0, atol=0)


def test_the_expected_peak_of_decoding_falls_with_slices_and_tiles():
    bundle = load_pretrained(sd_files.tree("sd1"), device="cpu")
    config = settle(GenerateConfig(), prompt="a cat", width=1024, height=1024, n=2)
    config = complete(bundle, config, Inputs())
    peaks = {name: allocated(stages(bundle, config, Inputs(), how)["codec"]) for name, how in PLANS.items()}
    assert peaks["balanced"] < 0.6 * peaks["fast"] and peaks["low"] < 0.6 * peaks["balanced"]
