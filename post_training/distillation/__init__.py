"""Teachers, features, drafts and their losses."""
