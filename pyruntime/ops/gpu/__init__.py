"""What the ops launch on a GPU: one module per stem, loaded only when a plan is lowered for target cuda."""
