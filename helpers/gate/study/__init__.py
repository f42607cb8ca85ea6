"""What the gate is measured with."""
