"""Passes over programs, a file each; `pipeline` has their order."""
