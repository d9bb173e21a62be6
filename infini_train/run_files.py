"""Names of the files of a run. They are here, without torch, for `infini-train inspect` and preflight."""

CONFIG = "config.yaml"  # in the run's directory and in each checkpoint
FIRST_ERROR = "first-error.txt"
LOCK = "lock"  # held by global rank 0 during training
LATEST = "latest"  # in the directory of checkpoints
COMPLETE, CURSOR, METRICS, MODEL_CONFIG = "COMPLETE", "cursor.json", "metrics.json", "model_config.json"
