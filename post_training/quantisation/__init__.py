"""Which format a model is quantised to, and which of ModelOpt's are trained and exported here."""
