"""Networks of infinite width: the kernels they become, and what training does to them."""
