"""Data sets: generated samples, and readers that check what they read. Imports no model."""
