"""The loss, and what guards a step."""
