"""The commands: one module each, plain functions first, and its registration with the command line last."""
