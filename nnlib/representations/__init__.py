"""Methods of the part "Representations": what networks learn to encode, and how to compare it."""
