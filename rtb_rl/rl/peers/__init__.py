"""Other methods of offline RL, trained on the same data, priors and critics."""
