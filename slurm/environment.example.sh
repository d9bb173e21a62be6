# Copy this file to slurm/environment.sh (or name it by INFINI_ENVIRONMENT or `infini-train submit --environment`) and
# keep what your cluster needs. The batch scripts source it on the first node; srun passes the variables to all tasks.

# modules
# module load cuda/12.8 nccl

# a virtual environment, or conda
# source "$HOME/infini-train/.venv/bin/activate"
# source "$HOME/miniforge3/etc/profile.d/conda.sh" && conda activate infini-train

# a container: words that precede `python` in every task
# CONTAINER=(apptainer exec --nv --bind /scratch "$HOME/infini-train.sif")

# network
# export NCCL_SOCKET_IFNAME=ib0 NCCL_DEBUG=WARN
