"""`infini-train inspect`: what a run's directory tells. Imports no torch and no lightning, so it answers at once."""
