"""Watch training: an ordinary loop, its optimizer's own hooks, and sample ids that travel with the batch."""
