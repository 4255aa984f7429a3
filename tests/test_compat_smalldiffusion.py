"""The stand-in for smalldiffusion equals smalldiffusion, but where that has a defect; its scripts run unchanged."""

import copy
import pickle
from functools import reduce
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import in_float64, smalldiffusion
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from nanodiffusion.compat import smalldiffusion as ours
from nanodiffusion.errors import UserError

EXACT = {"rtol": 1e-9, "atol": 1e-9}
TABLES = ["ScheduleLogLinear", "ScheduleDDPM", "ScheduleLDM", "ScheduleCosine", "ScheduleSigmoid", "ScheduleFlow"]
MODIFIERS = [(), ("Scaled",), ("PredX0",), ("PredV",), ("PredFlow",)]
MODIFIERS += [("Scaled", "PredX0"), ("Scaled", "PredV"), ("Scaled", "PredFlow"), ("PredV", "Scaled")]
DIT = {"in_dim": 8, "channels": 3, "patch_size": 2, "depth": 2, "head_dim": 12, "num_heads": 2}
UNET = {
    "in_dim": 8,
    "in_ch": 2,
    "out_ch": 2,
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
}
# name -> (class, its options by either library): every net, with and without embedders of one's own
MODELS = {
    "mlp": ("TimeInputMLP", lambda s: {"hidden_dims": (8, 16)}),
    "mlp-out": ("TimeInputMLP", lambda s: {"dim": 3, "output_dim": 5, "hidden_dims": (8, 16)}),
    "conditional": ("ConditionalMLP", lambda s: {"dim": 3, "hidden_dims": (8, 16), "num_classes": 3}),
    "dit": ("DiT", lambda s: DIT),
    "dit-classes": ("DiT", lambda s: {**DIT, "cond_embed": s.CondEmbedderLabel(24, 3)}),
    "dit-linear": ("DiT", lambda s: {**DIT, "sig_embed": s.SigmaEmbedderSinCos(24, 0.7, log_scale=False)}),
    "dit-time": (
        "DiT",
        lambda s: {**DIT, "sig_embed": s.TimestepEmbedder(24), "cond_embed": s.CondEmbedderLabel(24, 3)},
    ),
    "unet": ("Unet", lambda s: UNET),
    "unet-classes": ("Unet", lambda s: {**UNET, "cond_embed": s.CondEmbedderLabel(128, 3)}),
    "unet-narrow": ("Unet", lambda s: {**UNET, "out_ch": 3, "embed_ch_mult": 2}),
    "unet-time": ("Unet", lambda s: {**UNET, "sig_embed": s.TimestepEmbedder(128)}),
}
OTHER_OUTPUT = {"mlp-out", "unet-narrow"}
every_model = pytest.mark.parametrize("name", MODELS)
every_modifier = pytest.mark.parametrize("modifiers", MODIFIERS, ids="-".join)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def refused(match):
    return pytest.raises(UserError, match=match)


def build(library, name, modifiers=()):
    kind, options = MODELS[name]
    return reduce(lambda cls, m: getattr(library, m)(cls), modifiers, getattr(library, kind))(**options(library))


