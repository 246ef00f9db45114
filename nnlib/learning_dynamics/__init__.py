"""Papers on how learning proceeds in time: exact solutions, plateaus, instabilities and biases."""
