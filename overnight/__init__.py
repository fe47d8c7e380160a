"""Unattended campaigns of short training experiments that get better at choosing themselves."""
