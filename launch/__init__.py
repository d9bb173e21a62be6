"""Commands that start training: on this machine, under SLURM, and the check of all nodes before it."""
