"""Proposers: whoever answers a prompt with one change to the configuration."""
