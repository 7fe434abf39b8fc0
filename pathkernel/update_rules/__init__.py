"""How gradients became displacement: one small file per optimizer family, and the table."""
