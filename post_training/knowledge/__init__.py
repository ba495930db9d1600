"""A teacher beside a student, and what the student learns of it."""
