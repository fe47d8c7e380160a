"""The `overnight` command line."""
