"""Names of the files that a run leaves; for `infini-train inspect` and preflight too, which do without torch."""

CONFIG = "config.yaml"  # in the run's directory, and in each of its checkpoints
FIRST_ERROR = "first-error.txt"
LOCK = "lock"  # held by global rank 0 while it trains
LATEST = "latest"  # beside the checkpoints
COMPLETE, CURSOR, METRICS, MODEL_CONFIG = "COMPLETE", "cursor.json", "metrics.json", "model_config.json"
