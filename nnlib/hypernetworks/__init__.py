"""Networks that write the weights of other networks."""
