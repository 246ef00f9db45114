"""Modules of the part *Scientific machine learning*."""
