"""Questions about training samples: is a label wrong, and what would training again say without some of them."""
