"""Networks that answer with distributions."""
