"""Which layer suffers from which width: measured layer by layer, or integrated along the way to the integers."""
