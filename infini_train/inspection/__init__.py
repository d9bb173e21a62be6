"""`infini-train inspect` reads a run's directory. It imports no torch and no Lightning, so it answers at once."""
