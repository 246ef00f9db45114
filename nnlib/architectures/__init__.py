"""Networks built from other parts, in other orders, or from less."""
