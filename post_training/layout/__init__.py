"""Says which parallel layouts work, what they hold and what they cost."""
