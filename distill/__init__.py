"""Local models: the process that holds one, scoring a whole menu in one pass, and (later) retraining on the history."""
