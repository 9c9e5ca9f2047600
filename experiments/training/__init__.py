"""Train students: `interstack fit`, several side by side, and the targets that they share."""
