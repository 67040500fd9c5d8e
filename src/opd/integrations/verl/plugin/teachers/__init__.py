"""Teacher backends: frozen models in the actor's workers, or servers of verl's that send log-probs or hidden states."""
