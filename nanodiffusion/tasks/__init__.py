"""Every task of Stable Diffusion as arguments of one function, `generate`.

request: what is asked, and what cannot be. conditions: what it becomes, cond and denoisers. run: the function. plan: memory.
"""

from nanodiffusion.tasks.conditions import between, slerp
from nanodiffusion.tasks.plan import plan
from nanodiffusion.tasks.request import AdapterInput, Control, GenerateConfig, Inputs, complete, settle
from nanodiffusion.tasks.run import Job, eps_of, generate, paste, pictures, prepare, with_eps

__all__ = [
    "AdapterInput",
    "Control",
    "GenerateConfig",
    "Inputs",
    "Job",
    "between",
    "complete",
    "eps_of",
    "generate",
    "paste",
    "pictures",
    "plan",
    "prepare",
    "settle",
    "slerp",
    "with_eps",
]