def twins(name, modifiers=()):
    """smalldiffusion's model and ours with its weights, all of them random, in float64 where its embedder allows it."""
    dtype = torch.float32 if name.endswith("time") else torch.float64
    theirs, mine = (build(library, name, modifiers).to(dtype).eval() for library in (smalldiffusion(), ours))
    for p in theirs.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def inputs(model, modifiers=(), b=3):
    """x, sigma (b 1 ... 1), labels; in flow time when the model is."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(b, *model.input_dims, dtype=dtype)
    sigma = torch.tensor([0.05, 0.4, 0.95] if "PredFlow" in modifiers else [0.02, 1.3, 40.0], dtype=dtype)
    return x, sigma.reshape(-1, *[1] * (x.ndim - 1)), torch.tensor([0, 2, 3])


def tolerance(name):
    return {"rtol": 1e-4, "atol": 2e-5} if name.endswith("time") else EXACT


def labels_for(model, cond):
    return cond if getattr(model, "cond_embed", None) is not None else None


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("n", [200, 1000])
def test_table_is_smalldiffusions(name, n):
    with in_float64():
        theirs = getattr(smalldiffusion(), name)(N=n)
    mine = getattr(ours, name)(N=n)
    assert len(mine) == n and mine.sigmas.dtype == torch.float32
    assert_close(mine.sigmas, theirs.sigmas.float(), rtol=1e-6, atol=0)
    assert_close(mine[[3, 0]], theirs[[3, 0]].float(), rtol=1e-6, atol=0)


def test_positional_arguments_mean_the_same():
    s = smalldiffusion()
    for name, args in {
        "ScheduleLogLinear": (50, 0.01, 35.0),
        "ScheduleDDPM": (500, 2e-4, 0.03),
        "ScheduleLDM": (500, 1e-3, 0.02),
        "ScheduleSigmoid": (500, 2e-4, 0.03),
        "ScheduleCosine": (500, 0.1, 0.2, 0.9),
        "ScheduleFlow": (300, 0.04, 0.9),
    }.items():
        with in_float64():
            theirs = getattr(s, name)(*args).sigmas.float()
        assert_close(getattr(ours, name)(*args).sigmas, theirs, rtol=1e-6, atol=0)


def test_sigmas_from_betas_is_smalldiffusions():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert_close(ours.sigmas_from_betas(betas), smalldiffusion().diffusion.sigmas_from_betas(betas))
    assert ours.sigmas_from_betas(betas.float()).dtype == torch.float32


@pytest.mark.parametrize("name", [t for t in TABLES if t != "ScheduleFlow"])
@pytest.mark.parametrize("steps", [1, 7, 20, 200])
def test_ladder_is_smalldiffusions_but_ends_at_zero(name, steps):
    with in_float64():
        theirs = getattr(smalldiffusion(), name)(N=200).sample_sigmas(steps).float()
    mine = getattr(ours, name)(N=200).sample_sigmas(steps)
    assert_close(mine[:-1], theirs[:-1], rtol=1e-6, atol=0)
    assert mine[-1] == 0 and len(mine) == steps + 1


@pytest.mark.parametrize("name", ["ScheduleFlow", "ScheduleLogNormalFlow"])
def test_flow_ladder_is_smalldiffusions(name):
    for steps in (1, 2, 20):
        theirs = getattr(smalldiffusion(), name)(t_min=0.04).sample_sigmas(steps)
        assert_close(getattr(ours, name)(t_min=0.04).sample_sigmas(steps), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*TABLES, "ScheduleLogNormalFlow"])
def test_training_levels_are_those_smalldiffusion_draws_from_the_same_seed(name):
    x0 = torch.zeros(4096, 2, dtype=torch.float64)
    torch.manual_seed(3)
    mine = getattr(ours, name)(N=100).sample_batch(x0)
    torch.manual_seed(3)
    theirs = getattr(smalldiffusion(), name)(N=100).sample_batch(x0.float()).double()
    assert mine.dtype == torch.float64
    assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert len(getattr(ours, name)(N=100).sample_batch(5)) == 5  # before 0.5 it took the size


def test_a_table_of_your_own():
    schedule = ours.Schedule(torch.tensor([0.1, 1.0, 3.0, 7.0]))
    assert schedule.sample_sigmas(2).tolist() == [7.0, 1.0, 0.0]
    with refused("strictly increasing"):
        ours.Schedule(torch.tensor([1.0, 0.5]))
    with refused("steps"):
        schedule.sample_sigmas(5)


def test_train_sample_is_smalldiffusions_from_the_same_seed():
    batch = torch.randn(6, 3, 4, 4), torch.arange(6)
    for conditional, data in ((False, batch[0]), (True, batch)):
        results = []
        for library in (smalldiffusion(), ours):
            torch.manual_seed(1)
            results.append(library.generate_train_sample(data, library.ScheduleLogLinear(50), conditional))
        for theirs, mine in zip(*results):
            assert_close(mine, theirs) if theirs is not None else mine is None


# --- models ----------------------------------------------------------------------------------------------------------


@every_model
@every_modifier
def test_model_is_smalldiffusions_for_one_sigma_and_for_many(name, modifiers):
    theirs, mine = twins(name, modifiers)
    x, sigma, cond = inputs(mine, modifiers)
    cond = labels_for(mine, cond)
    with torch.no_grad():
        for s in (sigma, sigma[1].reshape(())):
            want = theirs(x, s, cond=cond)
            assert want.std() > 0.01
            assert_close(mine(x, s, cond=cond), want, **tolerance(name))


@pytest.mark.parametrize("name", sorted(MODELS.keys() - OTHER_OUTPUT))
@every_modifier
def test_loss_and_eps_are_smalldiffusions(name, modifiers):
    theirs, mine = twins(name, modifiers)
    x, sigma, cond = inputs(mine, modifiers)
    cond, eps = labels_for(mine, cond), torch.randn_like(x)
    with torch.no_grad():
        for loss in (nn.MSELoss, nn.L1Loss):
            want = theirs.get_loss(x, sigma, eps, cond=cond, loss=loss)
            assert_close(mine.get_loss(x, sigma, eps, cond=cond, loss=loss), want, **tolerance(name))
        for s in (sigma, sigma[1].reshape(())):
            want = theirs.predict_eps(x, s, cond=cond)
            assert_close(mine.predict_eps(x, s, cond=cond), want, **tolerance(name))
        want = theirs.predict_eps_cfg(x, s, cond, 1.5)
        assert_close(mine.predict_eps_cfg(x, s, cond, 1.5), want, **tolerance(name))


def test_flow_loss_is_smalldiffusions_up_to_the_cap_at_pure_noise():
    theirs, mine = (m.float() for m in twins("mlp", ("PredFlow",)))
    t = torch.tensor([[1e-3], [0.5], [0.999], [1.0]])
    x0, eps = torch.randn(4, 2), torch.randn(4, 2)
    assert_close(mine.get_loss(x0, t, eps), theirs.get_loss(x0, t, eps), rtol=1e-3, atol=0)


def test_training_drops_the_labels_that_smalldiffusion_drops():
    theirs, mine = twins("conditional")
    x, sigma, _ = inputs(mine, b=3)
    cond = torch.randint(3, (64,))
    outs = []
    for model in (theirs.train(), mine.train()):
        torch.manual_seed(5)
        outs.append(model(x[:1].expand(64, -1), sigma[1].reshape(()), cond=cond))
    assert_close(outs[1], outs[0], **EXACT)
    assert not torch.equal(mine.eval()(x[:1].expand(64, -1), sigma[1].reshape(()), cond=cond), outs[1])


@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)])
def test_ideal_denoiser_is_smalldiffusions(shape):
    data = torch.randn(50, *shape, dtype=torch.float64)
    theirs, mine = smalldiffusion().IdealDenoiser(data), ours.IdealDenoiser(data)
    x, sigma = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([0.3, 2.0, 30.0], dtype=torch.float64)
    assert mine.input_dims == shape
    assert_close(mine(x, sigma[1]), theirs(x, sigma[1]), **EXACT)
    each = torch.cat([theirs(x[i : i + 1], s) for i, s in enumerate(sigma)])
    assert_close(mine(x, sigma.reshape(-1, *[1] * len(shape))), each, **EXACT)


def test_embedders_are_smalldiffusions_with_its_keys():
    s = smalldiffusion()
    for sigma in (torch.tensor(0.7), torch.tensor([0.1, 2.0, 9.0])):
        for options in ((), (0.3, False)):
            assert_close(ours.get_sigma_embeds(3, sigma, *options), s.get_sigma_embeds(3, sigma, *options))
        for name in ("SigmaEmbedderSinCos", "TimestepEmbedder"):
            theirs, mine = getattr(s, name)(16), getattr(ours, name)(16)
            mine.load_state_dict(theirs.state_dict())
            assert_close(mine(3, sigma), theirs(3, sigma), rtol=1e-4, atol=1e-5)
    with refused("one value"):
        ours.get_sigma_embeds(3, torch.ones(2))


def test_dit_and_unet_start_as_nothing():
    dit, unet = build(ours, "dit-classes"), build(ours, "unet-narrow")
    for net in (dit, unet):
        x, sigma, cond = torch.randn(2, *net.input_dims), torch.tensor(1.0), torch.tensor([0, 1])
        assert not net(x, sigma, cond).any()
    assert not any(p.any() for name, p in dit.named_parameters() if "adaLN" in name)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_its_own_state_dict(name):
    a, b = build(ours, name).eval(), build(ours, name).eval()
    for p in a.parameters():
        p.data = torch.randn_like(p) * 0.1
    b.load_state_dict(a.state_dict())
    x, sigma, cond = inputs(a)
    assert_close(b(x, sigma, cond), a(x, sigma, cond), rtol=0, atol=0)


def test_modified_models_pickle_and_copy():
    model = ours.PredV(ours.Scaled(ours.TimeInputMLP))(hidden_dims=(8, 8))
    x, sigma = torch.randn(4, 2), torch.tensor(0.5)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert_close(twin.predict_eps(x, sigma), model.predict_eps(x, sigma), rtol=0, atol=0)
    named = pickle.loads(pickle.dumps(Named(hidden_dims=(8, 8))))
    assert type(named) is Named and named.greeting == "hello"
    modified = pickle.loads(pickle.dumps(ours.Scaled(Named)(hidden_dims=(8, 8))))
    assert type(modified) is ours.Scaled(Named) and modified.greeting == "hello"


class Named(ours.PredX0(ours.TimeInputMLP)):
    greeting = "hello"


# --- sampling --------------------------------------------------------------------------------------------------------

SAMPLERS = {"ddpm": (1.0, 0.5), "ddim": (1.0, 0.0), "accelerated": (2.0, 0.0)}


def run(library, model, sigmas, *args, **options):
    torch.manual_seed(11)
    return torch.stack(list(library.samples(model, sigmas, *args, **options)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("modifiers", [(), ("Scaled", "PredV")], ids="-".join)
def test_samples_are_smalldiffusions_step_by_step(sampler, cfg_scale, modifiers):
    theirs, mine = twins("conditional", modifiers)
    ladder = smalldiffusion().ScheduleLogLinear(200).sample_sigmas(12).double()  # as far as sigma_min, where it stops
    xt, cond = ladder[0] * torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    args = (ladder, *SAMPLERS[sampler], cfg_scale, 4, xt, cond)
    want = run(smalldiffusion(), theirs, *args)
    assert_close(run(ours, mine, *args), want, **EXACT)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_from_noise_are_smalldiffusions(sampler):
    theirs, mine = (m.float() for m in twins("mlp"))
    gam, mu = SAMPLERS[sampler]
    ladder = ours.ScheduleDDPM().sample_sigmas(10)[:-1]
    want = run(smalldiffusion(), theirs, ladder, gam=gam, mu=mu, batchsize=5)
    assert_close(run(ours, mine, ladder, gam=gam, mu=mu, batchsize=5), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gam", [1.0, 1.6])
@pytest.mark.parametrize("modifiers", [("PredFlow",), ("Scaled", "PredFlow")], ids="-".join)
def test_flow_samples_are_smalldiffusions(gam, modifiers):
    theirs, mine = (m.float() for m in twins("mlp", modifiers))
    for steps in (1, 20):
        want = run(smalldiffusion(), theirs, smalldiffusion().ScheduleFlow().sample_sigmas(steps), gam, batchsize=8)
        got = run(ours, mine, ours.ScheduleFlow().sample_sigmas(steps), gam, batchsize=8)
        assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_ladder_that_ends_at_zero_ends_on_the_data():
    data = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    *_, x0 = ours.samples(ours.IdealDenoiser(data), ours.ScheduleLogLinear(200).sample_sigmas(20), batchsize=16)
    assert_close(torch.cdist(x0, data).amin(1), torch.zeros(16))


def test_a_seed_is_an_images_own():
    model, ladder = build(ours, "mlp"), ours.ScheduleLogLinear(200).sample_sigmas(5)
    batch = torch.stack(list(ours.samples(model, ladder, mu=0.5, batchsize=3, seed=7)))
    alone = torch.stack(list(ours.samples(model, ladder, mu=0.5, batchsize=1, seed=9)))
    assert_close(batch[:, 2:], alone)
    drawn = [
        torch.stack(list(ours.samples(model, ladder, mu=0.5, batchsize=3, generator=torch.Generator().manual_seed(k))))
        for k in (4, 4, 5)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_sampling_takes_an_accelerator_and_any_iterable_of_levels():
    model = build(ours, "mlp")
    (x,) = ours.samples(model, iter([2.0, 0.0]), accelerator=SimpleNamespace(device=torch.device("cpu")))
    assert x.shape == (1, 2) and not x.requires_grad


# --- training --------------------------------------------------------------------------------------------------------


def test_the_ten_lines_of_the_readme(capsys):
    from nanodiffusion.compat.smalldiffusion import ScheduleLogLinear, Swissroll, TimeInputMLP, samples, training_loop

    dataset = Swissroll(np.pi / 2, 5 * np.pi, 100)
    loader = DataLoader(dataset, batch_size=2048)
    model = TimeInputMLP(hidden_dims=(16, 128, 128, 128, 128, 16))
    schedule = ScheduleLogLinear(N=200)
    trainer = training_loop(loader, model, schedule, epochs=200)
    losses = [ns.loss.item() for ns in trainer]
    *xt, x0 = samples(model, schedule.sample_sigmas(20))

    assert sum(p.numel() for p in model.parameters()) == 53_890
    assert len(losses) == 200 and np.mean(losses[-40:]) < 0.8 * np.mean(losses[:10])
    assert len(xt) == 19 and x0.shape == (1, 2) and bool(x0.isfinite().all())


def test_print_the_loss_from_the_loop(capsys):
    loader, model, schedule = [torch.randn(8, 2)], ours.TimeInputMLP(), ours.ScheduleLogLinear(N=200)
    for ns in ours.training_loop(loader, model, schedule, epochs=3):
        print(ns.loss.item())
    assert len([float(line) for line in capsys.readouterr().out.split()]) == 3


@pytest.mark.parametrize("conditional", [False, True])
def test_losses_and_weights_follow_smalldiffusions(conditional):
    """The same seed gives the same losses; our weights after k updates are those it has when it yields number k + 1."""
    theirs, mine = (m.float() for m in twins("conditional" if conditional else "mlp"))
    dim = mine.input_dims[0]
    data = torch.randn(12, dim), torch.arange(12) % 3
    dataset = TensorDataset(*data) if conditional else ours.MappedDataset(TensorDataset(*data), lambda item: item[0])
    losses, weights = [], []
    for library, model, pulls in ((smalldiffusion(), theirs, 16), (ours, mine, 15)):
        torch.manual_seed(2)
        loader = DataLoader(dataset, batch_size=4)
        loop = library.training_loop(loader, model, library.ScheduleLogLinear(100), epochs=9, conditional=conditional)
        losses.append([ns.loss.item() for ns in islice(loop, pulls)][:15])
        weights.append(model.net[0].weight.detach())
    assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
    assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_what_the_loop_yields_is_after_the_update():
    model = ours.TimeInputMLP(hidden_dims=(8,))
    before = model.net[0].weight.detach().clone()
    ns = next(ours.training_loop([torch.randn(8, 2)], model, ours.ScheduleLogLinear(100), lr=1e-2))
    assert not torch.equal(model.net[0].weight, before)
    assert ns.model is model and ns.x0.shape == ns.eps.shape == (8, 2) and ns.sigma.shape == (8, 1) and ns.cond is None
    assert ns.optimizer.param_groups[0]["lr"] == 1e-2 and ns.pbar.total == 10000 and model.training


def test_the_loop_uses_the_accelerator_it_is_given():
    calls = []
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        prepare=lambda *parts: calls.append("prepare") or parts,
        backward=lambda loss: calls.append("backward") or loss.backward(),
    )
    loop = ours.training_loop([torch.randn(8, 2)], ours.TimeInputMLP(), ours.ScheduleDDPM(), accelerator, epochs=2)
    assert len(list(loop)) == 2 and calls == ["prepare", "backward", "backward"]


class Small(nn.Module, ours.ModelMixin):
    """A user's model: one layer, with its own loss."""

    input_dims = (2,)

    def __init__(self):
        super().__init__()
        self.layer, self.asked = nn.Linear(3, 2), 0

    def forward(self, x, sigma, cond=None):
        return self.layer(torch.cat([x, sigma.log().expand(len(x), 1)], dim=1))

    def get_loss(self, x0, sigma, eps, cond=None, loss=nn.MSELoss):
        self.asked += 1
        return 2 * super().get_loss(x0, sigma, eps, cond, loss)


