"""`infini-train inspect`: what a run's directory tells. Imports neither torch nor lightning, so it answers at once."""
