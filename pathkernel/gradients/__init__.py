"""Per-sample gradients of one network: the module as a pure function of θ, losses, layers, factored gradients."""
