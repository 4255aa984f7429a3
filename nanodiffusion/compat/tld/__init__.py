"""apapiu's transformer_latent_diffusion on this core; change the import lines only.

    from tld.train import main, DataConfig, ModelConfig     ->  from nanodiffusion.compat.tld.train import ...
    from tld.diffusion import DiffusionTransformer          ->  from nanodiffusion.compat.tld.diffusion import ...

and so with tld.configs, tld.denoiser and tld.data. A model is called as model(x, noise_level (b 1), label (b d)) with
x = (1 - noise_level) x0 + noise_level eps, and returns x0; x0 times vae_scale_factor is the VAE's unscaled latent.

Where that system has a defect, this follows the core: weights are never random unless asked for; a training checkpoint loads,
whatever its prefixes; pictures have the size asked for; every number of iterations gives that many levels, and no list of
the caller's is changed; bytes are rounded; other than square and other sizes than the net's are errors or resize it; half
precision only where there is a GPU for it; what is random follows from a seed, and image i from `seed + i` alone; wandb is
used where it is installed; pickles are never opened (`nanodiffusion convert` makes safetensors of them).
"""
