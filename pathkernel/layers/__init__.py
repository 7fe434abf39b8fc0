"""Per-sample gradients layer by layer, as activations × back-propagated signals, without forming them."""
