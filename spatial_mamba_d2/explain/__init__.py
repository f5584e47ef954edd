"""Figures of what a backbone looks at: effective receptive fields, and states in a block."""