@pytest.mark.parametrize("modifier", [lambda cls: cls, ours.Scaled, ours.PredX0, ours.PredV])
def test_a_users_model_trains_and_samples(modifier):
    model, schedule = modifier(Small)(), ours.ScheduleLogLinear(100)
    losses = [ns.loss for ns in ours.training_loop([torch.randn(64, 2)], model, schedule, epochs=60, lr=0.05)]
    assert torch.stack(losses[-20:]).mean() < torch.stack(losses[:5]).mean()
    assert model.asked == (60 if modifier in (ours.Scaled,) or type(model) is Small else 0)
    *_, x0 = ours.samples(model, schedule.sample_sigmas(10), gam=2, batchsize=3)
    assert x0.shape == (3, 2) and bool(x0.isfinite().all())


def test_a_subclass_of_the_mlp_may_call_its_layers():
    class Conditioned(ours.TimeInputMLP):
        def __init__(self):
            super().__init__(dim=2 + 4, output_dim=2, hidden_dims=(8,))
            self.input_dims, self.table = (2,), nn.Embedding(3, 4)

        def forward(self, x, sigma, cond):
            return self.net(torch.cat([x, ours.get_sigma_embeds(len(x), sigma.squeeze()), self.table(cond)], dim=1))

    batch = torch.randn(8, 2), torch.arange(8) % 3
    loop = ours.training_loop([batch], Conditioned(), ours.ScheduleLogLinear(50), epochs=2, conditional=True)
    assert len([ns.loss.item() for ns in loop]) == 2


