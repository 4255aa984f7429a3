"""nano-diffusion's README from "Training" on, as written, in this folder: CONFIG is a YAML file with its keys.

NANO_DIFFUSION_TRAINING_CONFIG=CONFIG torchrun --standalone --nproc_per_node=1 train.py
torchrun --standalone --nproc_per_node=1 train.py --config_path CONFIG
NANO_DIFFUSION_TRAINING_CONFIG=CONFIG sbatch --nodes=2 --output=train.log train.slurm
"""

import sys

from nanodiffusion.compat.nano_sdxl_train import main

if __name__ == "__main__":
    sys.exit(main())
