"""Networks that store patterns and complete them."""