# --- data ------------------------------------------------------------------------------------------------------------


def test_data_sets_are_smalldiffusions_item_by_item(tmp_path):
    table = tmp_path / "dozen.tsv"
    table.write_text("dino\t55.4\t97.2\nstar\t58.2\t91.9\ndino\t51.5\t96.0\n")
    for name, args in {
        "Swissroll": (np.pi / 2, 5 * np.pi, 40, (1, -2), 1.5),
        "TreeDataset": (3, 2, 7),
        "DatasaurusDozen": (str(table), "dino", 4, "\t", 40, 45),
    }.items():
        theirs, mine = getattr(smalldiffusion(), name)(*args), getattr(ours, name)(*args)
        assert len(mine) == len(theirs)
        for batch, want in zip(DataLoader(mine, 16), DataLoader(theirs, 16), strict=True):
            assert_close(batch, want, rtol=1e-5, atol=1e-5)
    assert ours.TreeDataset(3, 2, 7).total_leaves == 9


def test_images_go_to_minus_one_and_one_mirrored_half_of_the_time():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 11
    straight = torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1
    seen = torch.stack([ours.img_train_transform(Image.fromarray(pixels)) for _ in range(400)])
    mirrored = (seen - straight).abs().amax((1, 2, 3)) > 1e-6
    assert_close(seen, torch.where(mirrored[:, None, None, None], straight.flip(2), straight))
    assert 150 < mirrored.sum() < 250
    assert ours.img_train_transform(Image.fromarray(pixels[:, :, 0])).shape == (1, 2, 4)
    assert_close(ours.img_normalize(torch.tensor([-2.0, -1, 0, 1, 3])), torch.tensor([0, 0, 0.5, 1, 1]))


