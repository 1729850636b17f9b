"""Training on the model file that is served, with the ops that serve it."""
