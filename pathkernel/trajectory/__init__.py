"""Keep the path: what each optimizer step leaves on record, and how it is read back."""