# --- what is refused -------------------------------------------------------------------------------------------------


def sampled(model, sigmas=(1.0, 0.0), **options):
    return list(ours.samples(model, sigmas, **options))


def trained(model, loader, schedule=None, **options):
    return list(ours.training_loop(loader, model, schedule or ours.ScheduleLogLinear(50), epochs=2, **options))


X = torch.randn(4, 2)
REFUSALS = {
    "mu with a flow model": (lambda: sampled(ours.PredFlow(Small)(), mu=0.5), "flow time"),
    "mu with a flow ladder": (lambda: sampled(Small(), ours.ScheduleFlow().sample_sigmas(4), mu=0.5), "flow time"),
    "mu = 1": (lambda: sampled(Small(), mu=1.0), "key mu"),
    "flow model on sigmas": (lambda: sampled(ours.PredFlow(Small)(), (10.0, 1.0)), "PredFlow"),
    "flow model trained on sigmas": (lambda: trained(ours.PredFlow(Small)(), [X]), "PredFlow"),
    "rising ladder": (lambda: sampled(Small(), (0.1, 1.0)), "decreasing"),
    "zero inside a ladder": (lambda: sampled(Small(), (1.0, 0.0, 0.0)), "decreasing"),
    "one level": (lambda: sampled(Small(), (1.0,)), "decreasing"),
    "cond of another size": (lambda: sampled(Small(), batchsize=3, cond=torch.zeros(2)), "one entry per sample"),
    "guidance without a null class": (lambda: sampled(Small(), cond=torch.zeros(1), cfg_scale=2), "null class"),
    "no label": (lambda: sampled(ours.ConditionalMLP()), "conditional"),
    "labels in the batches": (lambda: trained(Small(), [(X, X)]), "conditional=True"),
    "empty loader": (lambda: trained(Small(), []), "no batch"),
    "loader read once": (lambda: trained(Small(), iter([X])), "epoch 2"),
    "sigma of another size": (lambda: ours.TimeInputMLP()(X, torch.ones(3, 1)), "one per sample"),
    "no input_dims": (lambda: ours.ModelMixin().rand_input(1), "input_dims"),
    "another delimiter": (lambda: ours.DatasaurusDozen("x.csv", "dino", delimiter=","), "tabs"),
    "no image": (lambda: ours.img_train_transform(np.zeros((2, 2))), "no image"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_mistakes_are_named(case):
    do, message = REFUSALS[case]
    with refused(message):
        do()
