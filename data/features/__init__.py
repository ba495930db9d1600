"""Writes and reads dumped hidden states (OfflineDataset)."""
