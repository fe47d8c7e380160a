"""The host application. That its package is called `agent` is no accident: so are many, and nothing of ours minds."""
